"""ESP with separate algorithms: encrypt, then authenticate (RFC 4303 section 3.3.2).

The ICV covers SPI, sequence number, IV, ciphertext and, behind them, the high half of an ESN (section 2.2.1).
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ipsecq.crypto.mac import Mac

Buffer = bytes | bytearray | memoryview


class _Separate:
    """Authentication around a cipher.  ``mac`` None skips it: only for captures whose authentication key is lost."""

    __slots__ = ("_mac", "block", "icv_length", "iv_is_counter", "iv_length")

    def __init__(self, iv_length: int, block: int, iv_is_counter: bool, mac: Mac | None, icv_length: int) -> None:
        self._mac = mac
        self.iv_length = iv_length
        self.block = block
        self.iv_is_counter = iv_is_counter
        self.icv_length = icv_length

    def _finish(self, prefix: Buffer, header: bytes, body: bytes, high: bytes) -> bytes:
        """Put the packet together: ``body`` is IV and ciphertext."""
        if self._mac is None:
            return b"".join((prefix, header, body, bytes(self.icv_length)))
        mac = self._mac.copy()
        mac.update(header)
        mac.update(body)
        if high:
            mac.update(high)
        return b"".join((prefix, header, body, mac.finalize()[: self.icv_length]))

    def _authentic(self, packet: Buffer, offset: int, end: int, high: bytes) -> bool:
        if self._mac is None:
            return True
        mac = self._mac.copy()
        mac.update(packet[offset:end])
        if high:
            mac.update(high)
        return hmac.compare_digest(mac.finalize()[: self.icv_length], packet[end:])


class NullCipher(_Separate):
    """NULL encryption (RFC 2410): authentication only."""

    __slots__ = ()

    def __init__(self, mac: Mac | None, icv_length: int) -> None:
        super().__init__(0, 1, True, mac, icv_length)

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`; ``iv`` is not sent."""
        return self._finish(prefix, header, plaintext, high)

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        end = len(packet) - self.icv_length
        return bytes(packet[offset + 8 : end]) if self._authentic(packet, offset, end, high) else None


class CtrCipher(_Separate):
    """AES-CTR (RFC 3686): the counter block is salt, IV and a 32-bit counter from 1."""

    __slots__ = ("_ctr", "_salt")

    def __init__(self, key: bytes, salt: bytes, mac: Mac | None, icv_length: int) -> None:
        super().__init__(8, 1, True, mac, icv_length)
        self._ctr = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._salt = salt

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        self._ctr.reset_nonce(self._salt + iv + b"\0\0\0\1")
        return self._finish(prefix, header, iv + self._ctr.update(plaintext), high)

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        end = len(packet) - self.icv_length
        if not self._authentic(packet, offset, end, high):
            return None
        self._ctr.reset_nonce(b"".join((self._salt, packet[offset + 8 : offset + 16], b"\0\0\0\1")))
        return self._ctr.update(packet[offset + 16 : end])


class CbcCipher(_Separate):
    """AES-CBC (RFC 3602) and 3DES-CBC (RFC 2451), with contexts that live as long as the SA.

    A fresh context costs 2.7 µs a packet, a kept one 0.2 µs, and `cryptography` cannot reset a CBC context's IV.  Both
    directions therefore feed one block in front of the text:

    *Sealing*: the caller's random block R is encrypted first.  The kept context chains it to the last block C of
    the packet before: IV = E(R xor C), and the text follows chained to that.  R is uniform and unknown, so is R xor C,
    and so is its image under the cipher's permutation: the IV is as unpredictable as R (NIST SP 800-38A appendix C
    makes IVs from nonces by the same step).  What an observer knows, C, cancels out.

    *Opening*: IV and ciphertext lie side by side in the packet; decrypting both yields one block of noise (the IV
    "decrypted" against the packet before), then the plaintext, because CBC synchronises itself after one block.
    """

    __slots__ = ("_decryptor", "_encryptor")

    def __init__(self, name: str, key: bytes, block: int, mac: Mac | None, icv_length: int) -> None:
        super().__init__(block, block, False, mac, icv_length)
        algorithm = algorithms.AES(key) if name == "aes-cbc" else TripleDES(key)
        cipher = Cipher(algorithm, modes.CBC(bytes(block)))
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """See :class:`ipsecq.crypto.cipher.EspCipher`; ``iv`` is the random block R of the class's description."""
        if len(iv) != self.block:  # anything else would shift every later packet by part of a block
            raise ValueError(f"IV of {len(iv)} octets: a CBC cipher needs {self.block} random octets")
        return self._finish(prefix, header, self._encryptor.update(iv + plaintext), high)

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """See :class:`ipsecq.crypto.cipher.EspCipher`."""
        end = len(packet) - self.icv_length
        if not self._authentic(packet, offset, end, high):
            return None
        return self._decryptor.update(packet[offset + 8 : end])[self.block :]
