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
from cython.cimports.ipsecq.compiled.octets import get16, get32, native, put16, put32, put64, put_checksum, words
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
_TCP = cython.declare(cython.int, 6)
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

    # -- many packets ----------------------------------------------------------------------------------------

    def open_run(self, packets, offset: cython.Py_ssize_t, high: bytes) -> list:
        """The plaintexts of ESP packets that all start at ``offset``, up to the first one that is not authentic."""
        opened: list = []
        for packet in packets:
            plaintext = self.open(packet, offset, high)
            if plaintext is None:
                break
            opened.append(plaintext)
        return opened

    def open_super(
        self, packet, start: cython.Py_ssize_t, size: cython.Py_ssize_t, length: cython.Py_ssize_t, high: bytes
    ) -> list:
        """As :meth:`open_run`, for ESP packets every ``size`` octets from ``start`` to ``length`` in one buffer."""
        view: cython.Py_buffer
        opened: list = []
        at: cython.Py_ssize_t = start
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        try:
            length = min(length, view.len)
            while at < length:
                plaintext = self._open_at(cython.cast(cython.p_uchar, view.buf), min(at + size, length), at, high)
                if plaintext is None:
                    break
                opened.append(plaintext)
                at += size
        finally:
            PyBuffer_Release(cython.address(view))
        return opened

    def seal_segments(
        self, packet, length: cython.Py_ssize_t, offset: cython.Py_ssize_t, header: cython.Py_ssize_t,
        size: cython.Py_ssize_t, pseudo: uint32_t, spi: uint32_t, first: uint64_t, esn: cython.bint, outer: bytes,
        identification: uint32_t,
    ):  # fmt: skip
        """Cut a super-packet into segments and seal each: TCP or UDP at ``offset``, data of ``size`` octets from ``header``.

        ``pseudo`` is the sum of addresses and protocol.  With ``outer``, the headers in front of ESP (IP, or IP and
        UDP without a checksum; IPv4 identifications count from ``identification``), a list of datagrams; without, the
        ESP packets one behind the other and the distance between two of them.  The segments are those of
        :func:`ipsecq.packet.segments.split`; ValueError when the numbers do not fit the packet.
        """
        view: cython.Py_buffer
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        try:
            octets: cython.p_uchar = cython.cast(cython.p_uchar, view.buf)
            tcp: cython.bint = octets[9 if octets[0] >> 4 == 4 else 6] == _TCP if offset in (20, 40) else header > offset + 8
            if length > view.len or header >= length or size < 1 or offset < 20 or header < offset + (20 if tcp else 8):
                raise ValueError("the segments do not fit the packet")
            count: cython.Py_ssize_t = (length - header + size - 1) // size
            stride: cython.Py_ssize_t = self._sealed(header + size)
            final: cython.Py_ssize_t = length - header - (count - 1) * size
            index: cython.Py_ssize_t
            data: cython.Py_ssize_t
            at: cython.p_uchar
            room: cython.Py_ssize_t = len(outer)
            datagrams: list = []
            next_header: cython.int = 4 if octets[0] >> 4 == 4 else 41
            blob: bytes = b""
            if not room:
                blob = PyBytes_FromStringAndSize(
                    cython.NULL, (count - 1) * stride + self._sealed(header + final)
                )
            for index in range(count):
                data = size if index < count - 1 else final
                if room:
                    datagram: bytes = PyBytes_FromStringAndSize(cython.NULL, room + self._sealed(header + data))
                    at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(datagram))
                    _front(at, outer, room + self._sealed(header + data), identification + index)
                    at += room
                    datagrams.append(datagram)
                else:
                    at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(blob)) + index * stride
                cut_segment(at + HEAD, octets, offset, header, tcp, index, index == count - 1, size, data, pseudo)
                self._seal_at(at, header + data, next_header, spi, first + index, esn)
            return datagrams if room else (blob, stride)
        finally:
            PyBuffer_Release(cython.address(view))

    def seal_equal(
        self, packets, length: cython.Py_ssize_t, offset: cython.Py_ssize_t, unfinished: cython.bint, pseudo: uint32_t,
        spi: uint32_t, first: uint64_t, esn: cython.bint, outer: bytes, identification: uint32_t,
    ):  # fmt: skip
        """Seal packets that are all ``length`` octets long, with TCP or UDP at ``offset`` (20 or 40).

        ``unfinished``: their checksums are filled in.  The rest is as in :meth:`seal_segments`.
        """
        stride: cython.Py_ssize_t = self._sealed(length)
        room: cython.Py_ssize_t = len(outer)
        count: cython.Py_ssize_t = len(packets)
        index: cython.Py_ssize_t = 0
        at: cython.p_uchar
        udp: cython.bint
        field: cython.Py_ssize_t
        next_header: cython.int
        datagrams: list = []
        blob: bytes = b""
        if offset not in (20, 40) or length < offset + 8:
            raise ValueError("no room for a header")
        if not room:
            blob = PyBytes_FromStringAndSize(cython.NULL, count * stride)
        for packet in packets:
            if room:
                datagram: bytes = PyBytes_FromStringAndSize(cython.NULL, room + stride)
                at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(datagram))
                _front(at, outer, room + stride, identification + index)
                at += room
                datagrams.append(datagram)
            else:
                at = cython.cast(cython.p_uchar, PyBytes_AS_STRING(blob)) + index * stride
            _copy(packet, at + HEAD, length)
            next_header = 4 if at[HEAD] >> 4 == 4 else 41
            if unfinished:
                udp = at[HEAD + (9 if offset == 20 else 6)] != _TCP
                field = offset + (6 if udp else 16)
                if field + 2 > length:
                    raise ValueError("no room for a checksum")
                put16(at + HEAD + field, 0)
                put_checksum(
                    at + HEAD + field,
                    words(at + HEAD + offset, length - offset) + native((pseudo + length - offset) % 65535), udp,
                )  # fmt: skip
            self._seal_at(at, length, next_header, spi, first + index, esn)
            index += 1
        return datagrams if room else (blob, stride)


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


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def cut_segment(
    to: cython.p_uchar, octets: cython.p_uchar, offset: cython.Py_ssize_t, header: cython.Py_ssize_t, tcp: cython.bint,
    index: cython.Py_ssize_t, last: cython.bint, size: cython.Py_ssize_t, data: cython.Py_ssize_t, pseudo: uint32_t,
) -> cython.void:  # fmt: skip
    """One segment of a super-packet: number ``index``, of ``data`` octets."""
    upper: cython.p_uchar = to + offset
    field: cython.Py_ssize_t = 16 if tcp else 6
    memcpy(to, octets, header)
    memcpy(to + header, octets + header + index * size, data)
    if octets[0] >> 4 == 4:
        put16(to + 2, cython.cast(uint32_t, header + data))
        put16(to + 4, get16(octets + 4) + cython.cast(uint32_t, index))
        put16(to + 10, 0)
        put_checksum(to + 10, words(to, (octets[0] & 15) * 4), False)
    else:
        put16(to + 4, cython.cast(uint32_t, header + data - 40))
    if tcp:
        put32(upper + 4, get32(octets + offset + 4) + cython.cast(uint32_t, index * size))
        if index:
            upper[13] &= 0x7F  # CWR stays with the first segment (RFC 3168 section 6.1.2)
        if not last:
            upper[13] &= 0xF6  # FIN and PSH are the last one's
    else:
        put16(upper + 4, cython.cast(uint32_t, header - offset + data))
    put16(upper + field, 0)
    put_checksum(
        upper + field,
        words(upper, header - offset + data) + native(cython.cast(uint32_t, (pseudo + header - offset + data) % 65535)),
        not tcp,
    )


@cython.cfunc
def _front(
    at: cython.p_uchar, outer: bytes, length: cython.Py_ssize_t, identification: uint32_t
) -> cython.void:  # fmt: skip
    """The outer headers of a datagram of ``length`` octets."""
    room: cython.Py_ssize_t = len(outer)
    memcpy(at, PyBytes_AS_STRING(outer), room)
    if at[0] >> 4 == 4:
        put16(at + 2, cython.cast(uint32_t, length))
        put16(at + 4, identification)
        put16(at + 10, 0)
        put_checksum(at + 10, words(at, 20), False)
        if room > 20:
            put16(at + 24, cython.cast(uint32_t, length - 20))
    else:
        put16(at + 4, cython.cast(uint32_t, length - 40))
        if room > 40:
            put16(at + 44, cython.cast(uint32_t, length - 40))
