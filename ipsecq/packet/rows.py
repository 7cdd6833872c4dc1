"""Packets of one length as rows of an array: which of them follow one another, and what they are as one packet.

The same rules as :mod:`ipsecq.packet.coalesce`, for all packets at once and for UDP, too (Linux:
``net/ipv4/udp_offload.c``): a run of datagrams of one flow and one size enters the kernel as one packet, which it takes
apart again where it has to.
"""

from __future__ import annotations

import sys
from struct import Struct
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ipsecq.numbers import IP_MAXPACKET
from ipsecq.packet.checksum import ones_complement
from ipsecq.packet.coalesce import MIN_SEGMENT, Run

MIN_ROWS: Final = 3
"""Packets below which an array costs more than it saves."""

MAX_DATAGRAMS: Final = 64
"""Datagrams in one UDP super-packet (UDP_MAX_SEGMENTS before Linux 6.9)."""

TCP: Final = 6
UDP: Final = 17
_PSH: Final = 0x08
_ACK: Final = 0x10
_ECE: Final = 0x40
_DF: Final = 0x40

_LITTLE: Final = sys.byteorder == "little"
_U16: Final = Struct(">H")
_u16: Final = _U16.unpack_from
_u32: Final = Struct(">I").unpack_from


class _Shape(NamedTuple):
    """Where things are in all packets of a run."""

    offset: int
    """Of the TCP or UDP header."""
    header: int
    """Octets up to the data."""
    protocol: int
    numbered: bool
    """IPv4 identifications have to count up: no DF."""


class Piece(NamedTuple):
    """Neighbours ``first`` to ``end`` (excluded); ``run`` is what they are as one packet, None: they stay alone."""

    first: int
    end: int
    run: Run | None


_masks: dict[tuple[int, int, int], tuple[npt.NDArray[np.uint8], int]] = {}


def _mask(offset: int, header: int, protocol: int) -> tuple[npt.NDArray[np.uint8], int]:
    """The bits of a header that must be equal in a run, as an array; and as an integer, the lengths left out."""
    found = _masks.get((offset, header, protocol))
    if found is None:
        bits = bytearray(b"\xff" * header)
        lengths = [(2, 4)] if offset == 20 else [(4, 6)]
        if offset == 20:
            bits[4:6] = bits[10:12] = bytes(2)
        if protocol == TCP:
            bits[offset + 4 : offset + 8] = bytes(4)
            bits[offset + 13] = 0xFF & ~_PSH
            bits[offset + 16 : offset + 18] = bytes(2)
        else:
            bits[offset + 6 : offset + 8] = bytes(2)
            lengths.append((offset + 4, offset + 6))
        array = np.frombuffer(bytes(bits), np.uint8)
        for start, end in lengths:
            bits[start:end] = bytes(2)
        found = _masks[offset, header, protocol] = array, int.from_bytes(bits, "big")
    return found


def _shape(packet: bytes, length: int) -> _Shape | None:
    """The shape of runs that ``packet`` may begin, whose IP packet has ``length`` octets; None: it stays alone."""
    if length < 40:
        return None
    first = packet[0]
    if first == 0x45:
        offset, protocol, numbered = 20, packet[9], not packet[6] & _DF
        if _u16(packet, 2)[0] != length or _u16(packet, 6)[0] & 0x3FFF:
            return None
    elif first >> 4 == 6 and length >= 60:
        offset, protocol, numbered = 40, packet[6], False
        if _u16(packet, 4)[0] != length - 40:
            return None
    else:
        return None
    if protocol == TCP:
        header = offset + (packet[offset + 12] >> 4 << 2)
        if header < offset + 20 or length - header < MIN_SEGMENT or packet[offset + 13] & ~(_PSH | _ECE) != _ACK:
            return None
    elif protocol == UDP:
        header = offset + 8
        if length <= header or _u16(packet, offset + 4)[0] != length - offset:
            return None
    else:
        return None
    return _Shape(offset, header, protocol, numbered)


def unite(packets: list[bytes], length: int, tail: bytes = b"") -> list[Piece]:
    """Pieces that cover ``packets``, all equally long, in order; their IP packets are their first ``length`` octets.

    ``tail`` is a shorter packet that came after them; where it joins, the last piece ends one behind the last packet.
    Whatever joins has right checksums.
    """
    count, width = len(packets), len(packets[0])
    shape = _shape(packets[0], length) if count >= MIN_ROWS and not width & 3 else None
    if shape is None:
        return [Piece(0, count, None)]
    rows: npt.NDArray[np.uint8] = np.frombuffer(b"".join(packets), np.uint8).reshape(count, width)
    offset, header, protocol, numbered = shape
    size = length - header
    heads = rows[:, :header]
    changes = ((heads[1:] ^ heads[:-1]) & _mask(offset, header, protocol)[0]).any(axis=1)
    if protocol == TCP:
        sequences = rows.view(">u4")[:, offset + 4 >> 2].astype(np.uint32)
        changes |= sequences[1:] - sequences[:-1] != size
        changes |= rows[:-1, offset + 13] & _PSH != 0
    if numbered:
        identifications = rows.view(">u2")[:, 2].astype(np.uint16)
        changes |= identifications[1:] - identifications[:-1] != 1
    most = (IP_MAXPACKET - header) // size
    if protocol == UDP:
        most = min(most, MAX_DATAGRAMS)
    sums: npt.NDArray[np.uint64] = rows.view(np.uint32).sum(axis=1, dtype=np.uint64)
    wrong = _wrong(rows, offset, protocol)
    pieces: list[Piece] = []
    start = 0
    for change in [*(np.flatnonzero(changes) + 1).tolist(), count]:
        end: int = change
        stretch = shape if not start else _shape(packets[start], length)
        if stretch is None or stretch != shape:
            pieces.append(Piece(start, end, None))
            start = end
        while start < end:
            stop = min(start + most, end)
            run = None
            if stop - start > 1 and (wrong is None or not wrong[start:stop].any()):
                run = _join(packets, rows, sums, start, stop, length, shape)
            pieces.append(Piece(start, stop, run))
            start = stop
    last = pieces[-1]
    if tail and last.run is not None and last.end - last.first < most:
        longer = _append(last.run, packets[last.first], packets[last.end - 1], tail, shape, last.end - last.first)
        if longer is not None:
            pieces[-1] = Piece(last.first, count + 1, longer)
    return pieces


