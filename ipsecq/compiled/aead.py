# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""AES-GCM (RFC 4106) and ChaCha20-Poly1305 (RFC 7634) in ESP, many packets in one call.

Cython's pure Python syntax: only the compiled module runs.  A packet is laid out where it is sealed and sealed where it
lies; what a packet costs is its octets, read and written once, and the six calls into OpenSSL.
"""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.buffer import PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.cimports.ipsecq.compiled.octets import put32, put64
from cython.cimports.ipsecq.compiled.openssl import (
    EVP_CIPHER_CTX,
    EVP_CTRL_AEAD_GET_TAG,
    EVP_CTRL_AEAD_SET_TAG,
    EVP_aes_128_gcm,
    EVP_aes_192_gcm,
    EVP_aes_256_gcm,
    EVP_chacha20_poly1305,
    EVP_CIPHER_CTX_ctrl,
    EVP_CIPHER_CTX_free,
    EVP_CIPHER_CTX_new,
    EVP_DecryptFinal_ex,
    EVP_DecryptInit_ex,
    EVP_DecryptUpdate,
    EVP_EncryptFinal_ex,
    EVP_EncryptInit_ex,
    EVP_EncryptUpdate,
)
from cython.cimports.libc.stdint import uint32_t, uint64_t
from cython.cimports.libc.string import memcpy

HEAD = cython.declare(cython.Py_ssize_t, 16)
"""Octets of SPI, sequence number and IV."""
_ALIGN = cython.declare(cython.Py_ssize_t, 4)


@cython.cclass
class Aead:
    """One SA's cipher, as :class:`ipsecq.crypto.cipher.EspCipher`; its key stays in OpenSSL's contexts."""

    def __cinit__(self, chacha: bool, key: bytes, salt: bytes, icv_length: int):
        """``key`` of 16, 24 or 32 octets, ``salt`` of 4; ValueError for others."""
        if len(salt) != 4 or icv_length > 16 or (chacha and (len(key) != 32 or icv_length != 16)):
            raise ValueError("key, salt or ICV of a wrong length")
        if chacha:
            self._cipher = EVP_chacha20_poly1305()
        elif len(key) == 16:
            self._cipher = EVP_aes_128_gcm()
        elif len(key) == 24:
            self._cipher = EVP_aes_192_gcm()
        elif len(key) == 32:
            self._cipher = EVP_aes_256_gcm()
        else:
            raise ValueError("AES keys have 16, 24 or 32 octets")
        self.icv_length, self.iv_length, self.block, self.iv_is_counter = icv_length, 8, 1, True
        memcpy(self._nonce, PyBytes_AS_STRING(salt), 4)
        self._key = key

    def __dealloc__(self):
        EVP_CIPHER_CTX_free(self._encryptor)
        EVP_CIPHER_CTX_free(self._decryptor)

    @cython.cfunc
    @cython.exceptval(check=True)
    def _context(self, sealing: cython.bint) -> cython.pointer(EVP_CIPHER_CTX):
        """A context with the key, made when it is first needed: an SA seals or opens, and each is a kilobyte."""
        context: cython.pointer(EVP_CIPHER_CTX) = EVP_CIPHER_CTX_new()
        octets: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(self._key))
        done: cython.int = 0
        if context != cython.NULL and sealing:
            done = EVP_EncryptInit_ex(context, self._cipher, cython.NULL, octets, cython.NULL)
        elif context != cython.NULL:
            done = EVP_DecryptInit_ex(context, self._cipher, cython.NULL, octets, cython.NULL)
        if done != 1:
            EVP_CIPHER_CTX_free(context)
            raise MemoryError("OpenSSL gives no cipher context")
        return context

    # -- one packet, raw memory ------------------------------------------------------------------------------

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _encrypt(
        self, at: cython.p_uchar, count: cython.Py_ssize_t, aad: cython.p_uchar, associated: cython.int
    ) -> cython.int:
        """Encrypt ``count`` octets behind the IV, in place, and write the ICV behind them; the nonce is set."""
        done: cython.int = 0
        if self._encryptor == cython.NULL:
            self._encryptor = self._context(True)
        context: cython.pointer(EVP_CIPHER_CTX) = self._encryptor
        if (
            EVP_EncryptInit_ex(context, cython.NULL, cython.NULL, cython.NULL, self._nonce) != 1
            or EVP_EncryptUpdate(context, cython.NULL, cython.address(done), aad, associated) != 1
            or EVP_EncryptUpdate(context, at, cython.address(done), at, cython.cast(cython.int, count)) != 1
            or EVP_EncryptFinal_ex(context, at + count, cython.address(done)) != 1
            or EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, self.icv_length, at + count) != 1
        ):
            raise RuntimeError("OpenSSL cannot encrypt")
        return 0

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _decrypt(
        self, iv: cython.p_uchar, count: cython.Py_ssize_t, out: cython.p_uchar, aad: cython.p_uchar, associated: cython.int
    ) -> cython.int:
        """Decrypt ``count`` octets behind the IV into ``out``; 0 where the ICV behind them is wrong."""
        done: cython.int = 0
        if self._decryptor == cython.NULL:
            self._decryptor = self._context(False)
        context: cython.pointer(EVP_CIPHER_CTX) = self._decryptor
        body: cython.p_uchar = iv + 8
        memcpy(self._nonce + 4, iv, 8)
        return (
            EVP_DecryptInit_ex(context, cython.NULL, cython.NULL, cython.NULL, self._nonce) == 1
            and EVP_DecryptUpdate(context, cython.NULL, cython.address(done), aad, associated) == 1
            and EVP_DecryptUpdate(context, out, cython.address(done), body, cython.cast(cython.int, count)) == 1
            and EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, self.icv_length, body + count) == 1
            and EVP_DecryptFinal_ex(context, out + count, cython.address(done)) == 1
        )

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _seal_at(
        self, at: cython.p_uchar, inner: cython.Py_ssize_t, next_header: cython.int, spi: uint32_t, number: uint64_t,
        esn: cython.bint,
    ) -> cython.int:  # fmt: skip
        """Make an ESP packet at ``at``, where ``inner`` octets lie behind room for SPI, number and IV."""
        aad: cython.uchar[12]
        index: cython.Py_ssize_t
        pad: cython.Py_ssize_t = -(inner + 2) & (_ALIGN - 1)
        trailer: cython.p_uchar = at + HEAD + inner
        for index in range(pad):
            trailer[index] = cython.cast(cython.uchar, index + 1)
        trailer[pad] = cython.cast(cython.uchar, pad)
        trailer[pad + 1] = cython.cast(cython.uchar, next_header)
        put32(at, spi)
        put32(at + 4, cython.cast(uint32_t, number))
        put64(at + 8, number)
        memcpy(self._nonce + 4, at + 8, 8)
        if not esn:
            return self._encrypt(at + HEAD, inner + pad + 2, at, 8)
        put32(aad, spi)
        put64(aad + 4, number)
        return self._encrypt(at + HEAD, inner + pad + 2, aad, 12)

    @cython.cfunc
    def _sealed(self, inner: cython.Py_ssize_t) -> cython.Py_ssize_t:
        """Octets of the ESP packet around ``inner`` octets."""
        return HEAD + inner + (-(inner + 2) & (_ALIGN - 1)) + 2 + self.icv_length

    # -- as the other ciphers --------------------------------------------------------------------------------

    def seal(self, prefix, header: bytes, iv: bytes, plaintext, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`; without ``high`` the header may have any length."""
        room: cython.Py_ssize_t = len(prefix)
        before: cython.Py_ssize_t = len(header)
        count: cython.Py_ssize_t = len(plaintext)
        aad: cython.uchar[12]
        if len(iv) != 8 or len(high) not in (0, 4) or (high and before != 8):
            raise ValueError("header, IV or high half of a wrong length")
        sealed: bytes = PyBytes_FromStringAndSize(cython.NULL, room + before + 8 + count + self.icv_length)
        at: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(sealed))
        body: cython.p_uchar = at + room + before + 8
        _copy(prefix, at, room)
        at += room
        memcpy(at, PyBytes_AS_STRING(header), before)
        memcpy(at + before, PyBytes_AS_STRING(iv), 8)
        _copy(plaintext, body, count)
        memcpy(self._nonce + 4, at + before, 8)
        if high:
            memcpy(aad, at, 4)
            memcpy(aad + 4, PyBytes_AS_STRING(high), 4)
            memcpy(aad + 8, at + 4, 4)
            self._encrypt(body, count, aad, 12)
        else:
            self._encrypt(body, count, at, cython.cast(cython.int, before))
        return sealed

    def open(self, packet, offset: cython.Py_ssize_t, high: bytes):
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        view: cython.Py_buffer
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        try:
            return self._open_at(cython.cast(cython.p_uchar, view.buf), view.len, offset, high)
        finally:
            PyBuffer_Release(cython.address(view))

    @cython.cfunc
    def _open_at(self, octets: cython.p_uchar, length: cython.Py_ssize_t, offset: cython.Py_ssize_t, high: bytes):
        """The plaintext of the ESP packet from ``offset`` to ``length``, or None."""
        aad: cython.uchar[12]
        count: cython.Py_ssize_t = length - offset - HEAD - self.icv_length
        if offset < 0 or count < 0:
            return None
        at: cython.p_uchar = octets + offset
        plaintext: bytes = PyBytes_FromStringAndSize(cython.NULL, count)
        out: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(plaintext))
        if high:
            memcpy(aad, at, 4)
            memcpy(aad + 4, PyBytes_AS_STRING(high), 4)
            memcpy(aad + 8, at + 4, 4)
            return plaintext if self._decrypt(at + 8, count, out, aad, 12) else None
        return plaintext if self._decrypt(at + 8, count, out, at, 8) else None

    def seal_run(self, spi: uint32_t, first: uint64_t, plaintexts, esn: cython.bint) -> list:
        """Ciphertext and ICV of packets with the sequence numbers from ``first`` on, which are their IVs, too."""
        aad: cython.uchar[12]
        sealed: list = []
        for plaintext in plaintexts:
            count: cython.Py_ssize_t = len(plaintext)
            made: bytes = PyBytes_FromStringAndSize(cython.NULL, count + self.icv_length)
            at: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(made))
            _copy(plaintext, at, count)
            put64(self._nonce + 4, first)
            put32(aad, spi)
            if esn:
                put64(aad + 4, first)
            else:
                put32(aad + 4, cython.cast(uint32_t, first))
            self._encrypt(at, count, aad, 12 if esn else 8)
            sealed.append(made)
            first += 1
        return sealed


@cython.cfunc
@cython.exceptval(-1, check=False)
def _copy(source, into: cython.p_uchar, count: cython.Py_ssize_t) -> cython.int:
    """The first ``count`` octets of a buffer; ValueError when it has fewer."""
    view: cython.Py_buffer
    PyObject_GetBuffer(source, cython.address(view), PyBUF_SIMPLE)
    enough: cython.bint = view.len >= count
    if enough:
        memcpy(into, view.buf, count)
    PyBuffer_Release(cython.address(view))
    if not enough:
        raise ValueError("a buffer is too short")
    return 0
