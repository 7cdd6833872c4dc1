"""Where the IP datagram is in a captured frame, and the same frame around another datagram.

Link types, as https://www.tcpdump.org/linktypes.html numbers them: Ethernet with any number of VLAN tags, raw IP, Linux
cooked (both versions), BSD's NULL and LOOP, enc(4).
"""

from __future__ import annotations

from typing import Final

NULL: Final = 0
ETHERNET: Final = 1
RAW: Final = 101
LOOP: Final = 108
ENC: Final = 109
SLL: Final = 113
IPV4: Final = 228
IPV6: Final = 229
SLL2: Final = 276

_RAW: Final = frozenset((12, 14, RAW, IPV4, IPV6))
"""12 and 14 are the values of DLT_RAW on different systems; they are found in files, too."""
NAMES: Final = {
    NULL: "BSD loopback", ETHERNET: "Ethernet", 12: "raw IP", 14: "raw IP", RAW: "raw IP", LOOP: "OpenBSD loopback",
    ENC: "enc(4)", SLL: "Linux cooked", IPV4: "raw IPv4", IPV6: "raw IPv6", SLL2: "Linux cooked v2",
}  # fmt: skip

_ETHERTYPE: Final = {b"\x08\x00": 4, b"\x86\xdd": 6}
_ETHERTYPE_OF: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}
_VLAN: Final = frozenset((b"\x81\x00", b"\x88\xa8", b"\x91\x00"))
_AF_INET: Final = 2
_AF_INET6: Final = frozenset((10, 24, 28, 30))
"""AF_INET6 of Linux, of NetBSD and OpenBSD, of FreeBSD, of Darwin: the number is the capturing system's."""
_AF_INET6_WRITTEN: Final = 28

_FIRST: Final = {ETHERNET: (12, 14), SLL: (14, 16), SLL2: (0, 20)}
"""By link type: where the EtherType is, and what follows the header."""
_FAMILY: Final = {NULL: 4, LOOP: 4, ENC: 12}
"""Link types that begin with an address family of 32 bits, and the length of their header."""


def known(link: int) -> bool:
    """Whether frames of this type are understood."""
    return link in NAMES


def written_as(link: int) -> int:
    """The link type under which packets of either IP version can be written: 228 and 229 are for one of them only."""
    return RAW if link in {IPV4, IPV6} else link


def locate(link: int, frame: bytes) -> int:
    """The offset of the IP datagram in a frame, -1 when there is none."""
    if link in _RAW:
        return 0 if frame and frame[0] >> 4 in {4, 6} else -1
    if link in _FAMILY:
        end = _FAMILY[link]
        return end if len(frame) > end and _family(frame) else -1
    if link not in _FIRST:
        return -1
    at, end = _FIRST[link]
    while frame[at : at + 2] in _VLAN:
        at, end = end + 2, end + 4
    return end if frame[at : at + 2] in _ETHERTYPE and len(frame) > end else -1


def header(link: int, frame: bytes, offset: int, version: int) -> bytes:
    """The link header of ``frame``, whose datagram is at ``offset``, for a datagram of IP ``version``."""
    if link in _FIRST:
        # With SLL2 the EtherType is the first field; behind a VLAN tag it is always just before the datagram.
        at = 0 if link == SLL2 and offset == 20 else offset - 2
        return b"".join((frame[:at], _ETHERTYPE_OF[version], frame[at + 2 : offset]))
    if link in _FAMILY and _family(frame) != version:
        order = "big" if int.from_bytes(frame[:4], "big") < 256 else "little"
        family = _AF_INET if version == 4 else _AF_INET6_WRITTEN
        return family.to_bytes(4, order) + frame[4:offset]  # type: ignore[arg-type]
    return frame[:offset]


def _family(frame: bytes) -> int:
    """IP version by an address family in either byte order; 0 for any other family."""
    number = min(int.from_bytes(frame[:4], "big"), int.from_bytes(frame[:4], "little"))
    return 4 if number == _AF_INET else 6 if number in _AF_INET6 else 0
