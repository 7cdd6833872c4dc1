"""Algorithms and keys made ready for packets: :func:`build` for ESP, :func:`icv` for AH.

Every key schedule is computed once per SA; sealing and opening a packet only use it.  The objects keep cipher contexts
between packets, so they belong to one thread (one SA has one worker).
"""

from __future__ import annotations

from typing import Protocol

from ipsecq import compiled
from ipsecq.crypto import registry
from ipsecq.crypto.aead import CcmCipher, ChaChaCipher, GcmCipher, NullGmacCipher, ShortGcmCipher
from ipsecq.crypto.mac import GmacIcv, IcvFunction, build_mac
from ipsecq.crypto.separate import CbcCipher, CtrCipher, NullCipher
from ipsecq.errors import AlgorithmError
from ipsecq.secret import Key

Buffer = bytes | bytearray | memoryview


class EspCipher(Protocol):
    """Encryption and authentication of ESP packets with one SA's keys."""

    iv_length: int
    """Octets of IV in the packet, after the sequence number."""
    icv_length: int
    """Octets of ICV at the end of the packet."""
    block: int
    """Octets to which the plaintext must be padded; :meth:`seal` and :meth:`open` want whole blocks."""
    iv_is_counter: bool
    """True: ``iv`` must never repeat under the key (the 64-bit sequence number is right).
    False: ``iv`` must be fresh random octets."""

    def seal(self, prefix: Buffer, header: bytes, iv: bytes, plaintext: bytes, high: bytes) -> bytes:
        """``prefix + header + IV + ciphertext + ICV``, in one allocation.

        ``header`` is SPI and low sequence number (8 octets), ``high`` the high half of an ESN (4 octets) or ``b""``.
        ``prefix`` (outer headers) is put in front and not authenticated.  A CBC cipher derives the IV on the wire from
        the random octets ``iv``; all others send ``iv`` itself.
        """

    def open(self, packet: Buffer, offset: int, high: bytes) -> bytes | None:
        """The plaintext of the ESP packet that starts at ``offset`` and ends with the buffer.

        None when authentication fails.  The caller has made sure that header, IV and ICV fit and that the rest is
        whole blocks.
        """


def build(
    enc_name: str,
    enc_key: Key,
    auth_name: str | None = None,
    auth_key: Key | None = None,
    *,
    unauthenticated: bool = False,
) -> EspCipher:
    """The cipher of an ESP SA, from setkey(8) names and keys that ``registry.check_combination`` has passed.

    ``unauthenticated`` serves captures whose authentication key is lost: the ICV of ``auth_name`` is skipped unseen.
    AlgorithmError when an algorithm is unknown, or a separate one lacks authentication.
    """
    row = registry.encryption(enc_name)
    octets = enc_key.octets
    split = len(octets) - row.salt_length
    key, salt = octets[:split], octets[split:]
    if row.aead:
        if compiled.aead is not None and (row.name.startswith("aes-gcm") or row.name == "chacha20-poly1305"):
            fast: EspCipher = compiled.aead.Aead(row.name == "chacha20-poly1305", key, salt, row.icv_length)
            return fast
        if row.name == "aes-gcm-16":
            return GcmCipher(key, salt)
        if row.name.startswith("aes-gcm"):
            return ShortGcmCipher(key, salt, row.icv_length)
        if row.name.startswith("aes-ccm"):
            return CcmCipher(key, salt, row.icv_length)
        if row.name == "chacha20-poly1305":
            return ChaChaCipher(key, salt)
        return NullGmacCipher(key, salt)
    auth_octets = auth_key.octets if auth_key is not None else b""
    mac = None
    icv_length = 0
    if auth_name is not None:
        auth_row = registry.authentication(auth_name)
        if auth_row.name == "aes-gmac":
            # "-E null -A aes-gmac" is another spelling of RFC 4543's combined algorithm.
            return NullGmacCipher(auth_octets[:-4], auth_octets[-4:])
        icv_length = auth_row.icv_length
        if auth_octets or not unauthenticated:
            mac = build_mac(auth_row.name, auth_octets)
    elif not unauthenticated:
        raise AlgorithmError(f"esp {row.name} has no authentication algorithm: add '-A hmac-sha2-256 KEY'")
    if row.name == "null":
        return NullCipher(mac, icv_length)
    if row.name == "aes-ctr":
        return CtrCipher(key, salt, mac, icv_length)
    return CbcCipher(row.name, key, row.block, mac, icv_length)


def icv(auth_name: str, key: Key) -> IcvFunction:
    """The integrity function of an AH SA, from a setkey(8) name and a key that the registry has checked."""
    row = registry.authentication(auth_name)
    if row.name == "aes-gmac":
        return GmacIcv(key.octets[: -row.salt_length], key.octets[-row.salt_length :])
    return IcvFunction(build_mac(row.name, key.octets), row.icv_length)
