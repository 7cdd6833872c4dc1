"""The algorithms of ESP, AH and IPComp: one table, under the names of setkey(8).

Nothing here touches key octets or does cryptography: the table says how long keys, salts, IVs and ICVs are, which
PF_KEY numbers Linux and FreeBSD give an algorithm, and which combinations RFC 8221 allows.  :mod:`ipsecq.crypto.cipher`
turns a checked combination into something that seals and opens.

Sources: setkey(8) of FreeBSD, NetBSD and ipsec-tools for the names; ``<linux/pfkeyv2.h>`` and FreeBSD's
``<net/pfkeyv2.h>`` for the numbers; the RFC named beside each row for the lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ipsecq.errors import AlgorithmError
from ipsecq.numbers import Protocol
from ipsecq.secret import Key

Dialect = Literal["linux", "freebsd"]
"""Whose ``pfkeyv2.h`` a PF_KEY client was compiled with."""


@dataclass(slots=True, frozen=True)
class EncryptionAlgorithm:
    """One row of ESP encryption (``-E``).  ``key_bits`` counts the salt, which is the key's tail, as PF_KEY does."""

    name: str
    key_bits: tuple[int, ...]
    """Allowed key lengths in bits, salt included; ``(0,)`` for no key."""
    salt_length: int
    """Octets at the end of the key that are the implicit part of the nonce."""
    iv_length: int
    """Octets of explicit IV in every packet."""
    block: int
    """Octets to which payload and trailer are padded, before ESP's own alignment to 4."""
    icv_length: int
    """Octets of ICV that the algorithm makes by itself; 0 when it needs a separate authentication algorithm."""
    iv_is_counter: bool
    """True: the IV must never repeat (a 64-bit counter); False: it must be unpredictable."""
    linux: int | None
    """``SADB_EALG_*`` of ``<linux/pfkeyv2.h>``."""
    freebsd: int | None
    """``SADB_EALG_*`` of FreeBSD's ``<net/pfkeyv2.h>``."""
    source: str
    legacy: bool = False
    """Only for old captures, or for old peers with ``allow_legacy``."""
    aliases: tuple[str, ...] = ()

    @property
    def aead(self) -> bool:
        """True when the algorithm authenticates by itself (RFC 4303 "combined mode")."""
        return self.icv_length > 0

    def number(self, dialect: Dialect) -> int | None:
        """PF_KEY number in that dialect; None where it has none."""
        return self.linux if dialect == "linux" else self.freebsd


@dataclass(slots=True, frozen=True)
class AuthenticationAlgorithm:
    """One row of authentication (``-A``), for AH and for ESP with a separate algorithm."""

    name: str
    key_bits: tuple[int, ...]
    icv_length: int
    """Octets of the truncated ICV; for AES-GMAC in AH the 8-octet IV that travels in front of the tag is included."""
    linux: dict[int, int]
    """``SADB_AALG_*`` of Linux by key length in bits; key 0 is any length."""
    freebsd: dict[int, int]
    source: str
    salt_length: int = 0
    iv_length: int = 0
    legacy: bool = False
    aliases: tuple[str, ...] = ()

    def number(self, dialect: Dialect, key_bits: int = 0) -> int | None:
        """PF_KEY number in that dialect for a key of this length (AES-GMAC has one number a length)."""
        table = self.linux if dialect == "linux" else self.freebsd
        return table.get(key_bits, table.get(0))


@dataclass(slots=True, frozen=True)
class CompressionAlgorithm:
    """One row of IPComp (``-C``).  ``cpi`` is the well-known CPI (RFC 3173 section 3.3)."""

    name: str
    cpi: int
    threshold: int
    """Payloads shorter than this many octets are sent as they are (RFC 3173 section 2.2; BSD and Linux: 90)."""
    number: int
    source: str


_AES: Final = (128, 192, 256)
_AES_SALT4: Final = (160, 224, 288)
_AES_SALT3: Final = (152, 216, 280)

