"""One reusable view of an IP datagram: what SPD, SAD and transforms ask of a header, read in one go.

A worker owns one :class:`PacketView` and calls :meth:`PacketView.load` for each packet; no object is made per packet
but the two addresses.  Everything that does not look like a whole, well-formed datagram is refused with False.
Sources: RFC 791, RFC 8200, RFC 7112 (a first fragment holds the whole header chain), RFC 4301 section 4.4.1.1.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from ipsecq.packet.buffer import Buffer

MAX_EXTENSION_HEADERS: Final = 16
"""Longest chain that is followed; RFC 8200 knows of seven headers in one packet."""

HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
DESTINATION_OPTIONS: Final = 60
MOBILITY: Final = 135

DF: Final = 0x4000
MF: Final = 0x2000

# The IPv4 header without options and the two ports behind it: one call reads the common packet whole.
_IPV4_PORTS: Final = Struct(">xBHHHBBxx4s4sHH")
_IPV4: Final = Struct(">xBHHHBBxx4s4s")
_IPV6: Final = Struct(">IHBB16s16s")
_FRAGMENT: Final = Struct(">HI")
_PORTS: Final = Struct(">HH")

# What the first octets of an upper layer hold, by protocol: 1 two ports, 2 type and code, 3 a Mobility Header.
_SELECTORS: Final = bytes(
    1 if p in {6, 17, 33, 132, 136} else 2 if p in {1, 58} else 3 if p == MOBILITY else 0 for p in range(256)
)


class PacketView:
    """The header fields of the datagram that was loaded last.

    ``version``            4 or 6.
    ``src, dst``           packed addresses of the IP header.
    ``protocol``           upper layer, after IPv6 extension headers; AH, ESP and IPComp count as upper layers.
    ``offset``             of the upper layer, octets; in a later fragment: of the fragment's data.
    ``length``             of the datagram by its header; octets of the buffer behind it are not part of it.
    ``header_length``      IPv4 header with options; IPv6 header and the per-hop headers (RFC 8200 section 4.5:
                           hop-by-hop options, and up to the routing header if there is one): where a fragment header
                           and a transport mode transform go.
    ``header_nexthdr``     offset of the octet that names what follows ``header_length`` (IPv4: 9).
    ``nexthdr_offset``     offset of the octet that names ``protocol`` (IPv4: 9).
    ``sport, dport``       TCP, UDP, UDP-Lite, SCTP, DCCP ports; ICMP and ICMPv6 type and code; Mobility Header type
                           and 0.  Both are 0 in a later fragment and where the octets are missing.
    ``tos``                TOS octet or traffic class: DSCP and ECN.
    ``ttl``                TTL or hop limit.
    ``identification``     of IPv4, or of the fragment header, else 0.
    ``flow_label``         0 in IPv4.
    ``fragment_header``    offset of an IPv6 fragment header, else 0.
    ``fragment_word``      flags and offset as in IPv4 (DF 0x4000, MF 0x2000, then units of 8 octets), both versions.
    """

    __slots__ = (
        "dport",
        "dst",
        "flow_label",
        "fragment_header",
        "fragment_word",
        "header_length",
        "header_nexthdr",
        "identification",
        "length",
        "nexthdr_offset",
        "offset",
        "protocol",
        "sport",
        "src",
        "tos",
        "ttl",
        "version",
    )

    def __init__(self) -> None:
        self.version = 0
        self.src = self.dst = b""
        self.protocol = self.offset = self.length = 0
        self.header_length = self.header_nexthdr = self.nexthdr_offset = 0
        self.sport = self.dport = 0
        self.tos = self.ttl = self.identification = self.flow_label = 0
        self.fragment_header = self.fragment_word = 0

    @property
    def fragment_offset(self) -> int:
        """Where this fragment's data belong in the datagram, in octets."""
        return (self.fragment_word & 0x1FFF) << 3

    @property
    def more_fragments(self) -> bool:
        """The MF bit."""
        return self.fragment_word & MF != 0

    @property
    def dont_fragment(self) -> bool:
        """The DF bit of IPv4; always False in IPv6, which no router fragments."""
        return self.fragment_word & DF != 0

    @property
    def is_fragment(self) -> bool:
        """A part of a datagram.  An atomic fragment (RFC 6946) is whole, so it is none."""
        return self.fragment_word & 0x3FFF != 0

    def flow(self) -> tuple[bytes, bytes, int, int, int]:
        """The selector tuple: source, destination, protocol, source port, destination port."""
        return self.src, self.dst, self.protocol, self.sport, self.dport

    def load(self, buffer: Buffer) -> bool:
        """Read the headers of the datagram at the start of ``buffer``.

        False means malformed: unknown version, impossible or truncated lengths, a jumbogram, an extension header out
        of its place or a chain of more than :data:`MAX_EXTENSION_HEADERS`.  The attributes are then meaningless.
        Never raises, whatever the octets.  About 0.2 µs for TCP in IPv4, 0.5 µs in IPv6.
        """
        size = len(buffer)
        if size < 20:
            return False
        first = buffer[0]
        if first == 0x45 and size >= 24:
            (
                self.tos, length, self.identification, word, self.ttl, protocol, self.src, self.dst, sport, dport,
            ) = _IPV4_PORTS.unpack_from(buffer)  # fmt: skip
            self.version = 4
            self.length = length
            self.fragment_word = word
            self.protocol = protocol
            self.offset = self.header_length = 20
            self.header_nexthdr = self.nexthdr_offset = 9
            self.flow_label = self.fragment_header = 0
            if (protocol == 6 or protocol == 17) and not word & 0x1FFF and length >= 24:  # noqa: PLR1714 (speed)
                self.sport = sport
                self.dport = dport
            else:
                self._load_selectors(buffer)
            return size >= self.length >= 20
        if first >> 4 == 4:
            return self._load_ipv4(buffer, size)
        if first >> 4 == 6:
            return self._load_ipv6(buffer, size)
        return False

    def _load_ipv4(self, buffer: Buffer, size: int) -> bool:
        """IPv4 with options, or shorter than 24 octets."""
        header = (buffer[0] & 15) << 2
        (
            self.tos, self.length, self.identification, self.fragment_word, self.ttl, self.protocol, self.src, self.dst,
        ) = _IPV4.unpack_from(buffer)  # fmt: skip
        if not 20 <= header <= self.length <= size:
            return False
        self.version = 4
        self.offset = self.header_length = header
        self.header_nexthdr = self.nexthdr_offset = 9
        self.flow_label = self.fragment_header = 0
        self._load_selectors(buffer)
        return True

    def _load_ipv6(self, buffer: Buffer, size: int) -> bool:
        if size < 40:
            return False
        word, payload, protocol, self.ttl, self.src, self.dst = _IPV6.unpack_from(buffer)
        length = payload + 40
        if length > size:
            return False
        self.version = 6
        self.length = length
        self.tos = word >> 20 & 0xFF
        self.flow_label = word & 0xFFFFF
        self.identification = self.fragment_word = self.fragment_header = 0
        self.protocol = protocol
        self.offset = self.header_length = 40
        self.header_nexthdr = self.nexthdr_offset = 6
        if _EXTENSION[protocol] and not self._walk(buffer, protocol, length):
            return False
        self._load_selectors(buffer)
        return True

    def _walk(self, buffer: Buffer, protocol: int, length: int) -> bool:
        """Follow the extension headers up to the upper layer, AH, ESP or a later fragment's data."""
        offset, nexthdr = 40, 6
        for position in range(MAX_EXTENSION_HEADERS + 1):
            if not _EXTENSION[protocol]:
                self.protocol, self.offset, self.nexthdr_offset = protocol, offset, nexthdr
                return True
            if offset + 8 > length or (protocol == HOP_BY_HOP and position):
                return False
            if protocol == FRAGMENT:
                if self.fragment_header:
                    return False
                word, self.identification = _FRAGMENT.unpack_from(buffer, offset + 2)
                self.fragment_header = offset
                self.fragment_word = word >> 3 | (word & 1) << 13
                end = offset + 8
                if word & 0xFFF8:  # its data are the middle of something: the chain ends here
                    self.protocol, self.offset, self.nexthdr_offset = buffer[offset], end, offset
                    return True
            else:
                end = offset + 8 + (buffer[offset + 1] << 3)
                if end > length:
                    return False
                if protocol != DESTINATION_OPTIONS and not self.fragment_header:
                    self.header_length, self.header_nexthdr = end, offset
            protocol, nexthdr, offset = buffer[offset], offset, end
        return False

    def _load_selectors(self, buffer: Buffer) -> None:
        """Ports, ICMP type and code, Mobility Header type."""
        self.sport = self.dport = 0
        kind = _SELECTORS[self.protocol]
        offset = self.offset
        # ``length`` may be a lie here, so the buffer is asked, too.
        room = min(self.length, len(buffer)) - offset
        if not kind or self.fragment_word & 0x1FFF or room < 4:
            return
        if kind == 1:
            self.sport, self.dport = _PORTS.unpack_from(buffer, offset)
        elif kind == 2:
            self.sport, self.dport = buffer[offset], buffer[offset + 1]
        else:
            self.sport = buffer[offset + 2]


_EXTENSION: Final = bytes(p in {HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS} for p in range(256))
