"""IPv6 extension headers and IPv4 options, one by one, for those who must look into them (AH, fragmentation)."""

from __future__ import annotations

from typing import Final, NamedTuple

from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import (
    DESTINATION_OPTIONS,
    FRAGMENT,
    HOP_BY_HOP,
    MAX_EXTENSION_HEADERS,
    ROUTING,
    PacketView,
)


class Part(NamedTuple):
    """An extension header or an option: its type, where it starts in the packet, and its octets."""

    type: int
    offset: int
    length: int


EOL: Final = 0
NOP: Final = 1


def iter_ipv6_headers(packet: Buffer) -> list[Part] | None:
    """The extension headers of an IPv6 packet in their order, AH not among them; None when the chain is malformed.

    The list ends before the upper layer, AH or ESP, and after the header of a later fragment.  Octets after the payload
    length are ignored.  Unlike :meth:`PacketView.load` a header alone (nothing behind the extensions) is fine, and the
    payload length may be larger than the buffer: the buffer's end counts.
    """
    if len(packet) < 40 or packet[0] >> 4 != 6:
        return None
    end = min(len(packet), 40 + (packet[4] << 8 | packet[5]))
    return _chain(packet, end)


def _chain(packet: Buffer, end: int) -> list[Part] | None:
    parts: list[Part] = []
    kind, offset = packet[6], 40
    while kind in {HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS}:
        if offset + 8 > end or (kind == HOP_BY_HOP and parts) or len(parts) == MAX_EXTENSION_HEADERS:
            return None
        length = 8 if kind == FRAGMENT else 8 + (packet[offset + 1] << 3)
        if offset + length > end:
            return None
        parts.append(Part(kind, offset, length))
        if kind == FRAGMENT and (packet[offset + 2] << 8 | packet[offset + 3]) & 0xFFF8:
            break
        kind, offset = packet[offset], offset + length
    return parts


def iter_ipv6_options(packet: Buffer, header: Part) -> list[Part] | None:
    """The options of a hop-by-hop or destination options header, padding included; None when malformed (RFC 8200, 4.2).

    An option's length counts its type and length octets; Pad1 has length 1.
    """
    options: list[Part] = []
    offset, end = header.offset + 2, header.offset + header.length
    while offset < end:
        kind = packet[offset]
        if kind == 0:
            length = 1
        else:
            if offset + 2 > end:
                return None
            length = packet[offset + 1] + 2
            if offset + length > end:
                return None
        options.append(Part(kind, offset, length))
        offset += length
    return options


def iter_ipv4_options(packet: Buffer) -> list[Part] | None:
    """The options of an IPv4 header, NOP and EOL included; None when malformed (RFC 791 section 3.1).

    An option's length counts its type and length octets; what follows EOL is padding and not listed.
    """
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return None
    offset, end = 20, (packet[0] & 15) << 2
    if not 20 <= end <= len(packet):
        return None
    options: list[Part] = []
    while offset < end:
        kind = packet[offset]
        length = 1
        if kind > NOP:
            if offset + 2 > end:
                return None
            length = packet[offset + 1]
            if length < 2 or offset + length > end:
                return None
        options.append(Part(kind, offset, length))
        if kind == EOL:
            break
        offset += length
    return options


def final_destination(packet: Buffer, view: PacketView) -> bytes:
    """Where a loaded packet is bound for in the end: the address that transport checksums cover (RFC 8200, 8.1).

    That is the last address of a routing header whose segments are not used up (types 0 and 2, and the segment routing
    header of RFC 8754, which lists its segments backwards), in IPv4 the last address of an unfinished source route.
    """
    if view.version == 4:
        if view.header_length > 20:
            for kind, offset, length in iter_ipv4_options(packet) or ():
                if kind in {131, 137} and length >= 7 and packet[offset + 2] <= length - 3:
                    return bytes(packet[offset + length - 4 : offset + length])
        return view.dst
    if view.header_length > 40:
        for kind, offset, length in iter_ipv6_headers(packet) or ():
            if kind == ROUTING and packet[offset + 3] and length >= 24:
                if packet[offset + 2] == 4:
                    return bytes(packet[offset + 8 : offset + 24])
                if packet[offset + 2] in {0, 2}:
                    start = offset + 8 + (length - 24 & ~15)
                    return bytes(packet[start : start + 16])
    return view.dst
