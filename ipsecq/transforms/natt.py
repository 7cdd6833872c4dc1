"""UDP encapsulation of ESP (RFC 3948): the UDP header, what arrives on port 4500, checksums in transport mode."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, Protocol

from ipsecq.numbers import IPPROTO_TCP, IPPROTO_UDP, NATT_PORT
from ipsecq.packet import checksum
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView

HEADER_LENGTH: Final = 8
"""Octets of the UDP header."""

KEEPALIVE: Final = b"\xff"
"""RFC 3948 section 2.3."""

NON_ESP_MARKER: Final = bytes(4)
"""What IKE puts where ESP has its SPI (RFC 3948 section 2.2)."""

_pack_udp: Final = struct.Struct(">HHHH").pack


class UdpPorts(Protocol):
    """Ports in host order; :class:`ipsecq.sa.association.NatTraversal` is one."""

    @property
    def sport(self) -> int: ...  # noqa: D102
    @property
    def dport(self) -> int: ...  # noqa: D102


class OriginalAddresses(Protocol):
    """What IKE found out about the addresses on the far side of the NAT (NAT-OA, RFC 3947 section 5.2); packed."""

    @property
    def original_src(self) -> bytes | None: ...  # noqa: D102
    @property
    def original_dst(self) -> bytes | None: ...  # noqa: D102


class Kind(IntEnum):
    """What a UDP payload on the NAT-T port is."""

    INVALID = 0
    KEEPALIVE = 1
    IKE = 2
    ESP = 3


def classify(payload: Buffer) -> Kind:
    """Tell keepalive, IKE (after the non-ESP marker) and ESP apart, by the payload of UDP (RFC 3948 section 2)."""
    if len(payload) == 1 and payload[0] == 0xFF:
        return Kind.KEEPALIVE
    if len(payload) < HEADER_LENGTH:  # neither an ESP header nor the marker and something behind it
        return Kind.INVALID
    return Kind.IKE if payload[:4] == NON_ESP_MARKER else Kind.ESP


def esp_offset(packet: Buffer, view: PacketView, ports: frozenset[int] = frozenset((NATT_PORT,))) -> int:
    """Where ESP starts in a UDP datagram that ``view`` has loaded: -1 for a keepalive, 0 for anything else.

    ``ports`` are the destination ports on which ESP may arrive.  UDP's checksum does not matter: ESP has a better one.
    """
    if view.dport not in ports or view.is_fragment:
        return 0
    offset = view.offset + HEADER_LENGTH
    if int.from_bytes(packet[view.offset + 4 : view.offset + 6], "big") != view.length - view.offset:
        return 0
    kind = classify(packet[offset : min(view.length, offset + HEADER_LENGTH)])
    if kind is Kind.ESP:
        return offset
    return -1 if kind is Kind.KEEPALIVE else 0


def header(sport: int, dport: int, length: int) -> bytes:
    """The UDP header for a datagram of ``length`` octets (header included), with checksum 0."""
    return _pack_udp(sport, dport, length, 0)


def wrap(prefix: Buffer, ports: UdpPorts, length: int) -> bytes:
    """``prefix`` (the IP header) and a UDP header with checksum 0; ``length`` counts UDP header and ESP.

    RFC 3948 section 2.1 wants checksum 0 in IPv4; in IPv6 :func:`finish` fills it in.
    """
    return b"".join((prefix, _pack_udp(ports.sport, ports.dport, length, 0)))


def keepalive(ports: UdpPorts) -> bytes:
    """The UDP datagram of a NAT keepalive, for IPv4 (RFC 3948 section 2.3)."""
    return _pack_udp(ports.sport, ports.dport, HEADER_LENGTH + 1, 0) + KEEPALIVE


def finish(datagram: Buffer) -> bytes:
    """An IPv6 datagram with UDP's checksum filled in.

    RFC 6935 would let a tunnel send 0, but only to a receiver that was told; Linux computes it, and so do we.
    """
    if datagram[6] != IPPROTO_UDP:
        return checksum.complete(datagram)
    filled = bytearray(datagram)
    with memoryview(filled) as octets:
        value = checksum.transport(bytes(octets[8:24]), bytes(octets[24:40]), IPPROTO_UDP, octets[40:])
    filled[46:48] = (value or 0xFFFF).to_bytes(2, "big")
    return bytes(filled)


_FIELD: Final = {IPPROTO_TCP: (16, 20), IPPROTO_UDP: (6, 8)}
"""By protocol: where the checksum is, and the least octets of a segment."""


def fix_checksum(packet: Buffer, view: PacketView, original: OriginalAddresses, policy: int) -> Buffer:
    """A datagram out of transport mode with a TCP or UDP checksum that fits the addresses that it arrived with.

    The sender summed the addresses on its side of the NAT; ``view`` has loaded ``packet``, all transforms off.
    ``policy`` is ``natt_cksum_policy`` of ipsec(4).  0: incremental (RFC 1624) when an original address is known, so
    that an error stays an error; else the checksum is ignored: ESP vouches for the octets, and what goes on to the
    kernel gets UDP checksum 0 (IPv4), or the right one where the kernel would look at it.  Not 0: always computed
    anew.
    """
    where = _FIELD.get(view.protocol)
    if where is None or view.is_fragment or view.length - view.offset < where[1]:
        return packet
    at = view.offset + where[0]
    udp = view.protocol == IPPROTO_UDP
    old = packet[at] << 8 | packet[at + 1]
    if udp and not old and view.version == 4:
        return packet
    known = original.original_src is not None or original.original_dst is not None
    if not policy and known:
        before = (original.original_src or view.src) + (original.original_dst or view.dst)
        new = checksum.update(old, before, view.src + view.dst)
        if udp and not new:
            new = 0xFFFF
    elif not policy and udp and view.version == 4:
        new = 0
    else:
        return checksum.complete(packet, view)
    return b"".join((packet[:at], new.to_bytes(2, "big"), packet[at + 2 :]))
