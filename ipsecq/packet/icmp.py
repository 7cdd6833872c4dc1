"""ICMP errors: those that a gateway sends, and those that it receives about its own packets.

Sources: RFC 792, RFC 1191 (next-hop MTU), RFC 1812 section 4.3.2 (what may be answered, how much is quoted), RFC 4443.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from ipsecq.numbers import IPPROTO_ICMP, IPPROTO_ICMPV6, IPV6_MIN_MTU, Protocol
from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView

_HEADER: Final = Struct(">BBHI")
_U16: Final = Struct(">H")
_U32: Final = Struct(">I")

IPV4_QUOTE: Final = 576
"""RFC 1812: as much of the packet as fits into an error of 576 octets."""

UNREACHABLE_V4: Final = 3
FRAGMENTATION_NEEDED: Final = 4
_ERRORS_V4: Final = frozenset({3, 4, 5, 11, 12})

TOO_BIG_V6: Final = 2


@dataclass(slots=True, frozen=True)
class IcmpError:
    """An ICMP or ICMPv6 error and what it quotes of the packet that caused it.

    ``mtu`` is 0 except in "too big" errors.  ``sport, dport`` (or ``spi``, the SPI of ESP and AH or CPI of IPComp) are
    0 where the quotation does not reach them.  Addresses are packed; ``source`` is who sent the error.
    """

    version: int
    type: int
    code: int
    mtu: int
    source: bytes
    inner_offset: int
    """Where the quoted packet starts in the packet that was parsed."""
    inner_src: bytes
    inner_dst: bytes
    upper_offset: int
    """Where the quoted packet's upper layer (its AH, ESP or IPComp header) starts in ``quoted``; may be behind its end."""
    protocol: int
    spi: int
    sport: int
    dport: int
    inner_fragment: bool
    """The quoted packet is a fragment other than the first."""
    quoted: bytes
    """The quoted octets, starting with the IP header of the packet that caused the error."""

    @property
    def too_big(self) -> bool:
        """Whether this is Path MTU Discovery's message (RFC 1191, RFC 8201)."""
        if self.version == 4:
            return self.type == UNREACHABLE_V4 and self.code == FRAGMENTATION_NEEDED
        return self.type == TOO_BIG_V6


def too_big(packet: Buffer, mtu: int, source: bytes) -> bytes:
    """The error that tells ``packet``'s sender to send at most ``mtu`` octets: ICMP 3/4 or ICMPv6 2.

    ``source`` is the packed address that sends it.  The MTU is told as it is: not to ask an IPv6 sender for less than
    1280 octets is the caller's affair.  b"" where no error may be sent: about an ICMP error or redirect, a fragment other
    than the first, a packet from a multicast or to or from a broadcast address, from the unspecified or a loopback
    address, IPv4 multicast, a malformed packet, or if ``source`` is of the other IP version.
    """
    view = PacketView()
    if not view.load(packet):
        return b""
    if view.version == 4:
        return _error(packet, view, UNREACHABLE_V4, FRAGMENTATION_NEEDED, min(mtu, 0xFFFF), source)
    return _error(packet, view, TOO_BIG_V6, 0, mtu, source)


def _error(packet: Buffer, view: PacketView, kind: int, code: int, word: int, source: bytes) -> bytes:
    if len(source) != len(view.src) or not _may_answer(view):
        return b""
    if view.version == 4:
        quote = packet[: min(view.length, IPV4_QUOTE - 28)]
        body = b"".join((_HEADER.pack(kind, code, 0, word), quote))
        value = 0xFFFF - checksum.ones_complement(body)
        # Precedence 6, internetwork control (RFC 1812 section 4.3.2.5).
        head = ipv4.header(source, view.src, IPPROTO_ICMP, len(body), tos=0xC0)
    else:
        quote = packet[: min(view.length, IPV6_MIN_MTU - 48)]
        body = b"".join((_HEADER.pack(kind, code, 0, word), quote))
        value = checksum.transport(source, view.src, IPPROTO_ICMPV6, body)
        head = ipv6.header(source, view.src, IPPROTO_ICMPV6, len(body))
    return b"".join((head, body[:2], _U16.pack(value), body[4:]))


