# What the other compiled modules use of known.py.

from ipsecq.compiled.aead cimport Aead
from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef class Limits:
    cdef Py_ssize_t base
    cdef uint64_t hard_packets
    cdef uint64_t hard_bytes
    cdef uint64_t soft_packets
    cdef uint64_t soft_bytes
    cdef double hard_time
    cdef double hard_use

    cdef bint allow(self, uint64_t *words, uint64_t count, uint64_t octets, double now) noexcept
    cdef void charge(self, uint64_t *words, uint64_t count, uint64_t octets, double now) noexcept


cdef class Way:
    cdef Aead aead
    cdef Limits limits
    cdef object take
    cdef bytes front
    cdef bytes name
    cdef bytes options
    cdef uint32_t spi
    cdef bint esn
    cdef uint32_t identification
    cdef unsigned char tos_mask
    cdef int dfbit
    cdef int plain_socket
    cdef int df_socket
    cdef bint bursts
    cdef public object burst
    cdef Py_ssize_t headers


cdef class Flow:
    cdef readonly Way way
    cdef public Py_ssize_t mtu
    cdef public double mtu_until
    cdef public Py_ssize_t size
    cdef public double size_until
    cdef unsigned short identifier


cdef class Target:
    cdef int descriptor
    cdef bint coalescing
    cdef bint datagrams
    cdef Py_ssize_t failure
    cdef public object device


cdef class Sa:
    cdef Aead aead
    cdef Limits limits
    cdef bint esn
    cdef uint64_t window
    cdef uint64_t mask
    cdef bint natt
    cdef unsigned char peer[16]
    cdef uint32_t peer_port
    cdef public dict allowed
    cdef public object owner

    cdef int64_t check(self, uint64_t *words, uint32_t low) noexcept
    cdef void update(self, uint64_t *words, uint64_t sequence) noexcept


cdef uint64_t *address_of(object table) except *
