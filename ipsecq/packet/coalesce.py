"""Putting TCP segments together again (GRO), so that the kernel takes a run of them as one packet.

Only what :func:`ipsecq.packet.segments.split` would cut into the very same segments is put together; the rules are
those of Linux's ``net/ipv4/tcp_offload.c``.  A run whose checksums are not all right is left in pieces: the kernel
would give the damaged octets a right one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

import numpy as np

from ipsecq.numbers import IP_MAXPACKET
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.checksum import ones_complement

MIN_SEGMENT: Final = 64
"""Octets of data below which a run is not worth its head."""

_NUMPY_FROM: Final = 6
"""Segments from which one sum over all of them as an array is faster than a sum of each."""

_LITTLE: Final = sys.byteorder == "little"
_U16: Final = Struct(">H")
_IPV4: Final = Struct(">HHH")  # total length, identification, flags and fragment offset
_TCP: Final = Struct(">4xI4xBB")  # sequence number, data offset, flags
_PSH: Final = 0x08
_ACK: Final = 0x10
_ECE: Final = 0x40


def _mask(offset: int, header: int) -> int:
    """The bits of a header, as one big integer, that must be equal in all segments of a run."""
    bits = bytearray(b"\xff" * header)
    for start, end in ((2, 6), (10, 12)) if offset == 20 else ((4, 6),):
        bits[start:end] = bytes(end - start)
    bits[offset + 4 : offset + 8] = bytes(4)
    bits[offset + 13] = 0xFF & ~_PSH
    bits[offset + 16 : offset + 18] = bytes(2)
    return int.from_bytes(bits, "big")


_MASKS: Final = {
    offset << 8 | header: _mask(offset, header) for offset in (20, 40) for header in range(offset + 20, offset + 61, 4)
}


class Run(NamedTuple):
    """One packet for the kernel: what a virtio_net_hdr and its packet are made of.

    ``size`` is 0 for a packet that came alone: ``parts`` is it, as it was.  Else ``parts`` joined are a TCP
    super-packet whose segments carry ``size`` octets of data each (the last maybe fewer), with the headers whole in the
    first part; the TCP checksum field holds the pseudo header's sum, not complemented.  ``offset`` is that of the TCP
    header, ``header`` that of the data.
    """

    parts: list[Buffer]
    size: int
    header: int
    offset: int
    version: int
    protocol: int = 6
    """TCP, or UDP: datagrams of ``size`` octets each (:mod:`ipsecq.packet.rows`)."""
    number: int = 1
    """Packets that were put together."""


class _Open:
    """A run that may still grow."""

    __slots__ = ("header", "identification", "length", "offset", "packets", "pushed", "sequence", "signature", "size")

    def __init__(
        self, packet: Buffer, offset: int, header: int, length: int, signature: int, sequence: int, identification: int
    ) -> None:
        self.packets = [packet]
        self.offset = offset
        self.header = header
        self.length = length
        self.signature = signature
        self.size = length - header
        self.sequence = sequence + self.size & 0xFFFFFFFF
        self.identification = identification
        self.pushed = 0


def coalesce(packets: Sequence[Buffer]) -> list[Run]:
    """The packets, TCP segments of one flow that follow one another put together where nothing is lost by it.

    Joined are segments with equal headers (addresses, TOS, TTL, DF, flow label, ACK, window, options with time stamps)
    that carry data in sequence, all of one size but the last; PSH ends a run; IPv4 options, IPv6 extension headers,
    fragments, and any flag but ACK, PSH and ECE keep a packet alone.  IPv4 identifications must count up where DF is
    not set (RFC 6864).  The packets of one flow stay in their order; those of different flows may pass one another.
    """
    result: list[Run] = []
    for place in _collect(packets):
        if not isinstance(place, _Open):
            result.append(Run([place], 0, 0, 0, 0))
        elif len(place.packets) == 1 or not _verify(place):
            result.extend(Run([packet], 0, 0, 0, 0) for packet in place.packets)
        else:
            result.append(_join(place))
    return result


def _collect(packets: Sequence[Buffer]) -> list[Buffer | _Open]:
    """Runs and lone packets, in the order of their first packets; the runs' checksums are not verified yet.

    One pass, no call a packet: about a microsecond each.
    """
    places: list[Buffer | _Open] = []
    flows: dict[bytes, _Open] = {}  # the run of each flow that its next segment may join
    for packet in packets:
        size = len(packet)
        if size < 40:
            places.append(packet)
            continue
        first = packet[0]
        identification = word = 0
        if first == 0x45 and packet[9] == 6:
            length, identification, word = _IPV4.unpack_from(packet, 2)
            offset, flow = 20, bytes(packet[12:24])  # addresses and ports
        elif first >> 4 == 6 and packet[6] == 6 and size >= 60:
            length = 40 + (packet[4] << 8 | packet[5])
            offset, flow = 40, bytes(packet[8:44])
        else:
            places.append(packet)
            continue
        sequence, words, flags = _TCP.unpack_from(packet, offset)
        header = offset + (words >> 4 << 2)
        data = length - header
        if (
            word & 0x3FFF  # a fragment
            or length > size
            or header < offset + 20
            or data < 1
            or flags & ~(_PSH | _ECE) != _ACK
            # A wrong header checksum must stay wrong.
            or (offset == 20 and int.from_bytes(packet[:20], "big") % 65535)
        ):
            flows.pop(flow, None)
            places.append(packet)
            continue

        signature = int.from_bytes(packet[:header], "big") & _MASKS[offset << 8 | header]
        run = flows.get(flow)
        if (
            run is not None
            and run.signature == signature
            and run.sequence == sequence
            and data <= run.size
            and run.length + data <= IP_MAXPACKET
            and (offset == 40 or word & 0x4000 or identification == run.identification + len(run.packets) & 0xFFFF)
        ):
            run.packets.append(packet)
            run.length += data
            run.sequence = sequence + data & 0xFFFFFFFF
        elif data < MIN_SEGMENT:
            flows.pop(flow, None)
            places.append(packet)
            continue
        else:
            run = flows[flow] = _Open(packet, offset, header, length, signature, sequence, identification)
            places.append(run)
        if flags & _PSH or data < run.size:
            run.pushed = flags & _PSH
            del flows[flow]
    return places


def _pseudo(run: _Open, length: int) -> int:
    """The pseudo header of a segment of ``length`` octets, as a number whose 16-bit words are to be summed."""
    packet = run.packets[0]
    addresses = packet[12:20] if run.offset == 20 else packet[8:40]
    return int.from_bytes(addresses, "big") + 6 + length


def _verify(run: _Open) -> bool:
    """Whether the TCP checksums of all segments are right.

    Whole packets are summed, as they lie there: a good IPv4 header's sum is zero, an IPv6 header's is taken off again.
    """
    packets, header, offset = run.packets, run.header, run.offset
    last = run.length - (len(packets) - 1) * run.size
    size = header + run.size
    if ones_complement(packets[-1][offset:last], _pseudo(run, last - offset)) != 0xFFFF:
        return False
    full = [packet if len(packet) == size else packet[:size] for packet in packets[:-1]]
    pseudo = _pseudo(run, size - offset)
    if len(full) < _NUMPY_FROM or size & 1:
        return all(ones_complement(packet[offset:], pseudo) == 0xFFFF for packet in full)
    rest = pseudo - ones_complement(packets[0][:offset])
    rest %= 65535
    if _LITTLE:
        rest = (rest & 0xFF) << 8 | rest >> 8
    words = np.frombuffer(b"".join(full), np.uint16 if size & 3 else np.uint32)
    sums = words.reshape(len(full), -1).sum(axis=1, dtype=np.uint64)
    return not ((sums + np.uint64(rest)) % np.uint64(65535)).any()


def _join(run: _Open) -> Run:
    packets, header, offset, size = run.packets, run.header, run.offset, run.size
    head = bytearray(packets[0][:header])
    head[offset + 13] |= run.pushed
    _U16.pack_into(head, offset + 16, ones_complement(b"", _pseudo(run, run.length - offset)))
    if offset == 20:
        _U16.pack_into(head, 2, run.length)
        head[10:12] = b"\0\0"
        _U16.pack_into(head, 10, 0xFFFF - ones_complement(head[:20]))
    else:
        _U16.pack_into(head, 4, run.length - 40)
    last = run.length - (len(packets) - 1) * size
    parts: list[Buffer] = [bytes(head)]
    parts.extend(memoryview(packet)[header : header + size] for packet in packets[:-1])
    parts.append(memoryview(packets[-1])[header:last])
    return Run(parts, size, header, offset, 4 if offset == 20 else 6, 6, len(packets))
