# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""Opened packets that follow one another put together, compiled: the rules are those of :mod:`ipsecq.packet.rows`."""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython.cimports.ipsecq.compiled.octets import folded, get16, get32, native, put16, put_checksum, words
from cython.cimports.libc.stdint import uint16_t, uint32_t
from cython.cimports.libc.string import memcmp, memcpy

from ipsecq.packet.coalesce import MAX_LENGTH as _MAX_LENGTH
from ipsecq.packet.coalesce import MIN_SEGMENT as _MIN_SEGMENT
from ipsecq.packet.coalesce import Run
from ipsecq.packet.rows import MAX_DATAGRAMS as _MAX_DATAGRAMS
from ipsecq.packet.rows import Piece

MAX_LENGTH = cython.declare(cython.Py_ssize_t, _MAX_LENGTH)
MIN_SEGMENT = cython.declare(cython.Py_ssize_t, _MIN_SEGMENT)
MAX_DATAGRAMS = cython.declare(cython.Py_ssize_t, _MAX_DATAGRAMS)
TCP = cython.declare(cython.int, 6)
UDP = cython.declare(cython.int, 17)

@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def may_begin(at: cython.p_uchar, length: cython.Py_ssize_t, shape: cython.pointer(Shape)) -> cython.bint:
    """The shape of runs that a packet of ``length`` octets may begin; False: it stays alone."""
    protocol: cython.int
    if length < 40:
        return False
    if at[0] == 0x45:
        shape.offset, protocol, shape.numbered = 20, at[9], not at[6] & 0x40
        if get16(at + 2) != length or get16(at + 6) & 0x3FFF:
            return False
    elif at[0] >> 4 == 6 and length >= 60:
        shape.offset, protocol, shape.numbered = 40, at[6], False
        if get16(at + 4) != length - 40:
            return False
    else:
        return False
    shape.tcp = protocol == TCP
    if shape.tcp:
        shape.header = shape.offset + (at[shape.offset + 12] >> 4) * 4
        # Only ACK, and with it PSH or ECE.
        return not (
            shape.header < shape.offset + 20
            or length - shape.header < MIN_SEGMENT
            or at[shape.offset + 13] & 0xB7 != 0x10
        )
    shape.header = shape.offset + 8
    return protocol == UDP and length > shape.header and get16(at + shape.offset + 4) == length - shape.offset


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def follows(
    one: cython.p_uchar, two: cython.p_uchar, shape: cython.pointer(Shape), size: cython.Py_ssize_t
) -> cython.bint:
    """Whether ``two`` is what comes behind ``one``, which has ``size`` octets of data; lengths are not looked at."""
    offset: cython.Py_ssize_t = shape.offset
    a: cython.p_uchar = one + offset
    b: cython.p_uchar = two + offset
    if offset == 20:
        if (
            one[0] != two[0]
            or one[1] != two[1]
            or memcmp(one + 6, two + 6, 4) != 0
            or memcmp(one + 12, two + 12, 8) != 0
            or (shape.numbered and get16(two + 4) != (get16(one + 4) + 1 & 0xFFFF))
        ):
            return False
    elif memcmp(one, two, 4) != 0 or memcmp(one + 6, two + 6, 34) != 0:
        return False
    if not shape.tcp:
        return memcmp(a, b, 4) == 0
    return (
        memcmp(a, b, 4) == 0
        and get32(b + 4) == cython.cast(uint32_t, get32(a + 4) + size)
        and memcmp(a + 8, b + 8, 5) == 0
        and not a[13] & 8
        and (a[13] ^ b[13]) & 0xF7 == 0
        and memcmp(a + 14, b + 14, 2) == 0
        and memcmp(a + 18, b + 18, shape.header - offset - 18) == 0
    )


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def is_long(at: cython.p_uchar, length: cython.Py_ssize_t, shape: cython.pointer(Shape)) -> cython.bint:
    """Whether a packet says of itself that it is ``length`` octets long."""
    if (get16(at + 2) if shape.offset == 20 else get16(at + 4) + 40) != length:
        return False
    return shape.tcp or get16(at + shape.offset + 4) == length - shape.offset


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _pseudo(at: cython.p_uchar, offset: cython.Py_ssize_t, tcp: cython.bint, length: cython.Py_ssize_t) -> uint32_t:
    """The pseudo header's sum for ``length`` octets of TCP or UDP, in native order."""
    addresses: uint32_t = folded(words(at + 12, 8) if offset == 20 else words(at + 8, 32))
    return addresses + native(cython.cast(uint32_t, ((TCP if tcp else UDP) + length) % 65535))


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def is_right(at: cython.p_uchar, length: cython.Py_ssize_t, shape: cython.pointer(Shape)) -> cython.bint:
    """Whether all checksums of a packet are right; a UDP datagram without one has no right one."""
    offset: cython.Py_ssize_t = shape.offset
    if offset == 20 and folded(words(at, 20)) != 0xFFFF:
        return False
    if not shape.tcp and get16(at + offset + 6) == 0:
        return False
    return folded(words(at + offset, length - offset) + _pseudo(at, offset, shape.tcp, length - offset)) == 0xFFFF


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def write_head(
    at: cython.p_uchar, shape: cython.pointer(Shape), total: cython.Py_ssize_t, pushed: cython.uchar
) -> cython.void:
    """Make a segment's headers those of a super-packet of ``total`` octets, its checksum as a virtio header wants it."""
    offset: cython.Py_ssize_t = shape.offset
    field: cython.p_uchar = at + offset + (16 if shape.tcp else 6)
    sum16: uint16_t = cython.cast(uint16_t, folded(_pseudo(at, offset, shape.tcp, total - offset)))
    if shape.tcp:
        at[offset + 13] |= pushed
    else:
        put16(at + offset + 4, cython.cast(uint32_t, total - offset))
    memcpy(field, cython.address(sum16), 2)
    if offset == 20:
        put16(at + 2, cython.cast(uint32_t, total))
        put16(at + 10, 0)
        put_checksum(at + 10, words(at, 20), False)
    else:
        put16(at + 4, cython.cast(uint32_t, total - 40))


