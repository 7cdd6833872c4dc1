"""Compiled loops do what the plain modules do, to the octet, and refuse what does not fit."""

from __future__ import annotations

import random

import pytest
from engine_peers import udp
from engine_traffic import CHANGES, INNER, STEPS, changed, normal, sources, tcp
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq import compiled
from ipsecq.crypto.aead import ChaChaCipher, GcmCipher, ShortGcmCipher
from ipsecq.engine import inbound_run, outbound_run
from ipsecq.packet import rows
from ipsecq.packet.segments import split

pytestmark = pytest.mark.skipif(not compiled.active, reason=f"compiled modules: {compiled.missing}")

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
    assert fast.open_run([sealed, sealed], 8, high) == [plaintext] * 2


@pytest.mark.parametrize(("name", "length", "icv"), CIPHERS)
def test_every_octet_is_authenticated_and_a_failure_spoils_nothing(name, length, icv):
    fast, plain = pair(name, length, icv)
    sealed = plain.seal(b"", bytes(8), bytes(8), b"fourteen octet", b"")
    for at in range(len(sealed)):
        forged = bytearray(sealed)
        forged[at] ^= 0x80
        assert fast.open(forged, 0, b"") is None
        assert fast.open_run([sealed, forged, sealed], 0, b"") == [b"fourteen octet"]
    assert fast.open(sealed, 0, b"\0\0\0\1") is None
    assert fast.open(sealed, 0, b"") == b"fourteen octet"


@pytest.mark.parametrize(
    ("chacha", "key", "salt", "icv"),
    [(False, 15, 4, 16), (False, 16, 3, 16), (False, 16, 4, 17), (True, 16, 4, 16), (True, 32, 4, 8)],
)
def test_keys_and_salts_of_a_wrong_length_are_refused(chacha, key, salt, icv):
    with pytest.raises(ValueError, match=r"octets|length"):
        compiled.aead.Aead(chacha, bytes(key), bytes(salt), icv)


def test_lengths_that_lie_are_refused_not_followed():
    fast, _ = pair("aes-gcm", 16, 16)
    packet = tcp(4, 3000)
    good = [packet, len(packet), 20, 40, 1000, 0, 1, 1, False, b"", 0]
    for place, value in ((1, 65535), (1, 40), (2, 0), (3, 10), (3, len(packet)), (4, 0), (4, -5)):
        bad = list(good)
        bad[place] = value
        with pytest.raises(ValueError, match="do not fit"):
            fast.seal_segments(*bad)
    with pytest.raises(ValueError, match="too short"):
        fast.seal_equal([packet, packet[:-1]], len(packet), 20, False, 0, 1, 1, False, b"", 0)
    with pytest.raises(ValueError, match="no room"):
        fast.seal_equal([bytes(24)], 24, 20, True, 0, 1, 1, False, b"", 0)
    assert fast.open(bytes(31), 0, b"") is None
    assert fast.open(bytes(100), 90, b"") is None


def whole(packets: list[bytes], pieces) -> list[bytes]:
    """What pieces stand for."""
    out, at = [], 0
    for piece in pieces:
        assert piece.first == at
        at = piece.end
        out += packets[piece.first : piece.end] if piece.run is None else split(b"".join(piece.run.parts), piece.run.size)
        assert piece.run is None or piece.run.number == piece.end - piece.first
    assert at in {len(packets), len(packets) - 1}
    return [normal(packet) for packet in out + packets[at:]]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [100, 537, 1348])
def test_what_the_plain_module_unites_the_compiled_one_does(version, size):
    for packets in (
        split(tcp(version, 30 * size + 99, flags=0x18), size),
        [udp(*INNER[version], bytes([n]) * size, df=True) for n in range(100)],
    ):
        length = len(packets[0])
        equal = [packet for packet in packets if len(packet) == length]
        tail = b"".join(packets[len(equal) :])
        padded = [packet + bytes(-length % 4) for packet in equal]
        expected = rows.unite(padded, length, tail)
        found = compiled.rows.unite(padded, length, tail)
        assert [piece[:2] for piece in found] == [piece[:2] for piece in expected]
        for one, other in zip(found, expected, strict=True):
            assert [b"".join(one.run.parts), *one.run[1:]] == [b"".join(other.run.parts), *other.run[1:]]


MIX = st.lists(st.tuples(STEPS, st.sampled_from([4, 6])), max_size=6)


@settings(max_examples=150, deadline=None)
@given(MIX, CHANGES)
def test_uniting_loses_and_invents_nothing(steps, changes):
    packets = [packet for number, (step, version) in enumerate(steps) for packet in sources(step, version, 70000 * number)]
    packets = changed(packets, changes)
    for length in {len(packet) for packet in packets}:
        equal = [packet for packet in packets if len(packet) == length]
        if length >= 20:
            assert whole(equal, compiled.rows.unite(equal, length)) == [normal(packet) for packet in equal]
            tail = next((packet for packet in packets if 20 <= len(packet) < length), b"")
            packets_of_both = [*equal, tail] if tail else equal
            assert whole(packets_of_both, compiled.rows.unite(equal, length, tail)) == [
                normal(packet) for packet in packets_of_both
            ]


@settings(max_examples=300, deadline=None)
@given(MIX, CHANGES, st.sampled_from([4, 6]), st.booleans())
def test_both_find_the_same_packets_alike(steps, changes, version, encapsulated):
    packets = [packet for number, (step, _) in enumerate(steps) for packet in sources(step, version, 70000 * number)]
    packets = [packet for packet in changed(packets, changes) if len(packet) >= 60]
    for start in range(0, len(packets), 3):
        some = packets[start:]
        assert compiled.alike.inbound(some, version, encapsulated) == inbound_run.alike(some, version, encapsulated)
        protocol = 17 if encapsulated else 6
        assert compiled.alike.outbound(some, version, protocol, len(some[0])) == outbound_run.alike(
            some, version, protocol, len(some[0])
        )
