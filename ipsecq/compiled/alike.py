# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""Which of the packets in a batch can be taken in one go, compiled.

The rules are those of ``alike`` in :mod:`ipsecq.engine.inbound_run` and :mod:`ipsecq.engine.outbound_run`.
"""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.buffer import PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.ipsecq.compiled.octets import get16, get32
from cython.cimports.libc.stdint import int64_t, uint32_t
from cython.cimports.libc.string import memcmp, memcpy

Head = cython.declare(cython.Py_ssize_t, 64)
"""Octets in front of a packet that are looked at."""


def inbound(packets, version: cython.int, udp: cython.bint):
    """See :func:`ipsecq.engine.inbound_run.alike`."""
    first: cython.uchar[64]
    at: cython.p_uchar
    view: cython.Py_buffer
    header: cython.Py_ssize_t = 20 if version == 4 else 40
    esp: cython.Py_ssize_t = header + (8 if udp else 0)
    length: cython.Py_ssize_t
    size: cython.Py_ssize_t
    before: int64_t = -1
    number: uint32_t
    same: cython.bint
    members: list = []
    numbers: list = []
    for packet in packets:
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        at = cython.cast(cython.p_uchar, view.buf)
        size = view.len
        same = False
        length = number = 0
        if size >= esp + 8:
            if before < 0:
                memcpy(first, at, esp + 8)
            number = get32(at + esp + 4)
            if version == 4:
                length = get16(at + 2)
                same = (
                    memcmp(at, first, 2) == 0
                    and at[9] == first[9]
                    and memcmp(at + 12, first + 12, 8) == 0
                    and not get16(at + 6) & 0x3FFF
                )
            else:
                length = 40 + get16(at + 4)
                same = memcmp(at, first, 4) == 0 and at[6] == first[6] and memcmp(at + 8, first + 8, 32) == 0
            same = (
                same
                and esp + 8 <= length <= size
                and memcmp(at + esp, first + esp, 4) == 0
                and number > before
                and (not udp or (memcmp(at + header, first + header, 4) == 0 and get16(at + header + 4) == length - header))
            )
        PyBuffer_Release(cython.address(view))
        if not same:
            break
        before = number
        members.append(packet if size == length else memoryview(packet)[:length])
        numbers.append(number)
    return members, numbers


def outbound(packets, version: cython.int, protocol: cython.int, length: cython.Py_ssize_t) -> list:
    """See :func:`ipsecq.engine.outbound_run.alike`."""
    first: cython.uchar[64]
    at: cython.p_uchar
    view: cython.Py_buffer
    header: cython.Py_ssize_t = 20 if version == 4 else 40
    upper: cython.Py_ssize_t = 6 if protocol == 17 else 4
    same: cython.bint
    members: list = []
    if length < header + upper or length < header + 8:
        return members
    for packet in packets:
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        at = cython.cast(cython.p_uchar, view.buf)
        same = view.len >= length
        if same:
            if not members:
                memcpy(first, at, header + 8)
            if version == 4:
                same = (
                    memcmp(at, first, 4) == 0
                    and memcmp(at + 6, first + 6, 2) == 0
                    and at[9] == first[9]
                    and memcmp(at + 12, first + 12, 8) == 0
                )
            else:
                same = memcmp(at, first, 7) == 0 and memcmp(at + 8, first + 8, 32) == 0
            same = same and memcmp(at + header, first + header, upper) == 0
        PyBuffer_Release(cython.address(view))
        if not same:
            break
        members.append(packet)
    return members