def _wrong(rows: npt.NDArray[np.uint8], offset: int, protocol: int) -> npt.NDArray[np.bool_] | None:
    """Rows whose IPv4 header sum is wrong, or that have no UDP checksum; None when all are well."""
    words = rows.view(np.uint16)
    wrong: npt.NDArray[np.bool_] | None = None
    if offset == 20:
        wrong = words[:, :10].sum(axis=1, dtype=np.uint32) % np.uint32(65535) != 0
    if protocol == UDP:
        missing = words[:, offset + 6 >> 1] == 0
        wrong = missing if wrong is None else wrong | missing
    return wrong if wrong is not None and wrong.any() else None


def _pseudo(head: bytes, offset: int, protocol: int, length: int) -> int:
    """The pseudo header of ``length`` octets of TCP or UDP as a number whose 16-bit words are to be summed."""
    return int.from_bytes(head[12:20] if offset == 20 else head[8:40], "big") + protocol + length


def _join(
    packets: list[bytes], rows: npt.NDArray[np.uint8], sums: npt.NDArray[np.uint64], start: int, end: int, length: int,
    shape: _Shape,
) -> Run | None:  # fmt: skip
    """Rows that follow one another as one packet; None when a checksum is wrong."""
    offset, header, protocol, _ = shape
    first = packets[start]
    rest = _pseudo(first, offset, protocol, length - offset) - int.from_bytes(first[length:], "big")
    if offset == 40:
        rest -= int.from_bytes(first[:40], "big")
    rest %= 65535
    if _LITTLE:
        rest = (rest & 0xFF) << 8 | rest >> 8
    if ((sums[start:end] + np.uint64(rest)) % np.uint64(65535)).any():
        return None
    size = length - header
    pushed = packets[end - 1][offset + 13] & _PSH if protocol == TCP else 0
    total = header + (end - start) * size
    head = _head(first[:header], shape, total, pushed)
    data = rows[start:end, header:length].tobytes()
    return Run([head, data], size, header, offset, 4 if offset == 20 else 6, protocol, end - start)


def _head(head: bytes, shape: _Shape, total: int, pushed: int) -> bytes:
    """The headers of a super-packet of ``total`` octets."""
    offset, _, protocol, _ = shape
    changed = bytearray(head)
    field = offset + (16 if protocol == TCP else 6)
    if protocol == TCP:
        changed[offset + 13] |= pushed
    else:
        _U16.pack_into(changed, offset + 4, total - offset)
    _U16.pack_into(changed, field, ones_complement(b"", _pseudo(head, offset, protocol, total - offset)))
    if offset == 20:
        _U16.pack_into(changed, 2, total)
        changed[10:12] = b"\0\0"
        _U16.pack_into(changed, 10, 0xFFFF - ones_complement(changed[:20]))
    else:
        _U16.pack_into(changed, 4, total - 40)
    return bytes(changed)


def _append(run: Run, first: bytes, before: bytes, tail: bytes, shape: _Shape, count: int) -> Run | None:
    """The run with a shorter last packet behind it, where that belongs there; ``before`` is the one before it."""
    offset, header, protocol, numbered = shape
    length, data = len(tail), len(tail) - header
    if data < 1 or data > run.size or (protocol == TCP and before[offset + 13] & _PSH):
        return None
    mask = _mask(offset, header, protocol)[1]
    if (int.from_bytes(tail[:header], "big") ^ int.from_bytes(first[:header], "big")) & mask:
        return None
    if _u16(tail, 2)[0] != length if offset == 20 else _u16(tail, 4)[0] != length - 40:
        return None
    if protocol == TCP:
        if _u32(tail, offset + 4)[0] != _u32(before, offset + 4)[0] + run.size & 0xFFFFFFFF:
            return None
    elif _u16(tail, offset + 4)[0] != length - offset or not _u16(tail, offset + 6)[0]:
        return None
    if numbered and _u16(tail, 4)[0] != _u16(before, 4)[0] + 1 & 0xFFFF:
        return None
    if offset == 20 and int.from_bytes(tail[:20], "big") % 65535:
        return None
    if ones_complement(tail[offset:], _pseudo(tail, offset, protocol, length - offset)) != 0xFFFF:
        return None
    total = header + count * run.size + data
    if total > IP_MAXPACKET:
        return None
    head = _head(first[:header], shape, total, tail[offset + 13] & _PSH if protocol == TCP else 0)
    return Run([head, run.parts[1], tail[header:]], run.size, header, offset, run.version, protocol, count + 1)