# Where <linux/pfkeyv2.h> has no number for an algorithm that Linux has, we take one that it leaves free: the IKEv2
# transform ID for ChaCha20-Poly1305 (28), IANA's IPsec numbers for AES-GMAC in AH (11 to 13), one from the private
# range for AES-CMAC.  Daemons that know PF_KEY only by its header never send these; our own setkey does.
_ENCRYPTION: Final = (
    #                    name               key bits    salt iv blk icv counter linux freebsd source
    EncryptionAlgorithm("aes-gcm-16", _AES_SALT4, 4, 8, 1, 16, True, 20, 20, "RFC 4106", aliases=("aes-gcm",)),
    EncryptionAlgorithm("aes-gcm-12", _AES_SALT4, 4, 8, 1, 12, True, 19, 19, "RFC 4106"),
    EncryptionAlgorithm("aes-gcm-8", _AES_SALT4, 4, 8, 1, 8, True, 18, 18, "RFC 4106"),
    EncryptionAlgorithm("aes-ccm-16", _AES_SALT3, 3, 8, 1, 16, True, 16, None, "RFC 4309", aliases=("aes-ccm",)),
    EncryptionAlgorithm("aes-ccm-12", _AES_SALT3, 3, 8, 1, 12, True, 15, None, "RFC 4309"),
    EncryptionAlgorithm("aes-ccm-8", _AES_SALT3, 3, 8, 1, 8, True, 14, None, "RFC 4309"),
    EncryptionAlgorithm("chacha20-poly1305", (288,), 4, 8, 1, 16, True, 28, 15, "RFC 7634"),
    EncryptionAlgorithm("aes-gmac", _AES_SALT4, 4, 8, 1, 16, True, 23, 23, "RFC 4543", aliases=("null-aes-gmac",)),
    EncryptionAlgorithm("aes-cbc", _AES, 0, 16, 16, 0, False, 12, 12, "RFC 3602", aliases=("rijndael-cbc",)),
    EncryptionAlgorithm("aes-ctr", _AES_SALT4, 4, 8, 1, 0, True, 13, 13, "RFC 3686"),
    EncryptionAlgorithm("null", (0,), 0, 0, 1, 0, True, 11, 11, "RFC 2410", aliases=("simple",)),
    EncryptionAlgorithm("3des-cbc", (192,), 0, 8, 8, 0, False, 3, 3, "RFC 2451", legacy=True),
)

_GMAC_NUMBERS: Final = {160: 11, 224: 12, 288: 13}

_AUTHENTICATION: Final = (
    AuthenticationAlgorithm("hmac-sha2-256", (256,), 16, {0: 5}, {0: 5}, "RFC 4868", aliases=("hmac-sha256",)),
    AuthenticationAlgorithm("hmac-sha2-384", (384,), 24, {0: 6}, {0: 6}, "RFC 4868", aliases=("hmac-sha384",)),
    AuthenticationAlgorithm("hmac-sha2-512", (512,), 32, {0: 7}, {0: 7}, "RFC 4868", aliases=("hmac-sha512",)),
    AuthenticationAlgorithm("hmac-sha1", (160,), 12, {0: 3}, {0: 3}, "RFC 2404", aliases=("hmac-sha1-96",)),
    AuthenticationAlgorithm("aes-xcbc-mac", (128,), 12, {0: 9}, {0: 9}, "RFC 3566", aliases=("aes-xcbc",)),
    AuthenticationAlgorithm("aes-cmac", (128,), 12, {0: 253}, {0: 253}, "RFC 4494", aliases=("aes-cmac-96",)),
    AuthenticationAlgorithm(
        "aes-gmac", _AES_SALT4, 24, _GMAC_NUMBERS, _GMAC_NUMBERS, "RFC 4543", salt_length=4, iv_length=8,
        aliases=("aes-128-gmac", "aes-192-gmac", "aes-256-gmac"),
    ),
    AuthenticationAlgorithm(
        "hmac-md5", (128,), 12, {0: 2}, {0: 2}, "RFC 2403", legacy=True, aliases=("hmac-md5-96",)
    ),
)  # fmt: skip

