# What the other compiled modules use of ring.py.

from ipsecq.fastpath.opener cimport Opener
from libc.stdint cimport uint64_t


cdef class Ring:
    cdef int descriptor
    cdef unsigned char *_memory
    cdef uint64_t _frames
    cdef uint64_t _size
    cdef uint64_t *_cursor
    cdef object _owner
    cdef bint stopped

    cdef Py_ssize_t take(self, Opener opener, Py_ssize_t most, double now) except -1
