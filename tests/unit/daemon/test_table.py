"""The shared table: slots are found again, never shared, and a changed window forgets nothing."""

import os

import pytest

from ipsecq.daemon.table import FIRST_BLOCK, RETIRED_LIMIT, CounterPages, SharedTable, fingerprint
from ipsecq.errors import DaemonError
from ipsecq.numbers import Protocol
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.secret import Key

BOOT = bytes(range(16))


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "table"


def test_slots_do_not_overlap_and_start_zeroed(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    spans = []
    for number in range(50):
        slot = table.allocate(digest(number), number * 64)
        assert not any(table.words[slot + 1 : slot + 16])
        table.words[slot + Slot.SEQUENCE] = number + 1
        spans.append(slot)
    assert len(set(spans)) == 50
    assert [table.words[slot + Slot.SEQUENCE] for slot in spans] == list(range(1, 51))
    assert [table.fingerprint_of(slot) for slot in spans] == [digest(number) for number in range(50)]


def test_a_restarted_daemon_finds_windows_and_counters_again(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    slots = {number: table.allocate(digest(number), 64) for number in range(20)}
    for number, slot in slots.items():
        table.words[slot + Slot.BYTES] = number * 10
        table.words[slot + Slot.WINDOW] = number
    table.close()
    again = SharedTable.open(path, BOOT, capacity=1 << 16)
    for number, slot in slots.items():
        assert again.allocate(digest(number), 64) == slot
        assert again.words[slot + Slot.BYTES] == number * 10
        assert again.words[slot + Slot.WINDOW] == number


def test_another_boot_or_layout_starts_empty_and_leaves_the_old_mapping_alone(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    slot = table.allocate(digest(1), 64)
    table.words[slot + Slot.BYTES] = 7
    other = SharedTable.open(path, bytes(16), capacity=1 << 16)
    fresh = other.allocate(digest(1), 64)
    assert other.words[fresh + Slot.BYTES] == 0
    other.words[fresh + Slot.BYTES] = 9
    assert table.words[slot + Slot.BYTES] == 7


def test_a_worker_sees_what_the_supervisor_writes(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    slot = table.allocate(digest(1), 0)
    worker = SharedTable.attach(os.dup(table.descriptor))
    worker.words[slot + Slot.PACKETS] = 3
    assert table.words[slot + Slot.PACKETS] == 3


def test_a_deleted_sa_that_returns_keeps_its_replay_window(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    slot = table.allocate(digest(1), 64)
    table.words[slot + Slot.WINDOW] = 5
    table.retire(slot)
    other = table.allocate(digest(2), 64)
    assert other != slot
    assert table.allocate(digest(1), 64) == slot
    assert table.words[slot + Slot.WINDOW] == 5


def test_retired_blocks_are_used_again_when_the_table_is_full(path):
    table = SharedTable.open(path, BOOT, capacity=1024)
    slots = [table.allocate(digest(number), 0) for number in range(21)]
    with pytest.raises(DaemonError, match="full"):
        table.allocate(digest(21), 0)
    table.retire(slots[3])
    assert table.allocate(digest(5000), 0) == slots[3]
    assert table.words[slots[3] + Slot.BYTES] == 0


def test_retired_blocks_are_bounded(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 20)
    for number in range(RETIRED_LIMIT + 500):
        table.retire(table.allocate(digest(number), 0))
    assert table.used_octets < (RETIRED_LIMIT + 10) * 24 * 8 + FIRST_BLOCK * 8


def test_a_changed_window_counts_every_older_number_as_received(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    slot = table.allocate(digest(1), 64)
    table.words[slot + Slot.SEQUENCE] = 1000
    table.words[slot + Slot.LEASED] = 4097
    table.set_record(slot, 12)
    wider = table.allocate(digest(1), 1024)
    assert wider != slot
    assert table.words[wider + Slot.SEQUENCE] == 1000
    assert table.words[wider + Slot.LEASED] == 4097
    assert table.record(wider) == 12
    assert all(word == 0xFFFFFFFFFFFFFFFF for word in table.words[wider + Slot.WINDOW : wider + Slot.WINDOW + 32])


def test_a_damaged_table_is_refused_not_followed(path):
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    slot = table.allocate(digest(1), 64)
    table.words[slot - 8] = 0
    with pytest.raises(DaemonError, match="damaged"):
        SharedTable.open(path, BOOT, capacity=1 << 16)


@pytest.mark.parametrize("damage", ["empty", "short", "longer", "magic", "used"])
def test_a_file_of_this_boot_that_does_not_match_is_replaced_and_that_is_told(path, damage):
    SharedTable.open(path, BOOT, capacity=1 << 16).close()
    with path.open("r+b") as file:
        if damage == "empty":
            file.truncate(0)
        elif damage in ("short", "longer"):
            file.truncate(4096 if damage == "short" else 1 << 20)
        else:
            file.seek(0 if damage == "magic" else 16)
            file.write(bytes(8))
    table = SharedTable.open(path, BOOT, capacity=1 << 16)
    assert table.fresh
    assert str(path) in table.problem
    assert "replay windows of this boot are forgotten" in table.problem


def test_a_first_table_a_whole_one_and_one_of_another_boot_are_no_news(path):
    for boot in (BOOT, BOOT, bytes(16)):
        table = SharedTable.open(path, boot, capacity=1 << 16)
        assert table.problem == ""
        assert table.boot_id == boot
        table.close()


def test_memory_is_taken_only_for_what_is_used(path):
    SharedTable.open(path, BOOT).allocate(digest(1), 64)
    status = path.stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20
    assert status.st_mode & 0o777 == 0o600


def test_fingerprints_differ_with_every_part_and_hold_no_key():
    def sa(**changes):
        parts = {
            "protocol": Protocol.ESP,
            "spi": 0x1000,
            "src": b"\1\1\1\1",
            "dst": b"\2\2\2\2",
            "encryption": "aes-gcm-16",
            "encryption_key": Key(b"k" * 20),
        }
        return fingerprint(SecurityAssociation(**(parts | changes)))

    base = sa()
    assert base == sa(reqid=9, src=b"\3\3\3\3")
    others = {sa(spi=1), sa(dst=b"\2\2\2\3"), sa(encryption_key=Key(b"l" * 20)), sa(protocol=Protocol.AH)}
    others |= {sa(encryption_key=Key(b"k" * 19), authentication="x"), sa(encryption="aes-gcm-12")}
    assert len(others | {base}) == 7


def test_counter_pages_are_apart():
    pages = CounterPages.create(3)
    pages.page(1)[5] = 9
    assert len(pages) == 3
    assert pages.page(0)[5] == pages.page(2)[5] == 0
    assert CounterPages(os.dup(pages.descriptor)).page(1)[5] == 9
