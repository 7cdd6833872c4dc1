# What the other compiled modules use of sealer.py.

from ipsecq.fastpath.known cimport Flow, Way
from ipsecq.fastpath.sockets cimport iovec, mmsghdr
from libc.stdint cimport uint32_t, uint64_t


cdef class Sealer:
    cdef object _counters_owner
    cdef object _words_owner
    cdef uint64_t *counters
    cdef uint64_t *words
    cdef public dict flows
    cdef public list failed
    cdef public object collected
    cdef Flow _last
    cdef unsigned char _key[64]
    cdef Py_ssize_t _key_length
    # the burst that is open
    cdef Way _way
    cdef unsigned char *_octets
    cdef Py_ssize_t _filled
    cdef Py_ssize_t _stride
    cdef Py_ssize_t _count
    cdef bint _closed
    cdef unsigned char _tos
    cdef bint _df
    cdef uint32_t _label
    cdef uint64_t _first
    # datagrams that wait for sendmmsg
    cdef unsigned char *_arena
    cdef Py_ssize_t _used
    cdef Py_ssize_t _waiting
    cdef int _socket
    cdef mmsghdr *_messages
    cdef iovec *_vector
    cdef list _names

    cdef int packet(self, unsigned char *at, Py_ssize_t captured, bint unfinished, bint gso, Py_ssize_t size, uint32_t mark, uint32_t tag, double now) except -1
    cdef unsigned char *_place(self, Way way, Py_ssize_t length, unsigned char tos, bint df, uint32_t label, uint64_t number) except *
    cdef Flow _find(self, unsigned char *key, Py_ssize_t used)
    cdef object _as_burst(self, Way way, Py_ssize_t count, Py_ssize_t filled)
    cdef bytes _datagram(self, Py_ssize_t index)
    cdef int flush(self) except -1
    cdef int _flush_burst(self) except -1
    cdef int _flush_datagrams(self) except -1
