"""Segmentation in software: a TCP or UDP super-packet (GSO) to the packets that go onto a wire.

All segments are rows of one array, so that headers, identifications, sequence numbers and checksums of all of them
cost a fixed number of numpy operations; the work a segment is little more than the copy of its octets.
"""

from __future__ import annotations

import sys
from struct import Struct
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ipsecq.packet import checksum
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.extensions import final_destination
from ipsecq.packet.view import PacketView

TCP: Final = 6
UDP: Final = 17
FIN: Final = 0x01
SYN: Final = 0x02
PSH: Final = 0x08
CWR: Final = 0x80

_U16: Final = Struct(">H")
_U32: Final = Struct(">I")
_LITTLE: Final = sys.byteorder == "little"


def split(packet: Buffer, mss: int, view: PacketView | None = None) -> list[bytes]:
    """The packet as segments of at most ``mss`` octets of TCP or UDP data, in order, each with full checksums.

    Lengths, IPv4 identifications (counted up from the packet's) and sequence numbers are set; FIN and PSH are left to
    the last segment, CWR to the first (RFC 3168 section 6.1.2); all else is copied.  UDP data are cut into datagrams of
    their own (USO), not into fragments.  A packet whose data fit, a SYN, a fragment, or one of another protocol comes
    back alone, as :func:`ipsecq.packet.checksum.complete` leaves it; ``[]`` when it is malformed.
    ``view``: one that has loaded this packet, if the caller has it.
    """
    if view is None:
        view = PacketView()
        if not view.load(packet):
            return []
    laid = lay_out(packet, view, mss)
    if laid is None:
        return [checksum.complete(packet, view)]
    rows, count, size, last = laid
    width = rows.shape[1]
    whole = rows.tobytes()
    segments = [whole[start : start + size] for start in range(0, (count - 1) * width, width)]
    segments.append(whole[(count - 1) * width : (count - 1) * width + last])
    return segments


class Segments(NamedTuple):
    """Segments as rows of an array; what follows them in their rows is zero."""

    rows: npt.NDArray[np.uint8]
    number: int
    size: int
    """Octets of each segment but the last."""
    last: int
    """Octets of the last one."""


def lay_out(packet: Buffer, view: PacketView, mss: int, room: int = 0) -> Segments | None:
    """The segments of :func:`split` in one array, with ``room`` octets or more behind each for the caller's use.

    None for a packet that comes back alone.
    """
    header = _header_length(packet, view)
    data = view.length - header
    if not header or mss <= 0 or data <= mss:
        return None
    return _rows(packet, view, header, data, mss, room)


def _header_length(packet: Buffer, view: PacketView) -> int:
    """Octets before the data of a TCP segment or a UDP datagram; 0: not one, or one that lies about its length."""
    offset, room = view.offset, view.length - view.offset
    if view.is_fragment:
        return 0
    if view.protocol == TCP and room >= 20:
        header = packet[offset + 12] >> 4 << 2
        # A SYN takes a sequence number and no stack offloads one: not cut.
        return offset + header if 20 <= header <= room and not packet[offset + 13] & SYN else 0
    if view.protocol == UDP and room >= 8:
        return offset + 8
    return 0


