"""Commands of setkey(8) carried out on SAD and SPD, as a whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ipsecq.errors import AlgorithmError, ConfigError, SadError, SpdError
from ipsecq.numbers import Protocol
from ipsecq.policy.model import Policy
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.sa.validate import validate
from ipsecq.setkey import commands as c


@dataclass(slots=True)
class Applied:
    """The new content of both databases, and what ``get``, ``dump`` and ``spddump`` are to show, in order."""

    sad: Sad
    spd: Spd
    shown: list[SecurityAssociation | Policy] = field(default_factory=list)


def apply(
    commands: Iterable[c.Command], sad: Sad, spd: Spd, *, now: float, file: str = "", allow_legacy: bool = False,
    allow_unauthenticated: bool = False,
) -> Applied:  # fmt: skip
    """Carry out ``commands`` on copies of ``sad`` and ``spd`` and return them; the arguments stay as they are.

    ``now`` (Unix seconds) becomes the creation time of what is added.  ConfigError with file, line and column of the
    first command that fails; nothing has been changed then.  ``allow_legacy`` and ``allow_unauthenticated`` are those
    of :func:`ipsecq.sa.validate.validate`.  Copying costs time in proportion to the content:
    this is for files; single changes go to :class:`Sad` and :class:`Spd` themselves.
    """
    result = Applied(sad.copy(), spd.copy())
    for command in commands:
        if isinstance(command, c.Exit):
            break
        try:
            _apply_one(command, result, now, allow_legacy, allow_unauthenticated)
        except (SadError, SpdError, AlgorithmError) as error:
            raise ConfigError(str(error), file=file, line=command.line, column=command.column) from error
    return result


def check(
    commands: Iterable[c.Command], *, now: float, file: str = "", allow_legacy: bool = False
) -> list[ConfigError]:
    """What a load of ``commands`` would refuse, in their order; what follows a refused one is looked at, too.

    The databases are empty in the beginning, so what isn't there to be shown or deleted is no mistake.
    """
    databases = Applied(Sad(), Spd())
    refused: list[ConfigError] = []
    for command in commands:
        if isinstance(command, c.Exit):
            break
        try:
            _apply_one(command, databases, now, allow_legacy, allow_unauthenticated=False)
        except (SadError, SpdError, AlgorithmError) as error:
            absent = not isinstance(error, AlgorithmError) and error.errno in (errno.ENOENT, errno.ESRCH)
            if not (absent and isinstance(command, c.Get | c.Delete | c.DeleteAll | c.SpdDelete)):
                refused.append(ConfigError(str(error), file=file, line=command.line, column=command.column))
    return refused


def _apply_one(
    command: c.Command, to: Applied, now: float, allow_legacy: bool, allow_unauthenticated: bool
) -> None:
    match command:
        case c.Add(sa):
            validate(sa, allow_legacy, allow_unauthenticated=allow_unauthenticated)
            to.sad.add(replace(sa, created=now))
        case c.Get(src, dst, protocol, spi):
            to.shown.append(to.sad.get(dst, protocol, spi, src))
        case c.Delete(src, dst, protocol, spi):
            to.sad.delete(dst, protocol, spi, src)
        case c.DeleteAll(src, dst, protocol):
            for each in Protocol if protocol is None else (protocol,):
                to.sad.delete_all(src, dst, each)
        case c.Flush(protocol):
            to.sad.flush(protocol)
        case c.Dump(protocol):
            to.shown += to.sad.dump(protocol)
        case c.SpdAdd(policy):
            to.spd.add(replace(policy, created=now))
        case c.SpdUpdate(policy):
            to.spd.update(replace(policy, created=now))
        case c.SpdDelete(direction, selector):
            to.spd.delete(direction, selector)
        case c.SpdFlush():
            to.spd.flush()
        case c.SpdDump():
            to.shown += to.spd.dump()
        case _:
            raise AssertionError(f"a command without a rule: {type(command).__name__}")
