"""The report of ``netstat -sp ipsec|ah|esp|ipcomp`` in the words that its readers (and their scripts) know.

Source: FreeBSD's netstat(1) as it prints ``struct ipsecstat``, ``ahstat``, ``espstat`` and ``ipcompstat``.  Counters
that ipsecq has no use for (mbufs, protocol families) are left out rather than printed as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ipsecq.counters import Counter
from ipsecq.errors import IpsecqError

_Line = tuple[str, tuple[Counter, ...]]

C = Counter

SECTIONS: Final[dict[str, tuple[_Line, ...]]] = {
    "ipsec": (
        ("inbound packet{s} violated process security policy", (C.IN_POLVIO, C.IN_HISTORY, C.IN_DISCARD)),
        ("inbound packet{s} failed due to insufficient memory", (C.IN_NOMEM,)),
        ("invalid inbound packet{s}", (C.IN_INVAL, C.IN_TOODEEP, C.IP_MALFORMED)),
        ("outbound packet{s} violated process security policy", (C.OUT_POLVIO, C.OUT_DISCARD)),
        ("outbound packet{s} with no SA available", (C.OUT_NOSA, C.OUT_HELD_OVERFLOW)),
        ("outbound packet{s} failed due to insufficient memory", (C.OUT_NOMEM,)),
        ("outbound packet{s} with no route available", (C.OUT_NOROUTE,)),
        ("invalid outbound packet{s}", (C.OUT_INVAL,)),
        ("outbound packet{s} with bundled SAs", (C.OUT_BUNDLESA,)),
        ("spd cache hit{s}", (C.FLOW_HIT,)),
        ("spd cache miss{es}", (C.FLOW_MISS,)),
    ),
    "ah": (
        ("packet{s} shorter than header shows", (C.AH_HDROPS,)),
        ("packet{s} dropped; no TDB", (C.AH_NOTDB,)),
        ("packet{s} dropped; bad KCR", (C.AH_BADKCR,)),
        ("packet{s} dropped; queue full", (C.AH_QFULL,)),
        ("packet{s} dropped; no transform", (C.AH_NOXFORM,)),
        ("replay counter wrap{s}", (C.AH_WRAP, C.AH_NOSEQ)),
        ("packet{s} dropped; bad authentication detected", (C.AH_BADAUTH,)),
        ("packet{s} dropped; bad authentication length", (C.AH_BADAUTHL,)),
        ("possible replay packet{s} detected", (C.AH_REPLAY,)),
        ("packet{s} in", (C.AH_INPUT,)),
        ("packet{s} out", (C.AH_OUTPUT,)),
        ("packet{s} dropped; invalid TDB", (C.AH_EXPIRED,)),
        ("byte{s} in", (C.AH_IBYTES,)),
        ("byte{s} out", (C.AH_OBYTES,)),
        ("packet{s} dropped; larger than IP_MAXPACKET", (C.AH_TOOBIG,)),
        ("packet{s} blocked due to policy", (C.AH_PDROPS,)),
        ("crypto processing failure{s}", (C.AH_CRYPTO,)),
        ("tunnel sanity check failure{s}", (C.AH_INVALID,)),
    ),
    "esp": (
        ("packet{s} shorter than header shows", (C.ESP_HDROPS,)),
        ("packet{s} dropped; no TDB", (C.ESP_NOTDB, C.ESP_NATT)),
        ("packet{s} dropped; bad KCR", (C.ESP_BADKCR,)),
        ("packet{s} dropped; queue full", (C.ESP_QFULL,)),
        ("packet{s} dropped; no transform", (C.ESP_NOXFORM,)),
        ("packet{s} dropped; bad ilen", (C.ESP_BADILEN,)),
        ("replay counter wrap{s}", (C.ESP_WRAP, C.ESP_NOSEQ)),
        ("packet{s} dropped; bad encryption detected", (C.ESP_BADENC,)),
        ("packet{s} dropped; bad authentication detected", (C.ESP_BADAUTH,)),
        ("possible replay packet{s} detected", (C.ESP_REPLAY,)),
        ("packet{s} in", (C.ESP_INPUT,)),
        ("packet{s} out", (C.ESP_OUTPUT,)),
        ("packet{s} dropped; invalid TDB", (C.ESP_EXPIRED,)),
        ("byte{s} in", (C.ESP_IBYTES,)),
        ("byte{s} out", (C.ESP_OBYTES,)),
        ("packet{s} dropped; larger than IP_MAXPACKET", (C.ESP_TOOBIG,)),
        ("packet{s} blocked due to policy", (C.ESP_PDROPS,)),
        ("crypto processing failure{s}", (C.ESP_CRYPTO,)),
        ("tunnel sanity check failure{s}", (C.ESP_INVALID,)),
    ),
    "ipcomp": (
        ("packet{s} shorter than header shows", (C.IPCOMP_HDROPS,)),
        ("packet{s} dropped; no TDB", (C.IPCOMP_NOTDB,)),
        ("packet{s} dropped; bad KCR", (C.IPCOMP_BADKCR,)),
        ("packet{s} dropped; queue full", (C.IPCOMP_QFULL,)),
        ("packet{s} dropped; no transform", (C.IPCOMP_NOXFORM,)),
        ("replay counter wrap{s}", (C.IPCOMP_WRAP,)),
        ("packet{s} in", (C.IPCOMP_INPUT,)),
        ("packet{s} out", (C.IPCOMP_OUTPUT,)),
        ("packet{s} dropped; invalid TDB", (C.IPCOMP_INVALID, C.IPCOMP_EXPIRED)),
        ("byte{s} in", (C.IPCOMP_IBYTES,)),
        ("byte{s} out", (C.IPCOMP_OBYTES,)),
        ("packet{s} dropped; larger than IP_MAXPACKET", (C.IPCOMP_TOOBIG, C.IPCOMP_BOMB)),
        ("packet{s} blocked due to policy", (C.IPCOMP_PDROPS,)),
        ("crypto processing failure{s}", (C.IPCOMP_CRYPTO,)),
        ("packet{s} sent uncompressed; size < compr. algo. threshold", (C.IPCOMP_THRESHOLD,)),
        ("packet{s} sent uncompressed; compression was useless", (C.IPCOMP_UNCOMPR,)),
    ),
}
"""Every line of each protocol: its words and the counters whose sum it shows."""


def report(counters: Sequence[int], protocol: str | None = None) -> str:
    """The text for one protocol, or for all four.  Raises IpsecqError for a name that netstat wouldn't know."""
    if protocol is not None and protocol not in SECTIONS:
        raise IpsecqError(f"{protocol}: unknown protocol; expected one of {', '.join(SECTIONS)}")
    lines: list[str] = []
    for name in [protocol] if protocol else SECTIONS:
        lines.append(f"{name}:")
        for words, summed in SECTIONS[name]:
            value = sum(counters[counter] for counter in summed)
            lines.append(f"\t{value} {words.format(s='' if value == 1 else 's', es='' if value == 1 else 'es')}")
    return "\n".join(lines) + "\n"
