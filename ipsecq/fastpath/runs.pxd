# What the other compiled modules use of runs.py.

from libc.stdint cimport uint32_t


cdef struct Shape:
    Py_ssize_t offset  # of the TCP or UDP header
    Py_ssize_t header  # octets up to the data
    bint tcp
    bint numbered  # IPv4 identifications have to count up: no DF


cdef bint may_begin(unsigned char *at, Py_ssize_t length, Shape *shape) noexcept nogil
cdef bint follows(unsigned char *one, unsigned char *two, Shape *shape, Py_ssize_t size) noexcept nogil
cdef bint is_long(unsigned char *at, Py_ssize_t length, Shape *shape) noexcept nogil
cdef bint is_right(unsigned char *at, Py_ssize_t length, Shape *shape) noexcept nogil
cdef void write_head(unsigned char *at, Shape *shape, Py_ssize_t total, unsigned char pushed) noexcept nogil
