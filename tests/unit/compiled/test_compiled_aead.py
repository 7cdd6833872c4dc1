"""The compiled cipher does what the library does, to the octet, and refuses what does not fit."""

from __future__ import annotations

import random

import pytest

from ipsecq import compiled
from ipsecq.crypto.aead import ChaChaCipher, GcmCipher, ShortGcmCipher

KEYS = {"aes-gcm": (16, 24, 32), "chacha": (32,)}


def pair(name: str, length: int, icv: int):
    key, salt = random.Random(length + icv).randbytes(length), b"salt"
    fast = compiled.aead.Aead(name == "chacha", key, salt, icv)
    if name == "chacha":
        return fast, ChaChaCipher(key, salt)
    return fast, GcmCipher(key, salt) if icv == 16 else ShortGcmCipher(key, salt, icv)


CIPHERS = [("aes-gcm", length, icv) for length in KEYS["aes-gcm"] for icv in (8, 12, 16)] + [("chacha", 32, 16)]


@pytest.mark.parametrize(("name", "length", "icv"), CIPHERS)
@pytest.mark.parametrize("high", [b"", b"\0\0\0\7"])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1400, 65000])
def test_one_packet_is_sealed_and_opened_as_by_the_library(name, length, icv, high, size):
    fast, plain = pair(name, length, icv)
    header, iv, plaintext = b"\0\0\x10\1\0\0\0\5", b"\0\0\0\7\0\0\0\5", random.Random(size).randbytes(size)
    sealed = plain.seal(b"in front", header, iv, plaintext, high)
    assert fast.seal(b"in front", header, iv, plaintext, high) == sealed
    assert fast.seal(bytearray(b"in front"), header, iv, memoryview(plaintext), high) == sealed
    assert fast.open(sealed, 8, high) == plaintext
    assert fast.open(memoryview(sealed)[8:], 0, high) == plaintext


@pytest.mark.parametrize(("name", "length", "icv"), CIPHERS)
def test_every_octet_is_authenticated_and_a_failure_spoils_nothing(name, length, icv):
    fast, plain = pair(name, length, icv)
    sealed = plain.seal(b"", bytes(8), bytes(8), b"fourteen octet", b"")
    for at in range(len(sealed)):
        forged = bytearray(sealed)
        forged[at] ^= 0x80
        assert fast.open(forged, 0, b"") is None
    assert fast.open(sealed, 0, b"\0\0\0\1") is None
    assert fast.open(sealed, 0, b"") == b"fourteen octet"


@pytest.mark.parametrize(
    ("chacha", "key", "salt", "icv"),
    [(False, 15, 4, 16), (False, 16, 3, 16), (False, 16, 4, 17), (True, 16, 4, 16), (True, 32, 4, 8)],
)
def test_keys_and_salts_of_a_wrong_length_are_refused(chacha, key, salt, icv):
    with pytest.raises(ValueError, match=r"octets|length"):
        compiled.aead.Aead(chacha, bytes(key), bytes(salt), icv)


@pytest.mark.parametrize(("name", "length", "icv"), CIPHERS)
@pytest.mark.parametrize("esn", [False, True])
def test_a_run_is_sealed_as_its_packets_are(name, length, icv, esn):
    fast, plain = pair(name, length, icv)
    plaintexts = [bytes([n]) * n for n in range(70)]
    first = 2**32 - 30 if esn else 7
    whole = [
        plain.seal(
            b"", b"\0\0\x10\1" + (number & 0xFFFFFFFF).to_bytes(4), number.to_bytes(8), plaintext,
            (number >> 32).to_bytes(4) if esn else b"",
        )[16:]
        for number, plaintext in enumerate(plaintexts, first)
    ]  # fmt: skip
    assert fast.seal_run(0x1001, first, [memoryview(plaintext) for plaintext in plaintexts], esn) == whole


def test_what_is_too_short_is_not_opened():
    fast, _ = pair("aes-gcm", 16, 16)
    assert fast.open(bytes(31), 0, b"") is None
    assert fast.open(bytes(100), 90, b"") is None
    assert fast.open(bytes(100), 200, b"") is None
