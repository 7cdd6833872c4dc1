"""What is the same for both IP versions to those who change a datagram's payload."""

from __future__ import annotations

from collections.abc import Iterable

from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.buffer import Buffer


def replace_payload(
    packet_header: Buffer, protocol: int, payload_parts: Iterable[Buffer], nexthdr_offset: int
) -> bytes:
    """The datagram of ``packet_header`` (IPv4 with options; IPv6 with extension headers) around the joined parts.

    Protocol or next header (the octet at ``nexthdr_offset``; ignored for IPv4), length and IPv4 checksum are set, all
    else stays.  b"" when the datagram would be too long for its version.  About 1 µs.
    """
    if packet_header[0] >> 4 == 4:
        return ipv4.replace_payload(packet_header, protocol, payload_parts)
    return ipv6.replace_payload(packet_header, protocol, payload_parts, nexthdr_offset)
