# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""Which opened packets are one packet for the kernel: the rules of :mod:`ipsecq.packet.rows`, a packet at a time."""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.ipsecq.compiled.octets import folded, get16, get32, native, put16, put_checksum, words
from cython.cimports.libc.stdint import uint16_t, uint32_t
from cython.cimports.libc.string import memcmp, memcpy

from ipsecq.packet.coalesce import MIN_SEGMENT as _MIN_SEGMENT

MIN_SEGMENT = cython.declare(cython.Py_ssize_t, _MIN_SEGMENT)
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
