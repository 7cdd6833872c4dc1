"""ESP around the ciphers: padding, lengths, and every malformed packet counted and none raised."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.counters import Counter
from ipsecq.crypto import cipher, registry
from ipsecq.secret import Key
from ipsecq.transforms import esp
from ipsecq.transforms.esp import EspTransform


def octets(bits):
    return bytes((11 * i + 5) % 256 for i in range(bits // 8))


def every_pair():
    for enc in registry.ENCRYPTION.values():
        if enc.aead:
            yield enc.name, None
        else:
            for auth in registry.AUTHENTICATION:
                if auth != "aes-gmac" or enc.name == "null":
                    yield enc.name, auth


PAIRS = list(every_pair())


def transform(enc="aes-gcm-16", auth=None, **options):
    enc_key = Key(octets(registry.encryption(enc).key_bits[0]))
    auth_key = Key(octets(registry.authentication(auth).key_bits[0])) if auth else None
    return EspTransform(0xC0FFEE, cipher.build(enc, enc_key, auth, auth_key), **options)


@pytest.mark.parametrize("esn", [False, True], ids=["32 bits", "esn"])
@pytest.mark.parametrize(("enc", "auth"), PAIRS)
@settings(max_examples=12, deadline=None)
@given(
    payload=st.binary(max_size=300),
    next_header=st.integers(0, 255),
    sequence=st.integers(1, 2**64 - 1),
    noise=st.binary(min_size=16, max_size=16),
    prefix=st.binary(max_size=30),
)
def test_open_of_seal_is_the_payload(enc, auth, esn, payload, next_header, sequence, noise, prefix):
    if not esn:
        sequence = sequence & 0xFFFFFFFF or 1
    sender, receiver = transform(enc, auth, esn=esn), transform(enc, auth, esn=esn)
    packet = sender.seal(payload, next_header, sequence, noise[: sender.random_length], prefix)
    assert len(packet) == len(prefix) + sender.sealed_length(len(payload))
    assert packet[: len(prefix) + 8] == prefix + struct.pack(">II", 0xC0FFEE, sequence & 0xFFFFFFFF)
    assert receiver.open(packet, len(prefix), sequence) == (0, next_header, payload)
    assert receiver.open(memoryview(packet), len(prefix), sequence) == (0, next_header, payload)


@pytest.mark.parametrize(("enc", "auth"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_altered_octet_is_accepted(enc, auth, data):
    sa = transform(enc, auth, esn=data.draw(st.booleans()))
    packet = bytearray(sa.seal(data.draw(st.binary(max_size=60)), 4, 7, octets(8 * sa.random_length)))
    position = data.draw(st.integers(0, len(packet) - 1))
    packet[position] ^= data.draw(st.integers(1, 255))
    assert sa.open(packet, 0, 7) == (Counter.ESP_BADAUTH, 0, b"")


@pytest.mark.parametrize(("enc", "auth"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(packet=st.binary(max_size=120), offset=st.integers(0, 130), sequence=st.integers(0, 2**64 - 1))
def test_hostile_octets_are_dropped_with_a_reason_and_nothing_raised(enc, auth, packet, offset, sequence):
    reason, next_header, payload = transform(enc, auth).open(packet, offset, sequence)
    assert reason in {Counter.ESP_HDROPS, Counter.ESP_BADILEN, Counter.ESP_BADAUTH}
    assert (next_header, payload) == (0, b"")


@pytest.mark.parametrize(("enc", "auth"), [("aes-gcm-16", None), ("aes-cbc", "hmac-sha1"), ("null", "hmac-sha2-512")])
def test_truncated_packets_are_hdrops_or_badilen_or_badauth(enc, auth):
    sa = transform(enc, auth)
    packet = sa.seal(bytes(100), 4, 1, octets(8 * sa.random_length))
    fixed = 8 + sa.iv_length + sa.cipher.icv_length
    align = max(4, sa.cipher.block)
    for length in range(len(packet)):
        reason = sa.open(packet[:length], 0, 1)[0]
        if length < fixed + align:
            assert reason == Counter.ESP_HDROPS
        elif (length - fixed) % align:
            assert reason == Counter.ESP_BADILEN
        else:
            assert reason == Counter.ESP_BADAUTH


def test_a_packet_after_a_badly_sized_one_still_opens():
    """A kept CBC context must never see part of a block."""
    sa = transform("aes-cbc", "hmac-sha1")
    packet = sa.seal(b"payload", 4, 1, bytes(16))
    assert sa.open(packet + b"\0", 0, 1)[0] == Counter.ESP_BADILEN
    assert sa.open(packet, 0, 1) == (0, 4, b"payload")


@pytest.mark.parametrize("enc", ["aes-gcm-16", "aes-cbc", "3des-cbc", "null", "aes-ctr"])
def test_padding_is_1_2_3_and_no_longer_than_it_must_be(enc):
    auth = None if registry.encryption(enc).aead else "hmac-sha1"
    sa = transform(enc, auth)
    align = max(4, registry.encryption(enc).block)
    for length in range(2 * align + 1):
        packet = sa.seal(bytes(length), 59, 1, bytes(sa.random_length))
        plaintext = sa.cipher.open(packet, 0, b"")
        pad = plaintext[-2]
        assert len(plaintext) % align == 0
        assert pad < align
        assert plaintext[length:] == bytes(range(1, pad + 1)) + bytes((pad, 59))


PADDINGS = [
    (b"\x01\x02\x02\x04", True),
    (b"abcd" + bytes(range(1, 255)) + b"\xfe\x04", True),
    (bytes(range(1, 255)) + b"\xfe\x04", True),
    (bytes(range(1, 255)) + b"\xff\x04", False),  # one more than there is
    (b"\x01\x01\x02\x04", False),
    (b"\0\0\x02\x04", False),
    (b"\x02\x01\x02\x04", False),
    (b"ab\x03\x04", False),
    (b"ab\xff\x04", False),
]


@pytest.mark.parametrize(("plaintext", "good"), PADDINGS)
def test_authentic_padding_is_checked_by_rfc_4303_section_2_4(plaintext, good):
    sa = transform()
    packet = sa.cipher.seal(b"", struct.pack(">II", 0xC0FFEE, 1), bytes(8), plaintext, b"")
    reason, next_header, payload = sa.open(packet, 0, 1)
    if good:
        assert (reason, next_header, payload) == (0, 4, plaintext[: -2 - plaintext[-2]])
    else:
        assert (reason, payload) == (Counter.ESP_BADENC, b"")


@pytest.mark.parametrize(("enc", "auth"), PAIRS)
def test_max_payload_is_the_longest_that_fits(enc, auth):
    sa = transform(enc, auth)
    for available in range(60, 400):
        length = sa.max_payload(available)
        if length >= 0:
            assert sa.sealed_length(length) <= available
        assert sa.sealed_length(max(0, length + 1)) > available


@pytest.mark.parametrize("enc", ["aes-gcm-16", "aes-cbc"])
def test_tfc_padding_hides_the_length_behind_the_payload(enc):
    auth = None if enc == "aes-gcm-16" else "hmac-sha2-256"
    sa = transform(enc, auth)
    for length in (0, 1, 199, 200, 201, 300):
        payload = b"\x45" * length
        packet = sa.seal(payload, 4, 1, bytes(sa.random_length), fill=200)
        assert len(packet) == sa.sealed_length(max(length, 200))
        reason, next_header, opened = sa.open(packet, 0, 1)
        assert (reason, next_header) == (0, 4)
        assert opened == payload + bytes(max(0, 200 - length))


def test_an_esn_is_authenticated_but_not_sent():
    sender = transform(esn=True)
    packet = sender.seal(b"x", 4, (5 << 32) + 9)
    assert packet[4:8] == b"\0\0\0\x09"
    assert sender.open(packet, 0, (5 << 32) + 9)[0] == 0
    assert sender.open(packet, 0, (4 << 32) + 9)[0] == Counter.ESP_BADAUTH
    assert transform().open(packet, 0, 9)[0] == Counter.ESP_BADAUTH


def test_counter_modes_make_their_iv_of_the_whole_sequence_number():
    sa = transform(esn=True)
    assert sa.seal(b"", 59, (1 << 40) + 3)[8:16] == ((1 << 40) + 3).to_bytes(8, "big")
    assert sa.random_length == 0
    assert transform("aes-cbc", "hmac-sha1").random_length == 16
    assert transform("null", "hmac-sha1").random_length == 0


def test_header_reads_spi_and_sequence_or_says_that_they_are_not_there():
    assert esp.header(b"..\0\0\x01\0\0\0\0\x02", 2) == (256, 2)
    assert esp.header(b"\0\0\x01\0\0\0\0", 0) is None
