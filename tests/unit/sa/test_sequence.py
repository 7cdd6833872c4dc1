"""Outbound sequence numbers: unique, consecutive within a run, never past the limit."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ipsecq.sa.sequence import LIMIT_32, LIMIT_64, OutboundSequence


class Leases:
    """Blocks of a shared counter, as two workers would take them in turn."""

    def __init__(self, block: int, start: int = 1, end: int = LIMIT_32 + 1) -> None:
        self.next, self.block, self.end, self.calls = start, block, end, 0

    def __call__(self) -> tuple[int, int]:
        self.calls += 1
        first = self.next
        self.next = min(first + self.block, self.end)
        return (first, self.next) if first < self.next else (0, 0)


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 1), st.integers(1, 40)), max_size=80))
def test_two_workers_never_send_the_same_number(block, takes):
    leases = Leases(block)
    # A run longer than a block needs two blocks in a row: here nobody comes between.
    workers = [OutboundSequence(leases, LIMIT_32) for _ in range(2)]
    used: set[int] = set()
    for worker, n in takes:
        first = workers[worker].take(n)
        run = set(range(first, first + n))
        assert first >= 1
        assert not used & run
        used |= run


@given(st.integers(1, 7), st.integers(1, 64))
def test_nothing_is_sent_past_the_last_number_of_32_bits(block, left):
    leases = Leases(block, LIMIT_32 - left + 1, LIMIT_32 + 1000)
    sequence = OutboundSequence(leases, LIMIT_32)
    numbers = list(itertools.takewhile(bool, (sequence.take() for _ in range(200))))
    assert numbers == list(range(LIMIT_32 - left + 1, LIMIT_32 + 1))
    assert sequence.take() == 0


def test_esn_goes_on_to_64_bits():
    sequence = OutboundSequence(Leases(10, LIMIT_32 - 2, LIMIT_64), LIMIT_64)
    assert [sequence.take(2) for _ in range(3)] == [LIMIT_32 - 2, LIMIT_32, LIMIT_32 + 2]
    assert OutboundSequence(Leases(10, LIMIT_64, LIMIT_64 + 5), LIMIT_64).take(2) == 0


def test_what_a_burst_cannot_use_a_packet_still_can():
    sequence = OutboundSequence(Leases(4, LIMIT_32 - 2), LIMIT_32)
    assert sequence.take(8) == 0
    assert sequence.take(2) == LIMIT_32 - 2
    assert sequence.take(1) == LIMIT_32
    assert sequence.take(1) == 0


def test_a_refused_lease_is_asked_for_again_later():
    answers = iter([(0, 0), (5, 9)])
    sequence = OutboundSequence(lambda: next(answers), LIMIT_32)
    assert sequence.take() == 0
    assert sequence.take() == 5


def test_one_lease_serves_its_whole_block():
    leases = Leases(100)
    sequence = OutboundSequence(leases, LIMIT_32)
    assert [sequence.take() for _ in range(100)] == list(range(1, 101))
    assert leases.calls == 1
    assert sequence.remaining == 0
