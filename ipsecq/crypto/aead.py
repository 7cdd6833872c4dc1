"""Combined-mode algorithms of ESP: AES-GCM, AES-CCM, ChaCha20-Poly1305, NULL with AES-GMAC.

The nonce is the SA's salt and the packet's IV; the associated data is SPI and sequence number, with an ESN's high
half between them (RFC 4106 section 5, RFC 4309 section 5, RFC 7634 section 2.1).  This is the gateway's main path:
each method is one call into OpenSSL and as few allocations as Python allows.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from struct import Struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM, ChaCha20Poly1305

Buffer = bytes | bytearray | memoryview

_nonce = Struct(">4sQ").pack
_aad = Struct(">II").pack
_aad_esn = Struct(">IQ").pack


class _Aead:
    """What the algorithms that `cryptography` offers whole have in common."""

    __slots__ = ("_decrypt", "_encrypt", "_salt", "block", "icv_length", "iv_is_counter", "iv_length")

    def __init__(self, aead: AESGCM | AESCCM | ChaCha20Poly1305, salt: bytes, icv_length: int) -> None:
        self._encrypt = aead.encrypt
        self._decrypt = aead.decrypt
        self._salt = salt
        self.icv_length = icv_length
        self.iv_length = 8
        self.block = 1
        self.iv_is_counter = True

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        aad = header[:4] + high + header[4:] if high else header
        return b"".join((prefix, header, iv, self._encrypt(self._salt + iv, plaintext, aad)))

    def seal_run(self, spi: int, first: int, plaintexts: Sequence[Buffer], esn: bool) -> list[bytes]:
        """Ciphertext and ICV of packets with the sequence numbers from ``first`` on, which are their IVs, too.

        The fixed cost of :meth:`seal` (headers, one more copy) is the caller's, who pays it for all at once.
        """
        encrypt, salt = self._encrypt, self._salt
        if len(salt) != 4:
            return [
                encrypt(salt + number.to_bytes(8, "big"), plaintext, self._associated(spi, number, esn))
                for number, plaintext in enumerate(plaintexts, first)
            ]
        if esn:
            return [
                encrypt(_nonce(salt, number), plaintext, _aad_esn(spi, number))
                for number, plaintext in enumerate(plaintexts, first)
            ]
        return [
            encrypt(_nonce(salt, number), plaintext, _aad(spi, number))
            for number, plaintext in enumerate(plaintexts, first)
        ]

    @staticmethod
    def _associated(spi: int, number: int, esn: bool) -> bytes:
        return _aad_esn(spi, number) if esn else _aad(spi, number)

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        aad = packet[offset : offset + 8]
        if high:
            aad = b"".join((aad[:4], high, aad[4:]))
        try:
            return self._decrypt(self._salt + packet[offset + 8 : offset + 16], packet[offset + 16 :], aad)
        except InvalidTag:
            return None

    def open_run(self, packets: Sequence[Buffer], offset: int, high: bytes) -> list[bytes]:
        """The plaintexts of ESP packets that all start at ``offset``, up to the first one that is not authentic."""
        decrypt, salt = self._decrypt, self._salt
        iv, body = offset + 8, offset + 16
        opened: list[bytes] = []
        append = opened.append
        try:
            if high:
                for packet in packets:
                    aad = b"".join((packet[offset : offset + 4], high, packet[offset + 4 : iv]))
                    append(decrypt(salt + packet[iv:body], packet[body:], aad))
            else:
                for packet in packets:
                    append(decrypt(salt + packet[iv:body], packet[body:], packet[offset:iv]))
        except InvalidTag:
            pass
        return opened


class GcmCipher(_Aead):
    """AES-GCM with a 16-octet ICV (RFC 4106)."""

    __slots__ = ()

    def __init__(self, key: bytes, salt: bytes) -> None:
        super().__init__(AESGCM(key), salt, 16)


class CcmCipher(_Aead):
    """AES-CCM (RFC 4309): a salt of 3 octets, an ICV of 8, 12 or 16."""

    __slots__ = ()

    def __init__(self, key: bytes, salt: bytes, icv_length: int) -> None:
        super().__init__(AESCCM(key, icv_length), salt, icv_length)


class ChaChaCipher(_Aead):
    """ChaCha20-Poly1305 (RFC 7634)."""

    __slots__ = ()

    def __init__(self, key: bytes, salt: bytes) -> None:
        super().__init__(ChaCha20Poly1305(key), salt, 16)


class ShortGcmCipher:
    """AES-GCM with an ICV of 8 or 12 octets (RFC 4106 section 6): the tag's first octets.

    `cryptography` opens short tags only through a fresh context (3.3 µs).  Instead the kept counter-mode context
    decrypts, and sealing the result again gives the full tag to compare with (1.1 µs); nothing is handed out before.
    """

    __slots__ = ("_ctr", "_encrypt", "_salt", "block", "icv_length", "iv_is_counter", "iv_length")

    def __init__(self, key: bytes, salt: bytes, icv_length: int) -> None:
        self._encrypt = AESGCM(key).encrypt
        self._ctr = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._salt = salt
        self.icv_length = icv_length
        self.iv_length = 8
        self.block = 1
        self.iv_is_counter = True

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        aad = header[:4] + high + header[4:] if high else header
        sealed = self._encrypt(self._salt + iv, plaintext, aad)
        return b"".join((prefix, header, iv, sealed[: len(plaintext) + self.icv_length]))

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        aad = b"".join((packet[offset : offset + 4], high, packet[offset + 4 : offset + 8]))
        nonce = self._salt + packet[offset + 8 : offset + 16]
        end = len(packet) - self.icv_length
        self._ctr.reset_nonce(nonce + b"\0\0\0\2")  # GCM encrypts from counter 2 on; 1 masks the tag
        plaintext = self._ctr.update(packet[offset + 16 : end])
        sealed = self._encrypt(nonce, plaintext, aad)
        if hmac.compare_digest(sealed[len(plaintext) : len(plaintext) + self.icv_length], packet[end:]):
            return plaintext
        return None


class NullGmacCipher:
    """NULL encryption with AES-GMAC (RFC 4543 section 3): all of the packet is associated data, IV included."""

    __slots__ = ("_encrypt", "_salt", "block", "icv_length", "iv_is_counter", "iv_length")

    def __init__(self, key: bytes, salt: bytes) -> None:
        self._encrypt = AESGCM(key).encrypt
        self._salt = salt
        self.icv_length = 16
        self.iv_length = 8
        self.block = 1
        self.iv_is_counter = True

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        tag = self._encrypt(self._salt + iv, b"", b"".join((header[:4], high, header[4:], iv, plaintext)))
        return b"".join((prefix, header, iv, plaintext, tag))

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        end = len(packet) - 16
        aad = b"".join((packet[offset : offset + 4], high, packet[offset + 4 : end]))
        tag = self._encrypt(self._salt + packet[offset + 8 : offset + 16], b"", aad)
        return bytes(packet[offset + 16 : end]) if hmac.compare_digest(tag, packet[end:]) else None
