# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""The headers of a packet that the fast path may take, in one look, and the key of its flow."""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.ipsecq.compiled.octets import get16, get32
from cython.cimports.libc.string import memcpy


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def read_head(
    at: cython.p_uchar, captured: cython.Py_ssize_t, head: cython.pointer(Head), flow: cython.p_uchar
) -> cython.bint:
    """Read the packet in ``captured`` octets; False: its headers are not plain, or they lie.

    Plain is TCP, UDP or ICMP behind an IPv4 header without options, no fragment, or an IPv6 header without extension
    headers.  ``flow`` gets addresses, ports (ICMP: type and code) and protocol, 13 or 37 octets.
    """
    upper: cython.p_uchar
    room: cython.Py_ssize_t
    addresses: cython.Py_ssize_t
    if captured < 28:
        return False
    if at[0] == 0x45:
        if get16(at + 6) & 0x3FFF:
            return False
        head.length, head.offset, head.protocol = get16(at + 2), 20, at[9]
        head.tos, head.df, head.label = at[1], at[6] & 0x40, 0
        addresses = 8
    elif at[0] >> 4 == 6 and captured >= 48:
        head.length, head.offset, head.protocol = 40 + get16(at + 4), 40, at[6]
        head.tos, head.df, head.label = (at[0] & 15) << 4 | at[1] >> 4, False, get32(at) & 0xFFFFF
        addresses = 32
    else:
        return False
    room = head.length - head.offset
    upper = at + head.offset
    if head.length > captured or room < 8:
        return False
    memcpy(flow, upper - addresses, addresses)
    flow += addresses
    if head.protocol == 6 or head.protocol == 17:
        if room < 20 if head.protocol == 6 else get16(upper + 4) != room:
            return False
        memcpy(flow, upper, 4)
    elif head.protocol == (1 if head.offset == 20 else 58):
        flow[0] = flow[2] = 0
        flow[1], flow[3] = upper[0], upper[1]
    else:
        return False
    flow[4] = cython.cast(cython.uchar, head.protocol)
    head.flow = addresses + 5
    return True
