"""A reload keeps what it does not change, and is taken back as a whole."""

import os
from dataclasses import replace

import pytest
from house import House, add, files, policy

from ipsecq.daemon.takeover import same, take_back, take_over
from ipsecq.daemon.undo import Undo
from ipsecq.errors import DaemonError, SysctlError
from ipsecq.sa.association import Slot
from ipsecq.secret import Key

LIMIT = (1 << 32) - 1


def test_files_of_many_sas_wait_for_the_disk_once(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "sequences").write_bytes(b"x" * 100)
    house = House(tmp_path)
    assert house.book.problem
    waited = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (waited.append(descriptor), sync(descriptor)))
    house.become(*(add(spi, key=f"{spi % 256:02x}") for spi in range(0x1000, 0x1064)))
    assert len(house.authority.problems) == 100
    assert len(waited) == 1


def test_a_reload_of_the_same_files_tells_workers_nothing(house):
    lines = add(0x1001), add(0x1002, back=True), policy(2), policy(3, "in")
    assert house.become(*lines)
    assert house.become(*lines, was=house.keys()) == []


def test_unchanged_sas_keep_slot_counters_window_and_numbers(house):
    house.become(add(0x1001), policy(2))
    before = house.sa(0x1001)
    house.book.lease(before.slot, LIMIT)
    words = house.table.words
    words[before.slot + Slot.PACKETS], words[before.slot + Slot.SEQUENCE] = 77, 4000
    leased = words[before.slot + Slot.LEASED]
    operations = house.become(add(0x1001), add(0x1003), policy(2), policy(3), was=house.keys())
    after = house.sa(0x1001)
    assert after is before
    assert [words[after.slot + word] for word in (Slot.PACKETS, Slot.SEQUENCE, Slot.LEASED)] == [77, 4000, leased]
    assert [operation[1].spi for operation in operations if operation[0] == "sa_put"] == [0x1003]


def test_unchanged_policies_keep_their_ids(house):
    house.become(policy(2), policy(3), policy(4))
    before = {each.selector: each.id for each in house.authority.spd}
    house.become(policy(5), policy(4), policy(2))
    after = {each.selector: each.id for each in house.authority.spd}
    assert {selector: after[selector] for selector in before if selector in after}.items() <= before.items()
    assert len(set(before.values()) | set(after.values())) == 4


def test_a_reload_leaves_what_key_management_added_behind_the_policies_of_the_files(house):
    """First in wins: in front of them it would decide where it hadn't."""
    house.become(policy(2), policy(3))
    added = replace(files(policy(4))[1].dump()[0], id=0, label="pfkey:1")
    house.authority.update_policy(added)
    house.publish()
    before = [each.selector for each in house.authority.spd]
    assert before[-1] == added.selector
    assert house.become(policy(2), policy(3)) == []
    house.become(policy(5), policy(2), policy(3))
    assert [each.selector for each in house.authority.spd][-1] == added.selector
    assert [each.selector for each in house.replica.spd] == [each.selector for each in house.authority.spd]


def test_sas_that_the_files_no_longer_have_go_and_those_of_key_management_stay(house):
    house.become(add(0x1001), add(0x1002))
    was = house.keys()
    negotiated = replace(files(add(0x2001, key="22"))[0].dump()[0], label="pfkey:1")
    house.authority.add_sa(negotiated, passing=True)
    house.publish()
    house.become(add(0x1002), was=was)
    assert {sa.spi for sa in house.authority.sad} == {0x1002, 0x2001}
    assert {sa.spi for sa in house.replica.sad} == {0x1002, 0x2001}


def test_a_reload_taken_back_leaves_what_setkey_made_since_the_files_were_read(house):
    """Not the old files are the way back: an SA of theirs was replaced by hand, and the new files name its successor."""
    house.become(add(0x1001), add(0x1002), policy(2), policy(3), sysctl={"net.inet.ipsec.dfbit": 1})
    was = house.keys()
    house.authority.delete_sa(house.sa(0x1001).key)
    house.authority.add_sa(replace(files(add(0x1005, key="55"))[0].dump()[0], label="setkey:"))
    house.publish()
    there = {sa.key: sa for sa in house.authority.sad}
    policies = house.authority.spd.dump()
    words = [list(house.table.words[sa.slot : sa.slot + Slot.WINDOW]) for sa in there.values()]

    undo = Undo()
    sad, spd = files(add(0x1005, key="55"), add(0x1006), add(0x1002, window=64), policy(4), policy(3))
    take_over(house.authority, sad, spd, {"net.inet.ipsec.dfbit": 2}, was=was, undo=undo)
    house.publish()
    take_back(house.authority, undo)
    house.publish()
    assert {sa.key: sa for sa in house.authority.sad} == there
    assert {sa.key for sa in house.replica.sad} == set(there)
    assert house.authority.spd.dump() == policies == house.replica.spd.dump()
    assert house.authority.sysctl.get("net.inet.ipsec.dfbit") == 1
    assert [list(house.table.words[sa.slot : sa.slot + Slot.WINDOW]) for sa in there.values()] == words


def test_a_reload_taken_back_keeps_what_others_did_meanwhile(house):
    house.become(add(0x1001), policy(2))
    undo = Undo()
    take_over(house.authority, *files(add(0x1001, key="33"), add(0x1002), policy(3)), {}, was=house.keys(), undo=undo)
    negotiated = replace(files(add(0x2001, key="22"))[0].dump()[0], label="pfkey:1")
    house.authority.add_sa(negotiated, passing=True)
    house.authority.delete_sa(house.sa(0x1002).key)
    mine = house.authority.add_policy(replace(files(policy(7))[1].dump()[0], id=0, label="pfkey:1"))
    take_back(house.authority, undo)
    house.publish()
    assert {sa.spi: sa.encryption_key for sa in house.authority.sad} == {
        0x1001: files(add(0x1001))[0].dump()[0].encryption_key, 0x2001: negotiated.encryption_key,
    }  # fmt: skip
    old = files(policy(2))[1].dump()[0]
    assert [each.selector for each in house.authority.spd] == [old.selector, mine.selector]


def test_a_reload_that_fails_half_way_is_taken_back(tmp_path):
    house = House(tmp_path, capacity=1 << 11)
    house.become(add(0x1001), policy(2))
    there, policies, undo = house.keys(), house.authority.spd.dump(), Undo()
    many = [add(0x3000 + n, key=f"{n:02x}") for n in range(200)]
    with pytest.raises(DaemonError):
        take_over(house.authority, *files(*many, policy(9)), {}, was=there, undo=undo)
    assert len(house.keys()) > 2
    take_back(house.authority, undo)
    house.publish()
    assert house.keys() == there == {sa.key for sa in house.replica.sad}
    assert house.authority.spd.dump() == policies


def test_knobs_of_the_files_are_set_and_a_bad_one_is_an_error(house):
    operations = house.become(sysctl={"net.inet.ipsec.dfbit": 1})
    assert ("sysctl", "net.inet.ipsec.dfbit", 1) in operations
    assert house.replica.sysctl.v4.dfbit == 1
    with pytest.raises(SysctlError):
        house.authority.set_sysctl("net.inet.ipsec.no_such", 1)


def test_same_looks_at_what_packets_see_and_at_nothing_else():
    one = files(add(0x1001))[0].dump()[0]
    assert same(one, replace(one, created=5.0, slot=9, label="x:1", pid=4))
    for change in ({"spi": 9}, {"replay_window": 64}, {"encryption_key": Key(b"2" * 20)}, {"reqid": 1}, {"esn": True}):
        assert not same(one, replace(one, **change)), change
