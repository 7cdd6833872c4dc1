"""IPComp: never longer, never wrong, never more than the limit."""

import os
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.counters import Counter
from ipsecq.errors import AlgorithmError
from ipsecq.transforms.ipcomp import IpcompTransform

IPCOMP = IpcompTransform(2)
REASONS = {0, Counter.IPCOMP_HDROPS, Counter.IPCOMP_INVALID, Counter.IPCOMP_BOMB}
INVALID = (Counter.IPCOMP_INVALID, 0, b"")
BOMB = (Counter.IPCOMP_BOMB, 0, b"")


def deflate(payload, window=-15, level=9, strategy=zlib.Z_DEFAULT_STRATEGY):
    compressor = zlib.compressobj(level, zlib.DEFLATED, window, 8, strategy)
    return compressor.compress(payload) + compressor.flush()


compressible = st.builds(
    lambda words, count: b" ".join(words * count)[:65535],
    st.lists(st.binary(max_size=12), max_size=30),
    st.integers(0, 200),
)


@settings(max_examples=200, deadline=None)
@given(
    payload=st.one_of(compressible, st.binary(max_size=4000)),
    next_header=st.integers(0, 255),
    cpi=st.integers(1, 65535),
)
def test_what_is_sent_compressed_is_shorter_and_opens(payload, next_header, cpi):
    sa = IpcompTransform(cpi)
    sealed = sa.seal(payload, next_header)
    if sealed is not None:
        assert len(payload) >= 90
        assert len(sealed) < len(payload)
        assert sealed[:4] == bytes((next_header, 0)) + cpi.to_bytes(2, "big")
        assert sa.open(sealed, len(payload)) == (0, next_header, payload)
        assert sa.open(memoryview(sealed), 65535) == (0, next_header, payload)


def test_below_the_threshold_of_90_octets_nothing_is_compressed():
    assert IPCOMP.seal(bytes(89), 6) is None
    assert IPCOMP.seal(bytes(90), 6) is not None


def test_what_would_not_get_shorter_is_not_sent_compressed():
    assert IPCOMP.seal(os.urandom(1400), 6) is None


def test_linux_can_inflate_what_we_send_within_its_window_of_2_kib():
    rng = random.Random(1)
    payload = bytes(rng.choices(b"abc", k=1000)) * 9
    sealed = IPCOMP.seal(payload, 6)
    inflater = zlib.decompressobj(-11)
    # In pieces, so that the window and not the output holds what is referred to.
    pieces = [inflater.decompress(sealed[i : i + 50]) for i in range(4, len(sealed), 50)]
    assert b"".join(pieces) == payload


@pytest.mark.parametrize("window", range(-15, -8))
@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_peer_may_use_any_window_and_any_kind_of_block(window, level):
    payload = bytes(random.Random(2).choices(b"abcdefgh", k=5000))
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
        packet = b"\x06\0\0\x02" + deflate(payload, window, level, strategy)
        assert IPCOMP.open(packet, 5000) == (0, 6, payload)


def test_flags_and_any_cpi_are_ignored_as_rfc_3173_says():
    body = deflate(b"x" * 100)
    assert IPCOMP.open(b"\x11\xff\xab\xcd" + body, 100) == (0, 17, b"x" * 100)


def test_the_limit_is_exact():
    packet = b"\x06\0\0\x02" + deflate(bytes(1000))
    assert IPCOMP.open(packet, 1000)[0] == 0
    assert IPCOMP.open(packet, 999) == BOMB
    assert IPCOMP.open(packet, 1) == BOMB


def test_a_bomb_is_dropped_before_it_unfolds():
    bomb = b"\x06\0\0\x02" + deflate(bytes(60_000_000))
    assert len(bomb) < 65535
    assert IPCOMP.open(bomb, 65535) == BOMB


def test_trailing_octets_truncation_and_emptiness_are_invalid():
    whole = b"\x06\0\0\x02" + deflate(bytes(range(256)))
    assert IPCOMP.open(whole, 65535)[0] == 0
    assert IPCOMP.open(whole + b"\0", 65535) == INVALID
    for end in range(5, len(whole)):
        assert IPCOMP.open(whole[:end], 65535) == INVALID
    for end in range(5):
        assert IPCOMP.open(whole[:end], 65535)[0] == Counter.IPCOMP_HDROPS
    assert IPCOMP.open(b"\x06\0\0\x02" + deflate(b""), 65535) == INVALID


@settings(max_examples=500, deadline=None)
@given(body=st.binary(max_size=300), limit=st.integers(1, 65535))
def test_hostile_octets_are_dropped_with_a_reason_and_nothing_raised(body, limit):
    reason, next_header, payload = IPCOMP.open(b"\x06\0\0\x02" + body, limit)
    assert reason in REASONS
    assert len(payload) <= limit
    assert (reason == 0) == (next_header == 6)


def test_twenty_thousand_damaged_buffers():
    """``python tests/faults/ipcomp_hostile.py`` runs the same by the million."""
    rng = random.Random(3)
    good = bytearray(b"\x06\0\0\x02" + deflate(bytes(rng.choices(range(60), k=1400))))
    seen = set()
    for _ in range(20_000):
        damaged = good.copy()
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(4, len(damaged))] = rng.randrange(256)
        reason, _, payload = IPCOMP.open(damaged, 4000)
        assert reason in REASONS
        assert len(payload) <= 4000
        seen.add(reason)
    assert Counter.IPCOMP_INVALID in seen


def test_only_deflate_is_known():
    with pytest.raises(AlgorithmError, match="'lzs'"):
        IpcompTransform(3, "lzs")