def _may_answer(view: PacketView) -> bool:
    """RFC 1812 section 4.3.2.7, RFC 4443 section 2.4 (e)."""
    src, dst = view.src, view.dst
    if view.fragment_word & 0x1FFF:
        return False
    if view.version == 4:
        if view.protocol == IPPROTO_ICMP and (view.sport in _ERRORS_V4 or view.length < view.offset + 4):
            return False
        # Class D and E, 0/8, 127/8 and the limited broadcast address name no single host that could be told.
        return not (src[0] in {0, 127} or src[0] >= 224 or dst[0] >= 224)
    if view.protocol == IPPROTO_ICMPV6 and (view.sport < 128 or view.sport == 137 or view.length < view.offset + 4):
        return False
    # From multicast, :: and ::1.  What goes to multicast is answered: path MTU discovery works for it, too.
    return src[0] != 0xFF and any(src[:15])


def parse_error(packet: Buffer) -> IcmpError | None:
    """What an ICMP error tells; None for anything else, or when it is malformed or its checksum is wrong.

    The quoted packet is read as far as the quotation goes.  Nothing in it is authenticated: what it is believed for is
    the caller's decision (RFC 4301 section 6).
    """
    view = PacketView()
    if not view.load(packet) or view.is_fragment:
        return None
    kind = view.sport
    if view.version == 4:
        if view.protocol != IPPROTO_ICMP or kind not in _ERRORS_V4:
            return None
    elif view.protocol != IPPROTO_ICMPV6 or kind >= 128:
        return None
    inner = view.offset + 8
    if inner >= view.length or not checksum.verify_transport(packet, view):
        return None
    quoted = bytes(packet[inner : view.length])
    if quoted[0] >> 4 != view.version:
        return None
    cause = _load_quoted(quoted)
    if cause is None:
        return None
    mtu = 0
    if view.version == 6 and kind == TOO_BIG_V6:
        mtu = _U32.unpack_from(packet, view.offset + 4)[0]
    elif view.version == 4 and kind == UNREACHABLE_V4 and view.dport == FRAGMENTATION_NEEDED:
        mtu = _U16.unpack_from(packet, view.offset + 6)[0]
    return IcmpError(
        version=view.version, type=kind, code=view.dport, mtu=mtu, source=view.src, inner_offset=inner,
        inner_src=cause.src, inner_dst=cause.dst, upper_offset=cause.offset, protocol=cause.protocol,
        spi=_spi(quoted, cause), sport=cause.sport, dport=cause.dport,
        inner_fragment=cause.fragment_word & 0x1FFF != 0, quoted=quoted,
    )  # fmt: skip


def _load_quoted(quoted: bytes) -> PacketView | None:
    """A view of a packet that was cut short: its length field is made to agree with what is there."""
    need = 20 if quoted[0] >> 4 == 4 else 40
    size = len(quoted)
    if size < need:
        return None
    trimmed = bytearray(quoted)
    if need == 20:
        if _U16.unpack_from(quoted, 2)[0] > size:
            _U16.pack_into(trimmed, 2, size)
    elif _U16.unpack_from(quoted, 4)[0] > size - 40:
        _U16.pack_into(trimmed, 4, size - 40)
    view = PacketView()
    return view if view.load(trimmed) else None


def _spi(quoted: bytes, view: PacketView) -> int:
    offset = view.offset
    if view.fragment_word & 0x1FFF or len(quoted) < offset + 4:
        return 0
    if view.protocol == Protocol.ESP:
        return int(_U32.unpack_from(quoted, offset)[0])
    if view.protocol == Protocol.IPCOMP:
        return int(_U16.unpack_from(quoted, offset + 2)[0])
    if view.protocol == Protocol.AH and len(quoted) >= offset + 8:
        return int(_U32.unpack_from(quoted, offset + 4)[0])
    return 0
