"""Sequence leases of many SAs at once, and of all that come after a refused state file."""

import os

import pytest
from lease_house import LIMIT32, MACHINE, House

from ipsecq.daemon.leases import RESERVATION
from ipsecq.daemon.statefile import FLAG_REFUSED, load
from ipsecq.errors import StateError
from ipsecq.sa.association import Slot


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


@pytest.fixture
def syncs(monkeypatch):
    """Descriptors for which the disk was waited for."""
    waited = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (waited.append(descriptor), sync(descriptor)))
    return waited


def lose(house):
    (house.state / "sequences").write_bytes(b"x" * 100)


def test_many_sas_that_are_refused_wait_for_the_disk_once(house, syncs):
    lose(house)
    table, book = house.start()
    with book.batch():
        problems = [house.sa(table, book, number.to_bytes(32, "big"))[1] for number in range(1, 200)]
        assert not syncs
    assert all(problems)
    assert len(syncs) == 1
    records = load(house.state / "sequences", MACHINE).records
    assert len(records) == 199
    assert all(record.flags == FLAG_REFUSED for record in records)


def test_in_a_batch_the_disk_is_ahead_of_the_table_too(house, syncs):
    table, book = house.start()
    slots = [house.sa(table, book, number.to_bytes(32, "big"))[0] for number in range(1, 50)]
    for slot in slots:
        book.lease(slot, LIMIT32)
        table.words[slot + Slot.LEASED] = table.words[slot + Slot.RESERVED]
    before = [table.words[slot + Slot.RESERVED] for slot in slots]
    syncs.clear()
    with book.batch():
        for slot in slots:
            book.top_up(slot)
        assert [table.words[slot + Slot.RESERVED] for slot in slots] == before
    assert len(syncs) == 1
    assert [table.words[slot + Slot.RESERVED] for slot in slots] == [old + RESERVATION for old in before]


def test_a_batch_that_the_disk_refuses_reserves_nothing(house, monkeypatch):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.lease(slot, LIMIT32)
    table.words[slot + Slot.LEASED] = before = table.words[slot + Slot.RESERVED]

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(StateError, match="Input/output error"), book.batch():
        book.top_up(slot)
    assert table.words[slot + Slot.RESERVED] == before
    monkeypatch.undo()
    book.top_up(slot)
    assert table.words[slot + Slot.RESERVED] == before + RESERVATION


def test_one_record_twice_in_a_batch_always_leaves_a_copy_on_the_disk(house, syncs):
    lose(house)
    table, book = house.start()
    slot, _ = house.sa(table, book)
    syncs.clear()
    with book.batch():
        book._write(slot, 10)
        book._write(slot, 20)
        assert len(syncs) == 1
    assert len(syncs) == 2


# -- after a refusal -------------------------------------------------------------------------------------------------


def test_a_key_that_comes_after_a_refusal_refuses_although_every_other_one_was_reset(house):
    """It may be one that was used before the loss: a file that is loaded again."""
    lose(house)
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.reset(slot)
    assert house.sa(table, book, b"l" * 32)[1]


def test_the_operators_word_for_all_keys_ends_a_refusal_for_good_but_not_for_keys_known_as_refused(house):
    lose(house)
    table, book = house.start()
    slot, _ = house.sa(table, book)
    absent, _ = house.sa(table, book, b"a" * 32)
    table.retire(absent)
    book.reset(slot)
    book.trust()
    assert book.problem == ""
    for boot in range(2):
        slot, problem = house.sa(table, book, bytes([boot]) * 32)
        assert (problem, book.lease(slot, LIMIT32)[0]) == ("", 1)
        assert house.sa(table, book, b"a" * 32)[1]
        house.reboot()
        table, book = house.start()
        assert book.problem == ""
