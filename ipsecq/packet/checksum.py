"""The Internet checksum (RFC 1071, RFC 1624) and the transport checksums that are made of it.

A sum of 16-bit words with end-around carry is a remainder modulo 65535, whatever the width of the words that were
added and whatever their byte order, if the result's two octets are swapped with it.  So short buffers are one big
integer and one ``%``, long ones are added by numpy as 32-bit words.  Measured: 64 octets 0.3 µs, 1400 1.5 µs, 64 KiB
5 µs.
"""

from __future__ import annotations

import sys
from struct import Struct
from typing import Final

import numpy as np

from ipsecq.packet.buffer import Buffer
from ipsecq.packet.extensions import final_destination
from ipsecq.packet.view import PacketView

_NUMPY_FROM: Final = 800
"""Octets from which numpy's fixed cost of a microsecond is less than the cost of one big integer."""

_LITTLE: Final = sys.byteorder == "little"
_U16: Final = Struct(">H")
_add = np.add.reduce

FIELD: Final = {1: 2, 6: 16, 17: 6, 58: 2}
"""Offset of the checksum in ICMP, TCP, UDP and ICMPv6."""

_MINIMUM: Final = {1: 8, 6: 20, 17: 8, 58: 4}


def ones_complement(buffer: Buffer, initial: int = 0) -> int:
    """The ones' complement sum, not inverted, of ``buffer`` as 16-bit words; an odd last octet is padded with zero.

    ``initial`` is a number to start from: another part's sum (that part had an even length), or any integer whose
    16-bit words are to be counted in.  The result is 0 for nothing but zeros, else 1 to 0xFFFF.
    """
    size = len(buffer)
    if size < _NUMPY_FROM:
        total = int.from_bytes(buffer, "big")
        if size & 1:
            total <<= 8
    else:
        words = size & ~3
        total = int(_add(np.frombuffer(buffer, np.uint32, words >> 2), None, np.uint64))
        total = total % 65535 or (total and 0xFFFF)
        if _LITTLE:
            total = (total & 0xFF) << 8 | total >> 8
        if words != size:
            total += int.from_bytes(bytes(buffer[words:]).ljust(4, b"\0"), "big")
    total += initial
    return total % 65535 or (total and 0xFFFF)


def transport(src: bytes, dst: bytes, protocol: int, segment: Buffer) -> int:
    """The checksum of ``segment`` (upper-layer header and data) with the pseudo header of its IP version.

    To fill the field, call with the field zero (and send UDP's 0 as 0xFFFF, RFC 768); a received segment is right
    when the result is 0.  Source: RFC 9293 section 3.1, RFC 8200 section 8.1; ICMPv4 has no pseudo header and is not
    for this function.
    """
    pseudo = int.from_bytes(src, "big") + int.from_bytes(dst, "big") + protocol + len(segment)
    return 0xFFFF - ones_complement(segment, pseudo)


def update(old: int, before: Buffer | int, after: Buffer | int) -> int:
    """The checksum ``old`` after ``before`` in the summed octets became ``after`` (RFC 1624, equation 3).

    Both are octet strings of even length that start at an even offset (an address, a word), or such strings' values
    as integers.  0xFFFF never comes out; send UDP's 0 as 0xFFFF.
    """
    was = before if isinstance(before, int) else int.from_bytes(before, "big")
    now = after if isinstance(after, int) else int.from_bytes(after, "big")
    return (old + was - now) % 65535


def complete(packet: Buffer, view: PacketView | None = None) -> bytes:
    """``packet`` with its TCP, UDP or ICMPv6 checksum computed afresh; octets behind the datagram are cut off.

    For packets whose sender left the checksum to a device.  Fragments, other protocols and segments too short for
    their header come back as they are.  ``view``: one that has loaded this packet, if the caller has it.
    """
    view = view or _view(packet)
    if view is None:
        return bytes(packet)
    protocol = view.protocol
    end = _segment_end(packet, view)
    if not end or protocol == 1:
        return bytes(packet[: view.length])
    filled = bytearray(packet[: view.length])
    field = view.offset + FIELD[protocol]
    filled[field : field + 2] = b"\0\0"
    with memoryview(filled) as octets:
        value = transport(view.src, final_destination(packet, view), protocol, octets[view.offset : end])
    _U16.pack_into(filled, field, value or (0xFFFF if protocol == 17 else 0))
    return bytes(filled)


def verify_transport(packet: Buffer, view: PacketView | None = None) -> bool:
    """False when a whole datagram's ICMP, TCP, UDP or ICMPv6 checksum is wrong or its header is cut short.

    True as well where there is nothing to verify: fragments, other protocols, UDP without a checksum in IPv4.
    """
    view = view or _view(packet)
    if view is None:
        return False
    protocol, offset = view.protocol, view.offset
    if view.is_fragment or protocol not in FIELD:
        return True
    end = _segment_end(packet, view)
    if not end:
        return False
    with memoryview(packet)[offset:end] as segment:
        if protocol == 1:
            return ones_complement(segment) == 0xFFFF
        if protocol == 17 and segment[6] == 0 == segment[7]:
            return view.version == 4
        return transport(view.src, final_destination(packet, view), protocol, segment) == 0


def _view(packet: Buffer) -> PacketView | None:
    view = PacketView()
    return view if view.load(packet) else None


def _segment_end(packet: Buffer, view: PacketView) -> int:
    """Where the summed octets end, or 0 when no checksum of ours belongs to this datagram."""
    protocol, offset = view.protocol, view.offset
    if view.is_fragment or protocol not in FIELD or view.length - offset < _MINIMUM[protocol]:
        return 0
    if protocol != 17:
        return view.length
    length = packet[offset + 4] << 8 | packet[offset + 5]
    return offset + length if 8 <= length <= view.length - offset else 0