_COMPRESSION: Final = (CompressionAlgorithm("deflate", 2, 90, 2, "RFC 2394"),)

SADB_X_AALG_NULL: Final = 251
"""``-A null`` and PF_KEY's explicit "no authentication", in both dialects; 0 means the same."""


ENCRYPTION: Final = {row.name: row for row in _ENCRYPTION}
"""Canonical name to row, strongest first."""
AUTHENTICATION: Final = {row.name: row for row in _AUTHENTICATION}
COMPRESSION: Final = {row.name: row for row in _COMPRESSION}
_ENCRYPTION_NAMES: Final = {name: row for row in _ENCRYPTION for name in (row.name, *row.aliases)}
_AUTHENTICATION_NAMES: Final = {name: row for row in _AUTHENTICATION for name in (row.name, *row.aliases)}


def encryption(name: str) -> EncryptionAlgorithm:
    """The ESP encryption algorithm of that setkey(8) name or alias, in any case; AlgorithmError if there is none."""
    row = _ENCRYPTION_NAMES.get(name.lower())
    if row is None:
        raise AlgorithmError(f"unknown encryption algorithm '{name}': use one of {', '.join(ENCRYPTION)}")
    return row


def authentication(name: str) -> AuthenticationAlgorithm:
    """The authentication algorithm of that setkey(8) name or alias, in any case; AlgorithmError if there is none."""
    row = _AUTHENTICATION_NAMES.get(name.lower())
    if row is None:
        raise AlgorithmError(f"unknown authentication algorithm '{name}': use one of {', '.join(AUTHENTICATION)}")
    return row


def compression(name: str) -> CompressionAlgorithm:
    """The IPComp algorithm of that setkey(8) name; AlgorithmError if there is none."""
    row = COMPRESSION.get(name.lower())
    if row is None:
        raise AlgorithmError(f"unknown compression algorithm '{name}': use one of {', '.join(COMPRESSION)}")
    return row


def encryption_by_number(number: int, dialect: Dialect = "linux") -> EncryptionAlgorithm:
    """The row whose ``SADB_EALG_*`` in that dialect is ``number``; AlgorithmError if there is none."""
    for row in _ENCRYPTION:
        if row.number(dialect) == number:
            return row
    raise AlgorithmError(f"unknown SADB_EALG number {number} in {dialect}'s pfkeyv2.h: use a supported algorithm")


def authentication_by_number(number: int, dialect: Dialect = "linux") -> AuthenticationAlgorithm | None:
    """The row whose ``SADB_AALG_*`` in that dialect is ``number``; None (no authentication) for 0 and 251."""
    if number in (0, SADB_X_AALG_NULL):
        return None
    for row in _AUTHENTICATION:
        if number in (row.linux if dialect == "linux" else row.freebsd).values():
            return row
    raise AlgorithmError(f"unknown SADB_AALG number {number} in {dialect}'s pfkeyv2.h: use a supported algorithm")


def compression_by_number(number: int) -> CompressionAlgorithm:
    """The row whose ``SADB_X_CALG_*`` is ``number`` (the same in both dialects); AlgorithmError if there is none."""
    for row in _COMPRESSION:
        if row.number == number:
            return row
    raise AlgorithmError(f"unknown SADB_X_CALG number {number}: 2 (deflate) is the one that is supported")


