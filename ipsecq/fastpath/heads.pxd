# What the other compiled modules use of heads.py.

from libc.stdint cimport uint32_t


cdef struct Head:
    Py_ssize_t length  # octets of the IP packet
    Py_ssize_t offset  # of the upper layer: 20 or 40
    int protocol
    unsigned char tos  # or traffic class
    bint df
    uint32_t label
    Py_ssize_t flow  # octets of the flow's key


cdef bint read_head(unsigned char *at, Py_ssize_t captured, Head *head, unsigned char *flow) noexcept nogil
