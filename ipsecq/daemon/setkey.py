"""Sentences of setkey(8) carried out on the running daemon, and what ``setkey -D`` and ``-DP`` show.

They come over the control socket, not as PF_KEY messages: PF_KEY has no words for ranges of addresses and ports, windows
above 255 packets, or ``fail_open``.  Listeners hear of every change as if a PF_KEY client had made it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ipsecq.errors import AlgorithmError, ConfigError, DaemonError, SadError, SpdError
from ipsecq.numbers import SaState
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.policy.model import Policy
from ipsecq.sa.association import SaKey, SecurityAssociation, Slot
from ipsecq.sa.validate import validate
from ipsecq.setkey import commands as c
from ipsecq.setkey import printer
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

if TYPE_CHECKING:
    from ipsecq.daemon.supervisor import Supervisor

LABEL: Final = "setkey:"
"""Begins the label of what came this way, so that a reload of the files leaves it alone."""
MAX_TEXT: Final = 64 << 20
"""Octets of one file; it comes in parts of less than a request."""
MAX_OPEN: Final = 8
"""Files that arrive, and dumps that leave, at the same time; the oldest one gives way."""
SLICE: Final = 256
"""Sentences, or records, before packets of control and other clients have their turn."""


@dataclass(slots=True)
class _Dump:
    records: list[SecurityAssociation | Policy]
    at: int = 0


class Setkey:
    """The requests ``setkey`` and ``setkey-dump``."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._texts: OrderedDict[str, list[str]] = OrderedDict()
        self._dumps: OrderedDict[str, _Dump] = OrderedDict()

    async def execute(self, request: dict[str, Any]) -> object:
        """``text`` (a part, with ``more``; ``token`` from the answer to the first), ``file``, ``atomic``.

        The answer: ``errors`` (lines for people), ``shown`` (a dump to fetch) or None.
        """
        token = str(request.get("token") or "")
        if not token:
            token = secrets.token_hex(8)
            _admit(self._texts, token, [])
        parts = self._texts.get(token)
        if parts is None:
            raise DaemonError("setkey: too many files at once: try again")
        parts.append(str(request.get("text", "")))
        if sum(map(len, parts)) > MAX_TEXT:
            del self._texts[token]
            raise DaemonError(f"setkey: more than {MAX_TEXT} octets: use several files")
        if request.get("more"):
            return {"token": token}
        del self._texts[token]
        file = str(request.get("file", ""))
        text = "".join(parts)
        return await (self._atomic if request.get("atomic") else self._in_turn)(text, file)

    async def _atomic(self, text: str, file: str) -> object:
        """Everything is tried on copies first; then all of it is done without a pause, as one change."""
        supervisor = self._supervisor
        commands = parse(text, file)
        authority = supervisor.authority
        legacy = supervisor.config.daemon.allow_legacy
        shown = apply(
            commands, authority.sad, authority.spd, now=time.time(), file=file, allow_legacy=legacy
        ).shown
        with supervisor.book.batch():
            for command in _until_exit(commands):
                self._do(command, file, [])
        await supervisor.publish()
        return {"errors": [], "shown": self._show(shown)}

    async def _in_turn(self, text: str, file: str) -> object:
        """As setkey(8): what is refused is reported, what follows is done."""
        errors: list[str] = []
        shown: list[SecurityAssociation | Policy] = []
        commands = list(_until_exit(parse(text, file)))
        for first in range(0, len(commands), SLICE):
            with self._supervisor.book.batch():
                for command in commands[first : first + SLICE]:
                    try:
                        self._do(command, file, shown)
                    except (SadError, SpdError, AlgorithmError, PfkeyError) as error:
                        errors.append(str(ConfigError(str(error), file=file, line=command.line, column=command.column)))
            await asyncio.sleep(0)
        await self._supervisor.publish()
        return {"errors": errors, "shown": self._show(shown)}

    def _do(self, command: c.Command, file: str, shown: list[SecurityAssociation | Policy]) -> None:
        authority, keys = self._supervisor.authority, self._supervisor.keys
        label = f"{LABEL}{file}:{command.line}"
        match command:
            case c.Add(sa):
                validate(sa, self._supervisor.config.daemon.allow_legacy)
                keys.added(authority.add_sa(replace(sa, created=time.time(), label=label)))
            case c.Get(src, dst, protocol, spi):
                shown.append(authority.sad.get(dst, protocol, spi, src))
            case c.Delete(src, dst, protocol, spi):
                authority.sad.get(dst, protocol, spi, src)
                keys.deleted(authority.delete_sa(SaKey(dst, int(protocol), spi)))
            case c.DeleteAll(src, dst, protocol):
                for sa in authority.sad.dump(protocol):
                    # As Sad.delete_all.  One that waits for its slot has none yet, and goes all the same.
                    if sa.src == src and sa.dst == dst and sa.state is not SaState.LARVAL:
                        keys.deleted(authority.delete_sa(sa.key))
            case c.Flush(protocol):
                keys.flushed(authority.flush_sas(protocol), protocol)
            case c.Dump(protocol):
                shown += authority.sad.dump(protocol)
            case c.SpdAdd(policy) | c.SpdUpdate(policy):
                keys.put_policy(
                    replace(policy, created=time.time(), label=label), exclusive=isinstance(command, c.SpdAdd)
                )
            case c.SpdDelete(direction, selector):
                keys.delete_policy(direction, selector)
            case c.SpdFlush():
                keys.flush_policies()
            case c.SpdDump():
                shown += authority.spd.dump()
            case _:
                raise AssertionError(f"a command without a rule: {type(command).__name__}")

    # -- what is shown -----------------------------------------------------------------------------------------------

    def _show(self, records: list[SecurityAssociation | Policy]) -> str | None:
        if not records:
            return None
        token = secrets.token_hex(8)
        _admit(self._dumps, token, _Dump(records))
        return token

    async def dump(self, request: dict[str, Any]) -> object:
        """``what`` (sad, spd) begins a dump, keys included; ``token`` goes on.

        The answer: ``text``, and ``token`` while there is more.  The records are those of the moment at which it began.
        """
        token = str(request.get("token") or "")
        if not token:
            authority = self._supervisor.authority
            records: list[SecurityAssociation | Policy] = []
            records += authority.spd.dump() if request.get("what") == "spd" else authority.sad.dump()
            began = self._show(records)
            if began is None:
                return {"text": "", "token": None}
            token = began
        dump = self._dumps.get(token)
        if dump is None:
            raise DaemonError("setkey: too many dumps at once: try again")
        part = dump.records[dump.at : dump.at + SLICE]
        dump.at += len(part)
        left = len(dump.records) - dump.at
        now = time.time()
        text = "".join(
            self._print(record, now, left + len(part) - 1 - index) for index, record in enumerate(part)
        )
        if not left:
            del self._dumps[token]
        return {"text": text, "token": token if left else None}

    def _print(self, record: SecurityAssociation | Policy, now: float, remaining: int) -> str:
        if isinstance(record, Policy):
            return printer.dump_policy(record, remaining=remaining)
        words = self._supervisor.authority.usage_words(record)
        usage = printer.Usage()
        if words is not None:
            usage = printer.Usage(
                words[Slot.PACKETS], words[Slot.BYTES], words[Slot.FIRST_USE], words[Slot.SEQUENCE]
            )
        return printer.dump_sa(record, now, usage, remaining=remaining)


def _until_exit(commands: list[c.Command]) -> Iterator[c.Command]:
    for command in commands:
        if isinstance(command, c.Exit):
            return
        yield command


def _admit(table: OrderedDict[str, Any], token: str, value: object) -> None:
    table[token] = value
    while len(table) > MAX_OPEN:
        table.popitem(last=False)
