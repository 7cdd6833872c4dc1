"""Sequence leases: no number twice, through kill -9, power cuts, torn writes and restored copies."""

import itertools
import os
import random
import shutil
import signal
import struct
import time

import pytest
from lease_house import BOOT, DIGEST, LIMIT32, MACHINE, House

from ipsecq.daemon import table as table_module
from ipsecq.daemon.leases import BLOCK, RESERVATION, LeaseBook
from ipsecq.daemon.statefile import FIRST_RECORD, HALF, Header, Record, StateFile, load, newest
from ipsecq.daemon.table import SharedTable
from ipsecq.errors import StateError
from ipsecq.sa.association import Slot


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def test_a_new_sa_begins_at_one_and_leases_follow_each_other(house):
    table, book = house.start()
    slot, problem = house.sa(table, book)
    assert problem == ""
    assert book.lease(slot, LIMIT32) == (1, 1 + BLOCK)
    assert book.lease(slot, LIMIT32) == (1 + BLOCK, 1 + 2 * BLOCK)


def test_the_reservation_is_on_disk_before_the_lease_is_given(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    _, end = book.lease(slot, LIMIT32)
    assert load(house.state / "sequences", MACHINE).records[0].reserved >= end
    assert table.words[slot + Slot.RESERVED] >= end


def test_the_last_number_is_the_limit(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    assert book.lease(slot, 5000) == (1, 4097)
    assert book.lease(slot, 5000) == (4097, 5001)
    assert book.lease(slot, 5000) == (0, 0)


def test_a_64_bit_limit_does_not_overflow_the_table(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    table.words[slot + Slot.LEASED] = (1 << 64) - 100
    first, end = book.lease(slot, (1 << 64) - 1)
    assert first == (1 << 64) - 100
    assert end == (1 << 64) - 1
    assert book.lease(slot, (1 << 64) - 1) == (0, 0)


def test_a_killed_daemon_continues_where_the_leases_ended(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    _, end = book.lease(slot, LIMIT32)
    table, book = house.start()
    slot, problem = house.sa(table, book)
    assert (problem, book.lease(slot, LIMIT32)[0]) == ("", end)


def test_a_crashed_machine_continues_beyond_the_reservation(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.lease(slot, LIMIT32)
    reserved = table.words[slot + Slot.RESERVED]
    house.reboot()
    table, book = house.start()
    slot, problem = house.sa(table, book)
    assert (problem, book.lease(slot, LIMIT32)[0]) == ("", reserved)


def test_a_clean_stop_wastes_nothing_across_a_reboot(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    _, end = book.lease(slot, LIMIT32)
    book.settle(slot)
    house.reboot()
    table, book = house.start()
    slot, problem = house.sa(table, book)
    assert (problem, book.lease(slot, LIMIT32)[0]) == ("", end)


def test_topping_up_keeps_the_disk_out_of_the_workers_way(house, monkeypatch):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.lease(slot, LIMIT32)
    writes = []
    write = StateFile.write
    monkeypatch.setattr(StateFile, "write", lambda self, i, r: (writes.append(r.reserved), write(self, i, r)))
    for _ in range(3 * RESERVATION // BLOCK):
        before = len(writes)
        book.lease(slot, LIMIT32)
        assert len(writes) == before
        book.top_up(slot)
    assert 3 <= len(writes) <= 7


def test_deleting_and_adding_the_same_keys_goes_on_with_the_numbers(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    _, end = book.lease(slot, LIMIT32)
    table.retire(slot)
    slot, _ = house.sa(table, book)
    assert book.lease(slot, LIMIT32)[0] == end


# -- what must not be trusted ---------------------------------------------------------------------------------------


def sent_and_stopped(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.lease(slot, LIMIT32)


def refuses(house, machine=MACHINE):
    table, book = house.start(machine)
    slot, problem = house.sa(table, book)
    if not problem:
        return ""
    with pytest.raises(StateError, match="state reset"):
        book.lease(slot, LIMIT32)
    assert "ipsecq state reset 0x00001000" in book.refusal(slot, 0x1000)
    return problem


def test_a_restored_copy_is_refused_even_after_a_reboot(house, tmp_path):
    sent_and_stopped(house)
    shutil.copytree(house.state, tmp_path / "backup")
    sent_and_stopped(house)
    house.reboot()
    shutil.rmtree(house.state)
    shutil.copytree(tmp_path / "backup", house.state)
    assert "copy" in refuses(house)
    house.reboot()
    assert refuses(house), "a refusal must outlive the next start"


def test_a_copy_written_into_the_same_file_is_refused(house):
    sent_and_stopped(house)
    old = (house.state / "sequences").read_bytes()
    sent_and_stopped(house)
    with (house.state / "sequences").open("r+b") as file:
        file.write(old)
    house.reboot()
    assert "copy" in refuses(house)


def test_a_record_rolled_back_within_one_boot_is_refused_for_good(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.lease(slot, LIMIT32)
    old = (house.state / "sequences").read_bytes()
    table.words[slot + Slot.LEASED] = table.words[slot + Slot.RESERVED]
    book.lease(slot, LIMIT32)
    with (house.state / "sequences").open("r+b") as file:
        file.write(old)
    assert "behind" in refuses(house)
    house.reboot()
    assert refuses(house)


def test_a_file_changed_under_a_running_daemon_stops_the_next_reservation(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    book.lease(slot, LIMIT32)
    old = (house.state / "sequences").read_bytes()
    table.words[slot + Slot.LEASED] = table.words[slot + Slot.RESERVED]
    book.lease(slot, LIMIT32)
    with (house.state / "sequences").open("r+b") as file:
        file.write(old)
    table.words[slot + Slot.LEASED] = table.words[slot + Slot.RESERVED]
    with pytest.raises(StateError, match="changed while"):
        book.lease(slot, LIMIT32)


def test_a_file_replaced_under_a_running_daemon_stops_the_next_reservation(house):
    table, book = house.start()
    slot, _ = house.sa(table, book)
    (house.state / "sequences").unlink()
    with pytest.raises(StateError, match="replaced"):
        book.lease(slot, LIMIT32)


def test_another_machines_file_is_refused(house):
    sent_and_stopped(house)
    house.reboot()
    assert "another machine" in refuses(house, b"n" * 32)


def test_a_state_directory_that_vanished_within_a_boot_is_refused(house):
    sent_and_stopped(house)
    (house.state / "sequences").unlink()
    (house.run / "table").rename(house.run / "kept")
    table = SharedTable.open(house.run / "table", house.boot, capacity=1 << 14)
    table.generation = 1
    assert "gone" in refuses(house)


@pytest.mark.parametrize("damage", ["header", "record", "truncated", "directory"])
def test_an_unreadable_file_is_refused(house, damage):
    sent_and_stopped(house)
    path = house.state / "sequences"
    octets = bytearray(path.read_bytes())
    if damage == "header":
        octets[0:1024] = bytes(1024)
    elif damage == "record":
        octets[FIRST_RECORD + 40] ^= 1
        octets[FIRST_RECORD + HALF + 40] ^= 1
    elif damage == "truncated":
        del octets[100:]
    if damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        with path.open("r+b") as file:
            file.truncate(len(octets))
            file.write(octets)
    house.reboot()
    assert refuses(house)


def test_random_ivs_go_on_where_counters_are_refused(house):
    sent_and_stopped(house)
    house.reboot()
    table, book = house.start(b"n" * 32)
    slot, problem = house.sa(table, book, counter_iv=False)
    assert problem == ""
    assert book.lease(slot, LIMIT32)[0] >= 1


def test_negotiated_keys_may_send_although_the_old_state_is_lost(house):
    sent_and_stopped(house)
    house.reboot()
    table, book = house.start(b"n" * 32)
    slot, problem = house.sa(table, book, b"g" * 32, passing=True)
    assert (problem, book.lease(slot, LIMIT32)[0]) == ("", 1)


def test_reset_lifts_the_refusal_for_this_sa_only_and_for_good(house):
    sent_and_stopped(house)
    house.reboot()
    table, book = house.start(b"n" * 32)
    slot, _ = house.sa(table, book)
    other, _ = house.sa(table, book, b"o" * 32)
    book.reset(slot)
    first, end = book.lease(slot, LIMIT32)
    assert first == 1
    assert table.refused(other)
    house.reboot()
    table, book = house.start(b"n" * 32)
    slot, problem = house.sa(table, book)
    assert problem == ""
    assert book.lease(slot, LIMIT32)[0] >= end
    assert house.sa(table, book, b"o" * 32)[1]


def test_records_of_negotiated_keys_go_after_a_month_others_stay(house):
    table, book = house.start()
    for digest, passing in ((b"p" * 32, True), (b"s" * 32, False)):
        slot, _ = house.sa(table, book, digest, passing=passing)
        book.lease(slot, LIMIT32)
    house.now += 31 * 86400
    house.reboot()
    house.start()
    assert [record.fingerprint for record in load(house.state / "sequences", MACHINE).records] == [b"s" * 32]


def test_negotiated_sas_that_come_and_go_take_no_more_of_the_disk_than_those_that_are_remembered(house, monkeypatch):
    monkeypatch.setattr(table_module, "RETIRED_LIMIT", 10)
    table, book = house.start()
    manual, _ = house.sa(table, book, b"s" * 32)
    book.lease(manual, LIMIT32)
    table.retire(manual)
    for number in range(200):
        slot, problem = house.sa(table, book, number.to_bytes(32, "big"), passing=True)
        assert problem == ""
        assert book.lease(slot, LIMIT32)[0] == 1
        table.retire(slot)
    assert book._next_record <= 13
    assert len(book._records) <= 13
    # The last ones go on where they were, in this boot and after it; so does the manual key, for ever.
    again, _ = house.sa(table, book, (199).to_bytes(32, "big"), passing=True)
    assert book.lease(again, LIMIT32)[0] == 1 + BLOCK
    house.reboot()
    table, book = house.start()
    assert book.problem == ""
    for digest in (b"s" * 32, (199).to_bytes(32, "big"), (195).to_bytes(32, "big")):
        slot, _ = house.sa(table, book, digest)
        assert book.lease(slot, LIMIT32)[0] > RESERVATION // 2


def test_a_record_that_was_another_sas_is_written_over_for_good(house, monkeypatch):
    monkeypatch.setattr(table_module, "RETIRED_LIMIT", 0)
    table, book = house.start()
    old, _ = house.sa(table, book, b"o" * 32, passing=True)
    for more in range(5):
        book._write(old, (more + 2) * RESERVATION)  # as millions of packets do
    table.retire(old)
    fresh, problem = house.sa(table, book, b"n" * 32)
    assert (problem, table.record(fresh)) == ("", 0)
    assert book.lease(fresh, LIMIT32)[0] == 1
    house.reboot()
    table, book = house.start()
    slot, _ = house.sa(table, book, b"n" * 32)
    assert book.lease(slot, LIMIT32)[0] > RESERVATION // 2


def test_a_full_disk_fails_the_lease_and_takes_no_number(house, monkeypatch):
    table, book = house.start()
    slot, _ = house.sa(table, book)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StateError, match="No space left"):
        book.lease(slot, LIMIT32)
    assert table.words[slot + Slot.LEASED] == 1
    monkeypatch.undo()
    assert book.lease(slot, LIMIT32)[0] == 1


# -- a table that is lost --------------------------------------------------------------------------------------------


def test_a_table_that_is_gone_within_a_boot_is_told_and_one_of_another_boot_is_not(house):
    table, _ = house.start()
    assert table.problem == ""
    table, _ = house.start()
    assert table.problem == ""
    (house.run / "table").unlink()
    table, _ = house.start()
    assert "replay windows of this boot are forgotten" in table.problem
    assert "was gone" in table.problem
    (house.run / "table").unlink()
    house.reboot()
    table, _ = house.start()
    assert table.problem == ""


def test_a_header_of_an_earlier_version_is_read_and_knows_no_boot():
    octets = Header(3, 8, 77, 99, MACHINE, 1, BOOT).pack()
    old = octets[:112] + bytes(400)
    assert Header.unpack(octets) == Header(3, 8, 77, 99, MACHINE, 1, BOOT)
    assert Header.unpack(old) == Header(3, 8, 77, 99, MACHINE, 1)


# -- torn writes -----------------------------------------------------------------------------------------------------


def test_every_torn_record_leaves_its_predecessor():
    old = Record(DIGEST, 1000, 6)
    new = Record(DIGEST, 2000, 7)
    before = old.pack() + Record(DIGEST, 500, 5).pack()
    for cut in range(HALF + 1):
        octets = before[:HALF] + new.pack()[:cut] + before[HALF + cut :]
        found = newest(octets)
        assert found in (old, new)
        assert (found == new) == (octets[HALF:] == new.pack())


def test_a_torn_header_leaves_its_predecessor():
    header = Header(3, 8, 77, 99, MACHINE)
    octets = header.pack()
    assert Header.unpack(octets) == header
    for cut in range(0, 112, 7):
        assert Header.unpack(octets[:cut] + bytes(512 - cut)) is None


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def test_no_number_twice_while_workers_are_killed(house, tmp_path):
    """Four processes lease and are killed at random; every lease that was given is on record exactly once."""
    table, book = house.start()
    slot, _ = house.sa(table, book)
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def child():
        mine = SharedTable.attach(os.dup(table.descriptor))
        worker = LeaseBook.attach(book.state.descriptor, mine)
        while True:
            os.write(log, struct.pack("QQ", *worker.lease(slot, LIMIT32)))

    def spawn():
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(1)
        return pid

    dice = random.Random(7)
    children = [spawn() for _ in range(4)]
    try:
        # A worker that dies while it writes a reservation to a slow disk has leased nothing: on until there is enough.
        kills = 0
        while kills < 60 or os.fstat(log).st_size < 1000 * 16:
            time.sleep(dice.uniform(0.002, 0.015) * (1 if kills < 60 else 50))
            kills += 1
            victim = dice.randrange(4)
            os.kill(children[victim], signal.SIGKILL)
            assert os.waitpid(children[victim], 0)[1] == signal.SIGKILL, "a worker ended by itself"
            children[victim] = spawn()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    octets = os.pread(log, 1 << 28, 0)
    runs = sorted(struct.iter_unpack("QQ", octets[: len(octets) // 16 * 16]))
    assert len(runs) >= 1000
    assert all(first < end for first, end in runs)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(runs))
    assert table.words[slot + Slot.RESERVED] >= runs[-1][1]
    assert load(house.state / "sequences", MACHINE).records[0].reserved >= runs[-1][1]
