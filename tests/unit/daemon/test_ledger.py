"""Totals of a peer never go back: SAs come, go, move and are replaced, and what they counted stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.daemon.ledger import COUNTED, OTHERS, PairLedger
from ipsecq.sa.association import SLOT_HEADER_WORDS, Slot

A, B, C = b"\xc0\0\2\1", b"\xc6\x33\x64\1", b"\xc6\x33\x64\2"


class Table:
    def __init__(self, slots=8):
        self.words = memoryview(bytearray(8 * SLOT_HEADER_WORDS * slots)).cast("Q")

    def count(self, slot, packets=1, last_use=0):
        base = slot * SLOT_HEADER_WORDS
        self.words[base + Slot.PACKETS] += packets
        self.words[base + Slot.BYTES] += 100 * packets
        self.words[base + Slot.LAST_USE] = max(last_use, self.words[base + Slot.LAST_USE])

    def clear(self, slot):
        base = slot * SLOT_HEADER_WORDS
        for word in (*COUNTED, Slot.LAST_USE):
            self.words[base + word] = 0


def slot(number):
    return number * SLOT_HEADER_WORDS


def packets(ledger):
    return {(total.src, total.dst): total.counts[0] for total in ledger.totals()}


@pytest.fixture
def table():
    return Table()


def test_the_sas_of_a_pair_are_summed_and_a_deleted_one_goes_on_counting(table):
    ledger = PairLedger(table.words, 10)
    ledger.join(slot(0), A, B)
    ledger.join(slot(1), A, B)
    ledger.join(slot(2), B, A)
    table.count(0, 5, last_use=70)
    table.count(1, 7, last_use=60)
    table.count(2, 1)
    assert packets(ledger) == {(A, B): 12, (B, A): 1}
    ledger.leave(slot(0))
    table.clear(0)
    (total,) = [each for each in ledger.totals() if each.src == A]
    assert (total.counts, total.sas, total.last_use) == ((12, 1200, 0, 0, 0), 1, 70)


def test_a_slot_that_moves_takes_its_counts_along(table):
    ledger = PairLedger(table.words, 10)
    ledger.join(slot(0), A, B)
    table.count(0, 5)
    ledger.leave(slot(0), moves=True)
    table.count(1, 5)
    table.clear(0)
    ledger.join(slot(1), A, B)
    assert packets(ledger) == {(A, B): 5}


def test_a_peer_that_moves_leaves_what_it_counted_with_its_old_address(table):
    ledger = PairLedger(table.words, 10)
    ledger.join(slot(0), B, A)
    table.count(0, 5)
    ledger.join(slot(0), C, A)
    table.count(0, 2)
    assert packets(ledger) == {(B, A): 5, (C, A): 2}
    ledger.join(slot(0), C, A)
    ledger.leave(slot(0))
    table.clear(0)
    assert packets(ledger) == {(B, A): 5, (C, A): 2}


def test_beyond_the_limit_pairs_are_counted_together_and_those_without_sas_give_way(table):
    ledger = PairLedger(table.words, 1)
    ledger.join(slot(0), A, B)
    ledger.join(slot(1), A, C)
    table.count(0, 5)
    table.count(1, 7)
    assert packets(ledger) == {(A, B): 5, OTHERS: 7}
    ledger.leave(slot(0))
    table.clear(0)
    ledger.join(slot(2), B, A)
    table.count(2, 1)
    assert packets(ledger) == {(B, A): 1, OTHERS: 12}


def test_leaving_twice_or_without_having_joined_is_nothing(table):
    ledger = PairLedger(table.words, 10)
    ledger.leave(slot(3))
    assert ledger.totals() == []


STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "count", "move"]), st.integers(0, 7), st.sampled_from([A, B, C])),
    max_size=60,
)


@given(STEPS, st.integers(0, 3))
def test_whatever_happens_no_packet_is_forgotten_or_counted_twice(steps, limit):
    table = Table()
    ledger, counted, members = PairLedger(table.words, limit), 0, set()
    for step, number, address in steps:
        if step == "join":
            ledger.join(slot(number), address, A)
            members.add(number)
        elif step == "leave":
            ledger.leave(slot(number))
            table.clear(number)
            members.discard(number)
        elif step == "count" and number in members:
            table.count(number)
            counted += 1
        elif step == "move" and number in members and (free := {*range(8)} - members):
            other = min(free)
            base, to = slot(number), slot(other)
            table.words[to : to + SLOT_HEADER_WORDS] = table.words[base : base + SLOT_HEADER_WORDS]
            pair = ledger._members[slot(number)].pair
            ledger.leave(slot(number), moves=True)
            table.clear(number)
            if pair != OTHERS:
                ledger.join(slot(other), *pair)
                members = members - {number} | {other}
            else:
                return
        totals = ledger.totals()
        assert sum(total.counts[0] for total in totals) == counted
        assert sum(total.sas for total in totals) == len(members)
