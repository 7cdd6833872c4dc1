"""Ciphers with prepared keys: what they do to the octets around the algorithm."""

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.crypto import cipher, registry
from ipsecq.errors import AlgorithmError
from ipsecq.secret import Key

HEADER = b"\0\0\x12\x34\0\0\0\x07"


def octets(bits):
    return bytes((7 * i + 3) % 256 for i in range(bits // 8))


def every_cipher():
    """(id, builder) for each algorithm with its longest key, and each authentication with AES-CBC."""
    for row in registry.ENCRYPTION.values():
        if row.aead:
            yield row.name, (row.name, Key(octets(row.key_bits[-1])), None, None)
        else:
            arguments = (row.name, Key(octets(row.key_bits[-1])), "hmac-sha2-256", Key(octets(256)))
            yield f"{row.name}+hmac-sha2-256", arguments
    for row in registry.AUTHENTICATION.values():
        if row.name != "aes-gmac":
            yield f"aes-cbc+{row.name}", ("aes-cbc", Key(octets(128)), row.name, Key(octets(row.key_bits[-1])))
    yield "null+aes-gmac", ("null", Key(b""), "aes-gmac", Key(octets(160)))


CIPHERS = dict(every_cipher())


@pytest.mark.parametrize("name", CIPHERS)
@pytest.mark.parametrize("high", [b"", b"\0\0\0\x05"], ids=["32 bits", "esn"])
def test_lengths_are_what_the_cipher_says(name, high):
    built = cipher.build(*CIPHERS[name])
    plaintext = bytes(48)
    sealed = built.seal(b"outer", HEADER, bytes(built.iv_length), plaintext, high)
    assert sealed[:13] == b"outer" + HEADER
    assert len(sealed) == 13 + built.iv_length + 48 + built.icv_length


@pytest.mark.parametrize("name", CIPHERS)
@settings(max_examples=15, deadline=None)
@given(
    blocks=st.integers(0, 20),
    iv=st.binary(min_size=16, max_size=16),
    high=st.sampled_from([b"", b"\0\0\0\0", b"\xff\0\0\x01"]),
    kind=st.sampled_from([bytes, bytearray, memoryview]),
    prefix=st.binary(max_size=40),
)
def test_what_was_sealed_opens_in_every_kind_of_buffer(name, blocks, iv, high, kind, prefix):
    sender, receiver = cipher.build(*CIPHERS[name]), cipher.build(*CIPHERS[name])
    plaintext = octets(blocks * 16 * 8)
    sealed = sender.seal(prefix, HEADER, iv[: sender.iv_length], plaintext, high)
    assert receiver.open(kind(sealed), len(prefix), high) == plaintext


@pytest.mark.parametrize("name", CIPHERS)
def test_no_flipped_bit_is_accepted(name):
    built = cipher.build(*CIPHERS[name])
    sealed = bytearray(built.seal(b"", HEADER, octets(8 * built.iv_length), octets(256), b""))
    for position in range(len(sealed) * 8):
        sealed[position // 8] ^= 1 << position % 8
        assert built.open(sealed, 0, b"") is None, position
        sealed[position // 8] ^= 1 << position % 8
    assert built.open(sealed, 0, b"") == octets(256)


@pytest.mark.parametrize("name", CIPHERS)
def test_a_wrong_high_half_of_the_sequence_is_refused(name):
    built = cipher.build(*CIPHERS[name])
    sealed = built.seal(b"", HEADER, octets(8 * built.iv_length), octets(256), b"\0\0\0\x01")
    assert built.open(sealed, 0, b"\0\0\0\x02") is None
    assert built.open(sealed, 0, b"\0\0\0\0") is None
    assert built.open(sealed, 0, b"") is None
    assert built.open(sealed, 0, b"\0\0\0\x01") == octets(256)


@pytest.mark.parametrize("name", ["aes-cbc", "3des-cbc"])
def test_cbc_sends_an_iv_that_is_the_cipher_of_what_only_the_sender_knows(name):
    """The IV is E(random block xor the last block sent): with the same random block twice it still never repeats."""
    bits = registry.encryption(name).key_bits[0]
    built = cipher.build(name, Key(octets(bits)), "hmac-sha1", Key(octets(160)))
    block = built.block
    seen = {built.seal(b"", HEADER, bytes(block), bytes(block), b"")[8 : 8 + block] for _ in range(200)}
    assert len(seen) == 200


def test_cbc_is_plain_cbc_to_a_receiver_with_a_fresh_context_for_each_packet():
    key = octets(128)
    built = cipher.build("aes-cbc", Key(key), "hmac-sha1", Key(octets(160)))
    for number in range(5):
        plaintext = octets(8 * 16 * (number + 1))
        sealed = built.seal(b"", HEADER, octets(128), plaintext, b"")
        fresh = Cipher(algorithms.AES(key), modes.CBC(sealed[8:24])).decryptor()
        assert fresh.update(sealed[24:-12]) + fresh.finalize() == plaintext


def test_cbc_refuses_an_iv_of_the_wrong_length_rather_than_shift_every_later_packet():
    built = cipher.build("aes-cbc", Key(octets(128)), "hmac-sha1", Key(octets(160)))
    for iv in (b"", bytes(8), bytes(17)):
        with pytest.raises(ValueError, match="16 random octets"):
            built.seal(b"", HEADER, iv, bytes(16), b"")


def test_packets_open_in_any_order_though_the_cbc_context_is_kept():
    arguments = CIPHERS["aes-cbc+hmac-sha2-256"]
    sender, receiver = cipher.build(*arguments), cipher.build(*arguments)
    sealed = [sender.seal(b"", HEADER, octets(128), bytes((i,)) * 32, b"") for i in range(6)]
    for i in (3, 0, 5, 5, 1):
        assert receiver.open(sealed[i], 0, b"") == bytes((i,)) * 32


def test_a_short_gcm_tag_is_the_start_of_the_long_one():
    key = Key(octets(160))
    long = cipher.build("aes-gcm-16", key).seal(b"", HEADER, bytes(8), octets(256), b"")
    assert cipher.build("aes-gcm-12", key).seal(b"", HEADER, bytes(8), octets(256), b"") == long[:-4]
    assert cipher.build("aes-gcm-8", key).seal(b"", HEADER, bytes(8), octets(256), b"") == long[:-8]


def test_null_with_aes_gmac_is_the_same_by_both_spellings():
    key = Key(octets(160))
    combined = cipher.build("aes-gmac", key).seal(b"", HEADER, bytes(8), octets(256), b"")
    assert cipher.build("null", Key(b""), "aes-gmac", key).seal(b"", HEADER, bytes(8), octets(256), b"") == combined


def test_an_icv_whose_key_is_lost_is_skipped_only_when_asked_for():
    arguments = CIPHERS["aes-cbc+hmac-sha1"]
    sealed = cipher.build(*arguments).seal(b"", HEADER, octets(128), octets(256), b"")
    reader = cipher.build(arguments[0], arguments[1], "hmac-sha1", Key(b""), unauthenticated=True)
    assert reader.open(sealed, 0, b"") == octets(256)
    with pytest.raises(AlgorithmError, match="no authentication"):
        cipher.build("aes-cbc", arguments[1])


@pytest.mark.parametrize("name", list(registry.AUTHENTICATION))
def test_icv_functions_take_their_input_in_any_pieces(name):
    row = registry.authentication(name)
    function = cipher.icv(name, Key(octets(row.key_bits[0])))
    message, iv = octets(800), bytes(8)
    whole = function.compute((message,), iv)
    assert len(whole) == function.length == row.icv_length
    assert function.compute((message[:1], b"", memoryview(message)[1:37], message[37:]), iv) == whole
    assert function.verify((message,), whole)
    assert function.verify((message,), memoryview(whole))
    for position in range(len(whole) * 8):
        wrong = bytearray(whole)
        wrong[position // 8] ^= 1 << position % 8
        assert not function.verify((message,), wrong)