def check_combination(
    protocol: Protocol,
    enc: str | None,
    enc_key: Key,
    auth: str | None,
    auth_key: Key,
    allow_legacy: bool = False,
    allow_unauthenticated: bool = False,
) -> None:
    """Raise AlgorithmError, with the reason and the fix, unless these algorithms and keys may make an SA.

    The rules are those of RFC 8221 section 4 to 6 and of each algorithm's RFC: ESP must authenticate, combined-mode
    algorithms take no second authentication, keys have the exact lengths of the table.  ``allow_legacy`` admits
    3DES and MD5, ``allow_unauthenticated`` (reading old captures) an ESP SA whose authentication key is not known.
    """
    if protocol is Protocol.IPCOMP:
        if enc is not None or auth is not None or enc_key or auth_key:
            raise AlgorithmError("ipcomp takes a compression algorithm only: remove -E and -A, use '-C deflate'")
        return
    if protocol is Protocol.AH:
        if enc is not None:
            raise AlgorithmError(f"ah does not encrypt: remove the encryption algorithm '{enc}', or use esp")
        if auth is None:
            raise AlgorithmError("ah needs an authentication algorithm: add '-A hmac-sha2-256 KEY'")
        _check_authentication(authentication(auth), auth_key, allow_legacy)
        return
    if enc is None:
        raise AlgorithmError("esp needs an encryption algorithm: add '-E aes-gcm-16 KEY' or '-E null'")
    _check_esp(encryption(enc), enc_key, auth, auth_key, allow_legacy, allow_unauthenticated)


def _check_esp(
    row: EncryptionAlgorithm, key: Key, auth: str | None, auth_key: Key, allow_legacy: bool, allow_unauthenticated: bool
) -> None:
    _check_encryption(row, key, allow_legacy)
    if row.aead:
        if auth is not None or auth_key:
            raise AlgorithmError(f"{row.name} authenticates by itself: remove the authentication algorithm '{auth}'")
        return
    if auth is None:
        if allow_unauthenticated:
            return
        if row.name == "null":
            raise AlgorithmError(
                "esp null without authentication protects nothing (RFC 8221 section 5): add '-A hmac-sha2-256 KEY'"
            )
        raise AlgorithmError(
            f"esp {row.name} without authentication can be altered by anybody (RFC 8221 section 4): "
            "add '-A hmac-sha2-256 KEY', or use aes-gcm-16"
        )
    auth_row = authentication(auth)
    if auth_row.name == "aes-gmac" and row.name != "null":
        raise AlgorithmError(
            f"aes-gmac cannot authenticate esp {row.name} (RFC 4543: with null encryption only): use aes-gcm-16"
        )
    if allow_unauthenticated and not auth_key:
        return
    _check_authentication(auth_row, auth_key, allow_legacy)


def _check_encryption(row: EncryptionAlgorithm, key: Key, allow_legacy: bool) -> None:
    if row.legacy and not allow_legacy:
        raise AlgorithmError(f"{row.name} is legacy and weak (RFC 8221): use aes-gcm-16, or set allow_legacy = true")
    if key.bits not in row.key_bits:
        salt = f", the last {row.salt_length * 8} of them salt" if row.salt_length else ""
        raise AlgorithmError(f"{row.name} key of {key.bits} bits: must be {_choices(row.key_bits)} bits{salt}")
    if row.name == "3des-cbc":
        parts = {key.octets[i : i + 8] for i in (0, 8, 16)}
        if len(parts) < 3:
            raise AlgorithmError("3des-cbc key with equal parts is as weak as DES (RFC 2451): use three different ones")


def _check_authentication(row: AuthenticationAlgorithm, key: Key, allow_legacy: bool) -> None:
    if row.legacy and not allow_legacy:
        raise AlgorithmError(f"{row.name} is legacy and weak (RFC 8221): use hmac-sha2-256, or set allow_legacy = true")
    if key.bits not in row.key_bits:
        salt = f", the last {row.salt_length * 8} of them salt" if row.salt_length else ""
        raise AlgorithmError(f"{row.name} key of {key.bits} bits: must be {_choices(row.key_bits)} bits{salt}")


def _choices(bits: tuple[int, ...]) -> str:
    return " or ".join((", ".join(map(str, bits[:-1])), str(bits[-1]))) if len(bits) > 1 else str(bits[0])
