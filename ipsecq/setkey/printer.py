"""SAs and policies as text: the layout of ``setkey -D`` and ``-DP``, and the configuration form that loads again.

The layout is that of libipsec (KAME, FreeBSD): labels, order, tabs and units are what scripts look for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ipsecq.numbers import Mode, SaState
from ipsecq.policy import setpolicy
from ipsecq.policy.model import Policy
from ipsecq.sa.association import Lifetime, NatTraversal, SecurityAssociation
from ipsecq.secret import Key
from ipsecq.setkey import values
from ipsecq.setkey.commands import SADB_X_EXT_PRAND, SADB_X_EXT_PZERO, SADB_X_EXT_RAWCPI


@dataclass(slots=True, frozen=True)
class Usage:
    """What has happened on an SA: counts, Unix times in seconds (0: never), and the last sequence number."""

    packets: int = 0
    bytes: int = 0
    first_use: int = 0
    sequence: int = 0


_UNUSED = Usage()


def dump_sa(sa: SecurityAssociation, now: float, usage: Usage = _UNUSED, *, remaining: int = 0) -> str:
    """Return one SA as ``setkey -D`` prints it, keys included.

    ``remaining`` is how many records follow (``sadb_seq``); ``last:`` is the time of first use, as in PF_KEY.
    """
    natt = sa.natt
    sport, dport = (f"[{natt.sport}]", f"[{natt.dport}]") if natt is not None else ("", "")
    protocol = "esp-udp" if natt is not None else sa.protocol.name.lower()
    lines = [
        f"{values.format_address(sa.src)}{sport} {values.format_address(sa.dst)}{dport}",
        f"\t{protocol} mode={sa.mode.name.lower()} spi={sa.spi}(0x{sa.spi:08x}) reqid={sa.reqid}(0x{sa.reqid:08x})",
    ]
    if natt is not None and (natt.original_src is not None or natt.original_dst is not None):
        lines.append("\tNAT:" + "".join(
            f" {name}={values.format_address(address)}"
            for name, address in (("OAI", natt.original_src), ("OAR", natt.original_dst))
            if address is not None
        ))  # fmt: skip
    if sa.compression is not None:
        lines.append(f"\tC: {sa.compression} ")
    if sa.encryption is not None:
        lines.append(f"\tE: {sa.encryption} {_hexdump(sa.encryption_key)}")
    if sa.authentication is not None:
        lines.append(f"\tA: {sa.authentication} {_hexdump(sa.authentication_key)}")
    state = SaState(sa.state).name.lower()
    hard, soft = sa.hard, sa.soft
    age = int(now - sa.created) if sa.created else 0
    sequence = usage.sequence & 0xFFFFFFFF
    lines += [
        f"\tseq=0x{sequence:08x} replay={(sa.replay_window + 7) // 8} flags=0x{sa.flags:08x} state={state} ",
        f"\tcreated: {_time(sa.created)}\tcurrent: {_time(now)}",
        f"\tdiff: {age}(s)\thard: {hard.addtime}(s)\tsoft: {soft.addtime}(s)",
        f"\tlast: {_time(usage.first_use)}\thard: {hard.usetime}(s)\tsoft: {soft.usetime}(s)",
        f"\tcurrent: {usage.bytes}(bytes)\thard: {hard.bytes}(bytes)\tsoft: {soft.bytes}(bytes)",
        f"\tallocated: {usage.packets}\thard: {hard.allocations}\tsoft: {soft.allocations}",
        f"\tsadb_seq={remaining} pid={sa.pid} refcnt=0",
    ]
    return "\n".join(lines) + "\n"


def dump_policy(policy: Policy, last_use: float = 0, *, remaining: int = 0, pid: int = 0) -> str:
    """Return one policy as ``setkey -DP`` prints it.  ``validtime`` is 0: nobody may set it."""
    rules = setpolicy.format(policy, delimiter="\n\t")
    return (
        f"{values.format_selector(policy.selector)}\n"
        f"\t{rules}\n"
        f"\tcreated: {_time(policy.created)}  lastused: {_time(last_use)}\n"
        f"\tlifetime: {policy.lifetime}(s) validtime: 0(s)\n"
        f"\tspid={policy.id} seq={remaining} pid={pid} scope=global \n"
        f"\trefcnt=0\n"
    )


def config_sa(sa: SecurityAssociation) -> str:
    """Return the ``add`` sentence of one SA, keys included: parsing it gives the same SA again.

    What an ``add`` does not say (state, creation, slot, who made it) is not in it.  No command prints it: tests hold the
    parser against it.
    """
    natt = sa.natt
    sport, dport = (f"[{natt.sport}]", f"[{natt.dport}]") if natt is not None else ("", "")
    protocol = "esp-udp" if natt is not None else sa.protocol.name.lower()
    words = [
        f"add {values.format_address(sa.src)}{sport} {values.format_address(sa.dst)}{dport} {protocol} 0x{sa.spi:x}",
    ]
    if sa.mode is not Mode.ANY:
        words.append(f"-m {sa.mode.name.lower()}")
    if sa.reqid:
        words.append(f"-u {sa.reqid}")
    if sa.replay_window:
        words.append(f"-r {(sa.replay_window + 7) // 8}")
    if sa.esn:
        words.append("-esn")
    words += [f"-f {name}" for bit, name in ((SADB_X_EXT_PRAND, "random-pad"), (SADB_X_EXT_PZERO, "zero-pad"))
              if sa.flags & bit]  # fmt: skip
    if sa.tfc_pad:
        words.append(f"-tfc {sa.tfc_pad}")
    if sa.ah_align:
        words.append(f"-align {sa.ah_align}")
    if natt is not None:
        words += _natt_words(natt)
    words += _lifetime_words(sa.hard, "h") + _lifetime_words(sa.soft, "s")
    if sa.encryption is not None:
        words.append(f"-E {sa.encryption}{_config_key(sa.encryption_key)}")
    if sa.authentication is not None:
        words.append(f"-A {sa.authentication}{_config_key(sa.authentication_key)}")
    if sa.compression is not None:
        words.append(f"-C {sa.compression}{' -R' if sa.flags & SADB_X_EXT_RAWCPI else ''}")
    return " ".join(words) + " ;"


def config_policy(policy: Policy, command: str = "spdadd") -> str:
    """Return the ``spdadd`` (or spdupdate) sentence of one policy: parsing it gives the same policy again."""
    words = [command, values.format_selector(policy.selector)]
    if policy.lifetime:
        words.append(f"-lh {policy.lifetime}")
    if policy.fail_open:
        words.append("-fail_open")
    return f"{' '.join(words)} -P {setpolicy.format(policy)} ;"


def _natt_words(natt: NatTraversal) -> list[str]:
    words = []
    if natt.original_src is not None:
        words.append(f"-oai {values.format_address(natt.original_src)}")
    if natt.original_dst is not None:
        words.append(f"-oar {values.format_address(natt.original_dst)}")
    if natt.rebind:
        words.append("-rebind")
    return words


def _lifetime_words(limit: Lifetime, which: str) -> list[str]:
    named = (("l", limit.addtime), ("b", limit.bytes), ("u", limit.usetime), ("a", limit.allocations))
    return [f"-{letter}{which} {value}" for letter, value in named if value]


def _config_key(key: Key) -> str:
    return f" 0x{key.octets.hex()}" if key else ""


def _hexdump(key: Key) -> str:
    """Octets in groups of four, 32 a line, each group after a space, as libipsec prints keys."""
    octets = key.octets
    rows = (octets[start : start + 32] for start in range(0, len(octets), 32))
    return "\n".join("".join(" " + row[at : at + 4].hex() for at in range(0, len(row), 4)) for row in rows)


def _time(moment: float) -> str:
    """Month, day, time and year in local time, 20 characters; blanks for never."""
    return time.ctime(moment)[4:24] if moment else " " * 20
