# Big-endian numbers and Internet checksums in raw memory, for the compiled loops.

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef inline uint32_t get16(const unsigned char *at) noexcept nogil:
    return at[0] << 8 | at[1]


cdef inline uint32_t get32(const unsigned char *at) noexcept nogil:
    return <uint32_t> at[0] << 24 | <uint32_t> at[1] << 16 | <uint32_t> at[2] << 8 | at[3]


cdef inline void put16(unsigned char *at, uint32_t value) noexcept nogil:
    at[0] = <unsigned char> (value >> 8 & 0xFF)
    at[1] = <unsigned char> (value & 0xFF)


cdef inline void put32(unsigned char *at, uint32_t value) noexcept nogil:
    put16(at, value >> 16)
    put16(at + 2, value)


cdef inline void put64(unsigned char *at, uint64_t value) noexcept nogil:
    put32(at, <uint32_t> (value >> 32))
    put32(at + 4, <uint32_t> value)


cdef inline uint64_t words(const unsigned char *at, Py_ssize_t count) noexcept nogil:
    # The sum of 16-bit words in native order, as 32-bit words for speed (RFC 1071 section 2); an odd octet is padded.
    cdef uint64_t total = 0
    cdef uint32_t word
    cdef Py_ssize_t index
    cdef unsigned char rest[4]
    cdef Py_ssize_t whole = count >> 2
    for index in range(whole):
        memcpy(&word, at + 4 * index, 4)
        total += word
    if count & 3:
        rest[0] = rest[1] = rest[2] = rest[3] = 0
        memcpy(rest, at + 4 * whole, count & 3)
        memcpy(&word, rest, 4)
        total += word
    return total


cdef inline uint32_t folded(uint64_t total) noexcept nogil:
    # A sum of 32-bit words as one of 16 bits; 0xFFFF and 0 are both zero.
    total = (total >> 32) + <uint32_t> total
    total = (total >> 32) + <uint32_t> total
    total = (total >> 16) + <uint16_t> total
    total = (total >> 16) + <uint16_t> total
    total = (total >> 16) + <uint16_t> total
    return <uint32_t> total


cdef inline uint32_t native(uint32_t value) noexcept nogil:
    # A big-endian 16-bit word as it lies in memory.
    cdef unsigned char pair[2]
    cdef uint16_t word
    put16(pair, value)
    memcpy(&word, pair, 2)
    return word


cdef inline void put_checksum(unsigned char *at, uint64_t total, bint udp) noexcept nogil:
    # The complement of a native sum; UDP writes a zero as 0xFFFF (RFC 768).
    cdef uint16_t word = <uint16_t> (~folded(total) & 0xFFFF)
    if word == 0 and udp:
        word = 0xFFFF
    memcpy(at, &word, 2)
