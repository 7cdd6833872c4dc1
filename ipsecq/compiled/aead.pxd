# What the other compiled modules use of aead.py.

from ipsecq.compiled.openssl cimport EVP_CIPHER, EVP_CIPHER_CTX
from libc.stdint cimport uint32_t, uint64_t


cdef class Aead:
    cdef const EVP_CIPHER *_cipher
    cdef bytes _key
    cdef EVP_CIPHER_CTX *_encryptor
    cdef EVP_CIPHER_CTX *_decryptor
    cdef unsigned char _nonce[12]
    cdef readonly Py_ssize_t icv_length
    cdef readonly Py_ssize_t iv_length
    cdef readonly Py_ssize_t block
    cdef readonly bint iv_is_counter

    cdef EVP_CIPHER_CTX *_context(self, bint sealing) except *
    cdef int _encrypt(self, unsigned char *at, Py_ssize_t count, unsigned char *aad, int associated) except -1
    cdef int _decrypt(self, unsigned char *iv, Py_ssize_t count, unsigned char *out, unsigned char *aad, int associated) except -1
    cdef int _seal_at(self, unsigned char *at, Py_ssize_t inner, int next_header, uint32_t spi, uint64_t number, bint esn) except -1
    cdef Py_ssize_t _sealed(self, Py_ssize_t inner)
    cdef object _open_at(self, unsigned char *octets, Py_ssize_t length, Py_ssize_t offset, bytes high)

