"""The replay window against a naive set of everything that was seen."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.sa.association import SLOT_HEADER_WORDS, Slot, slot_words
from ipsecq.sa.replay import MAX_REPLAY_WINDOW, ReplayWindow

BASE = 7
CANARY = 0xDEADBEEFDEADBEEF


def table(size: int) -> memoryview:
    words = memoryview(bytearray(8 * (BASE + slot_words(size) + 1))).cast("Q")
    words[BASE - 1] = words[BASE + slot_words(size)] = CANARY
    return words


class Oracle:
    """RFC 4303 in words: unseen, within the window or ahead of it; with ESN the only number that fits the low half."""

    def __init__(self, size: int, esn: bool, edge: int) -> None:
        self.size, self.esn, self.edge, self.seen = size, esn, edge, {edge}

    def check(self, low: int) -> int:
        left = self.edge - self.size + 1
        # With ESN the number is the one with these low bits in [left, left + 2^32).
        number = left + (low - left) % (1 << 32) if self.esn else low
        if number <= 0 or number >= 1 << 64 or number < left or number in self.seen:
            return -1
        return number

    def update(self, number: int) -> None:
        self.seen.add(number)
        self.edge = max(self.edge, number)


@st.composite
def histories(draw):
    esn = draw(st.booleans())
    size = draw(st.sampled_from([1, 31, 32, 33, 63, 64, 65, 128, 1000, 4096]))
    most = (1 << 64) - 1 if esn else (1 << 32) - 1
    edges = [0, 1, size - 1, size, (1 << 32) - 2, (1 << 32) - 1] + ([1 << 32, (1 << 32) + size, (5 << 32) - 3, most - 3]
                                                                  if esn else [])
    edge = draw(st.sampled_from(edges))
    near = st.integers(-3 * size, 3 * size)
    far = st.sampled_from([64, 100_000, 1 << 31, (1 << 31) + 1, (1 << 32) - 1, (1 << 32) - size - 1])
    steps = draw(st.lists(st.tuples(near | far, st.booleans()), max_size=60))
    return esn, size, edge, steps


@settings(max_examples=300, deadline=None)
@given(histories())
def test_accepts_exactly_what_the_naive_set_accepts(history):
    esn, size, edge, steps = history
    words = table(size)
    words[BASE + Slot.SEQUENCE] = edge
    window, oracle = ReplayWindow(words, BASE, size, esn), Oracle(size, esn, edge)
    if edge:
        # The edge itself was received, or it would not be the edge.
        words[BASE + Slot.WINDOW + (edge >> 6) % (slot_words(size) - SLOT_HEADER_WORDS)] |= 1 << (edge & 63)
    for distance, authentic in steps:
        low = (oracle.edge + distance) & 0xFFFFFFFF
        number = window.check(low)
        assert number == oracle.check(low)
        if number >= 0 and authentic:
            assert window.update(number)
            oracle.update(number)
            assert window.check(low) != number
        assert window.edge == oracle.edge
    assert words[BASE - 1] == words[BASE + slot_words(size)] == CANARY


def test_a_packet_that_fails_authentication_moves_nothing():
    window = ReplayWindow(table(64), BASE, 64)
    assert window.check(1 << 30) == 1 << 30
    assert window.check(1) == 1
    assert window.edge == 0


def test_the_second_copy_in_one_batch_is_found_by_update():
    window = ReplayWindow(table(64), BASE, 64)
    assert window.check(9) == window.check(9) == 9
    assert window.update(9)
    assert not window.update(9)
    assert window.update(500)
    assert not window.update(10)


@pytest.mark.parametrize("esn", [False, True])
def test_sequence_zero_is_refused_on_a_fresh_window(esn):
    assert ReplayWindow(table(64), BASE, 64, esn).check(0) == -1


def test_low_half_zero_is_fine_once_the_high_half_is_not():
    words = table(64)
    words[BASE + Slot.SEQUENCE] = (1 << 32) - 1
    window = ReplayWindow(words, BASE, 64, esn=True)
    assert window.check(0) == 1 << 32


def test_a_late_packet_from_before_the_wrap_keeps_the_old_high_half():
    words = table(64)
    words[BASE + Slot.SEQUENCE] = 1 << 32
    window = ReplayWindow(words, BASE, 64, esn=True)
    assert window.check(0xFFFFFFFF) == 0xFFFFFFFF
    assert window.check(0xFFFFFFFF - 63) == (2 << 32) - 64  # left of the window can only mean the far future


def test_the_window_off_takes_everything():
    window = ReplayWindow(table(0), BASE, 0)
    assert [window.check(low) for low in (0, 5, 5, 0xFFFFFFFF)] == [0, 5, 5, 0xFFFFFFFF]
    assert window.update(5)
    assert window.update(5)


def test_the_largest_window_remembers_its_whole_width():
    window = ReplayWindow(table(MAX_REPLAY_WINDOW), BASE, MAX_REPLAY_WINDOW)
    window.update(3)
    window.update(MAX_REPLAY_WINDOW + 2)
    assert window.check(3) == -1
    assert window.check(4) == 4
    assert window.check(2) == -1


def test_a_worker_that_takes_over_goes_on_with_the_same_window():
    words = table(128)
    first = ReplayWindow(words, BASE, 128)
    for number in (1, 2, 100):
        first.update(number)
    second = ReplayWindow(words, BASE, 128)
    assert [second.check(number) for number in (1, 2, 100, 3, 101)] == [-1, -1, -1, 3, 101]


@pytest.mark.parametrize("how", ["update", "advance"])
@pytest.mark.parametrize("ahead", [1, 64, 200, 100_000])
def test_a_worker_that_dies_within_an_update_lets_no_older_number_in_again(ahead, how):
    class Dying(list):
        left = 1 << 30

        def __setitem__(self, index, value):
            if self.left == 0:
                raise InterruptedError
            self.left -= 1
            super().__setitem__(index, value)

    stores = 0
    while True:
        words = Dying(table(128))
        window = ReplayWindow(words, BASE, 128)
        taken = [number for number in range(1000, 1100) if window.update(number)]
        words.left = stores
        try:
            if how == "update":
                window.update(taken[-1] + ahead)
            else:
                window.advance(taken[-1] + 1, ahead)
        except InterruptedError:
            stores += 1
        else:
            break
        words.left = 1 << 30
        assert [number for number in taken if ReplayWindow(words, BASE, 128).check(number) != -1] == []
    assert stores >= 2


@pytest.mark.parametrize(("size", "esn"), [(-1, False), (MAX_REPLAY_WINDOW + 1, False), (0, True)])
def test_impossible_windows_are_refused(size, esn):
    with pytest.raises(ValueError, match="window"):
        ReplayWindow(table(64), BASE, size, esn)