@cython.cfunc
def _join(
    packets: list, start: cython.Py_ssize_t, end: cython.Py_ssize_t, length: cython.Py_ssize_t, tail: bytes,
    shape: cython.pointer(Shape),
):  # fmt: skip
    """Packets ``start`` to ``end`` (excluded) and ``tail`` (which may be empty) as one."""
    header: cython.Py_ssize_t = shape.header
    size: cython.Py_ssize_t = length - header
    rest: cython.Py_ssize_t = max(PyBytes_GET_SIZE(tail) - header, 0)
    count: cython.Py_ssize_t = end - start
    index: cython.Py_ssize_t
    data: bytes = PyBytes_FromStringAndSize(cython.NULL, count * size + rest)
    into: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(data))
    at: cython.p_uchar = cython.NULL
    for index in range(start, end):
        at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(packets[index]))
        memcpy(into, at + header, size)
        into += size
    if rest:
        at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(tail))
        memcpy(into, at + header, rest)
        count += 1
    pushed: cython.uchar = at[shape.offset + 13] & 8 if shape.tcp else 0
    at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(packets[start]))
    head: bytes = PyBytes_FromStringAndSize(cython.cast(cython.p_char, at), header)
    total: cython.Py_ssize_t = header + (end - start) * size + rest
    write_head(cython.cast(cython.p_uchar, PyBytes_AS_STRING(head)), shape, total, pushed)
    version: cython.int = 4 if shape.offset == 20 else 6
    return Run([head, data], size, header, shape.offset, version, TCP if shape.tcp else UDP, count)


def unite(packets: list, length: cython.Py_ssize_t, tail: bytes = b"") -> list:
    """See :func:`ipsecq.packet.rows.unite`."""
    shape: Shape
    count: cython.Py_ssize_t = len(packets)
    index: cython.Py_ssize_t
    end: cython.Py_ssize_t
    start: cython.Py_ssize_t = 0
    size: cython.Py_ssize_t
    most: cython.Py_ssize_t
    good: cython.bint
    at: cython.p_uchar
    pieces: list = []
    for packet in packets:
        if not isinstance(packet, bytes) or PyBytes_GET_SIZE(packet) < length:
            raise ValueError("packets of bytes that are long enough, please")
    while start < count:
        at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(packets[start]))
        if not may_begin(at, length, cython.address(shape)):
            pieces.append(Piece(start, start + 1, None))
            start += 1
            continue
        size = length - shape.header
        most = (MAX_LENGTH - shape.header) // size
        if not shape.tcp:
            most = min(most, MAX_DATAGRAMS)
        good = is_right(at, length, cython.address(shape))
        end = start + 1
        while end < count and end - start < most:
            following: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(packets[end]))
            if not is_long(following, length, cython.address(shape)) or not follows(
                at, following, cython.address(shape), size
            ):
                break
            good = good and is_right(following, length, cython.address(shape))
            at = following
            end += 1
        run = None
        if good and end - start > 1:
            last: bytes = b""
            if end == count and end - start < most and _ends(at, tail, size, cython.address(shape), end - start):
                last = tail
            run = _join(packets, start, end, length, last, cython.address(shape))
            if last:
                pieces.append(Piece(start, end + 1, run))
                break
        pieces.append(Piece(start, end, run))
        start = end
    return pieces


@cython.cfunc
def _ends(
    before: cython.p_uchar, tail: bytes, size: cython.Py_ssize_t, shape: cython.pointer(Shape), count: cython.Py_ssize_t
) -> cython.bint:
    """Whether ``tail``, perhaps shorter, belongs behind ``count`` packets, of which ``before`` is the last."""
    length: cython.Py_ssize_t = PyBytes_GET_SIZE(tail)
    data: cython.Py_ssize_t = length - shape.header
    at: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(tail))
    if data < 1 or data > size or shape.header + count * size + data > MAX_LENGTH:
        return False
    return is_long(at, length, shape) and follows(before, at, shape, size) and is_right(at, length, shape)
