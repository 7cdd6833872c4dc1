# What the other compiled modules use of opener.py.

from ipsecq.fastpath.runs cimport Shape
from ipsecq.fastpath.known cimport Sa, Target
from libc.stdint cimport uint32_t, uint64_t


cdef class Opener:
    cdef object _counters_owner
    cdef object _words_owner
    cdef uint64_t *counters
    cdef uint64_t *words
    cdef public dict sas
    cdef public object refused_sa
    cdef public object refused_flow
    cdef public object rest
    cdef public object collected
    cdef public bint refusing
    cdef unsigned int _ports[4]
    cdef Py_ssize_t _port_count
    cdef Sa _last
    cdef unsigned char _last_key[24]
    cdef Py_ssize_t _last_length
    cdef unsigned char *_scratch
    # the run that is open
    cdef unsigned char *_run
    cdef unsigned char _before[128]
    cdef Target _target
    cdef Shape _shape
    cdef Py_ssize_t _first
    cdef Py_ssize_t _filled
    cdef Py_ssize_t _count
    cdef bint _closed

    cdef int packet(self, unsigned char *at, Py_ssize_t captured, bint gso, double now) except -1
    cdef int _piece(self, Sa sa, unsigned char *at, Py_ssize_t length, Py_ssize_t extra, double now) except -1
    cdef Sa _find(self, unsigned char *at, Py_ssize_t offset, Py_ssize_t esp, bint udp)
    cdef int _refuse(self, Sa sa, Py_ssize_t word, Py_ssize_t reason, Py_ssize_t length)
    cdef bint _natt_port(self, uint32_t port) noexcept
    cdef int _deliver(self, unsigned char *at, Py_ssize_t length, Target target) except -1
    cdef int flush(self) except -1
    cdef int _write(self, Target target, unsigned char *virtio, unsigned char *at, Py_ssize_t length, Py_ssize_t number) except -1