def _rows(packet: Buffer, view: PacketView, header: int, data: int, mss: int, room: int) -> Segments:
    offset = view.offset
    count = -(-data // mss)
    last = data - (count - 1) * mss
    size = header + mss
    # Headers are multiples of four octets, so rows padded to such a multiple are whole 32-bit words.
    width = header + (mss + room + 3 & ~3)
    rows: npt.NDArray[np.uint8] = np.empty((count, width), np.uint8)
    rows[:, size:] = 0
    rows[-1, header + last :] = 0
    rows[:, :header] = np.frombuffer(packet, np.uint8, header)
    octets = np.frombuffer(packet, np.uint8, data, header)
    full = (count - 1) * mss
    rows[:-1, header:size] = octets[:full].reshape(count - 1, mss)
    rows[-1, header : header + last] = octets[full:]

    numbers = np.arange(count, dtype=np.uint32)
    big16 = rows.view(">u2")
    lengths = np.full(count, mss, np.uint32)
    lengths[-1] = last
    if view.protocol == TCP:
        field = offset + 16
        rows.view(">u4")[:, offset + 4 >> 2] = numbers * np.uint32(mss) + np.uint32(_sequence(packet, offset))
        _set_flags(rows, offset + 13, packet[offset + 13])
    else:
        field = offset + 6
        big16[:, offset + 4 >> 1] = lengths + np.uint32(8)
    big16[:, field >> 1] = 0
    if view.version == 4:
        big16[:, 1] = lengths + np.uint32(header)
        _number_ipv4(rows, view, numbers, lengths, header)
    else:
        big16[:, 2] = lengths + np.uint32(header - 40)

    # Sums are taken in native order, where nothing needs swapping but the pseudo header's share (see checksum.py).
    sums = rows.view(np.uint32)[:, offset >> 2 :].sum(axis=1, dtype=np.uint64)
    pseudo = int.from_bytes(view.src, "big") + int.from_bytes(final_destination(packet, view), "big") + view.protocol
    upper = header - offset
    sums[:-1] += _native(pseudo + upper + mss)
    sums[-1] += _native(pseudo + upper + last)
    values = (65535 - sums % 65535) % 65535
    if view.protocol == UDP:
        values[values == 0] = 0xFFFF
    rows.view(np.uint16)[:, field >> 1] = values
    return Segments(rows, count, size, header + last)


def _sequence(packet: Buffer, offset: int) -> int:
    return int(_U32.unpack_from(packet, offset + 4)[0])


def _set_flags(rows: npt.NDArray[np.uint8], at: int, flags: int) -> None:
    rows[:, at] = flags & ~(FIN | PSH | CWR)
    rows[0, at] = flags & ~(FIN | PSH)
    rows[-1, at] = flags & ~CWR


def _number_ipv4(
    rows: npt.NDArray[np.uint8],
    view: PacketView,
    numbers: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.uint32],
    header: int,
) -> None:
    """Identifications and header checksums: only identification and length differ between the rows' headers."""
    big16 = rows.view(">u2")
    identifications = numbers + np.uint32(view.identification) & np.uint32(0xFFFF)
    big16[:, 2] = identifications
    first = bytearray(rows[0, : view.header_length].tobytes())
    del first[10:12], first[2:6]
    rest = checksum.ones_complement(first)
    big16[:, 5] = (65535 - (identifications + lengths + np.uint32(rest + header)) % 65535) % 65535


def _native(total: int) -> int:
    """A sum of big-endian words as it is among native ones."""
    total %= 65535
    return (total & 0xFF) << 8 | total >> 8 if _LITTLE else total


def fill_checksums(octets: bytearray, width: int, view: PacketView) -> None:
    """Fill in the TCP or UDP checksums of equal packets, one every ``width`` octets (a multiple of four).

    Each is ``view.length`` octets long and has the addresses and lengths of the one that ``view`` has loaded, and headers
    without options or extensions; what follows it up to the next one is left alone.
    """
    rows: npt.NDArray[np.uint8] = np.frombuffer(octets, np.uint8).reshape(-1, width)
    offset, length = view.offset, view.length
    words = rows.view(np.uint16)
    field = offset + (16 if view.protocol == TCP else 6) >> 1
    words[:, field] = 0
    sums = words[:, offset >> 1 :].sum(axis=1, dtype=np.uint64)
    pseudo = int.from_bytes(view.src, "big") + int.from_bytes(view.dst, "big") + view.protocol + length - offset
    # The rows end on an even octet, so what follows the packet counts as the integer that it is.
    sums += np.uint64(_native(pseudo - int.from_bytes(octets[length:width], "big")))
    values = (65535 - sums % 65535) % 65535
    if view.protocol == UDP:
        values[values == 0] = 0xFFFF
    words[:, field] = values
