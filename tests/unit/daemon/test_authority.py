"""The originals and their copies: a reload keeps what it does not change, and workers always end up with the same."""

import contextlib
import os
import pickle
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ipsecq.daemon.authority import Authority, same
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.messages import encode
from ipsecq.daemon.replica import Replica
from ipsecq.daemon.table import SharedTable
from ipsecq.daemon.undo import Undo
from ipsecq.errors import DaemonError, SadError, SpdError, StateError, SysctlError
from ipsecq.numbers import Mode, Protocol
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SaKey, SecurityAssociation, Slot
from ipsecq.sa.sad import Sad
from ipsecq.secret import Key
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

ENDS = "192.0.2.1 198.51.100.1", "198.51.100.1 192.0.2.1"
LIMIT = (1 << 32) - 1


def add(spi, *, key="11", window=32, back=False, more=""):
    return f"add {ENDS[back]} esp {spi} -m tunnel -r {window // 8} {more} -E aes-gcm-16 0x{key * 20};"


def policy(net, direction="out", level="require"):
    ends = ENDS[direction == "in"].replace(" ", "-")
    return f"spdadd 10.1.0.0/16 10.{net}.0.0/16 any -P {direction} ipsec esp/tunnel/{ends}/{level};"


def files(*lines):
    """SAD and SPD of a setkey.conf."""
    applied = apply(parse("\n".join(lines), "setkey.conf"), Sad(), Spd(), now=1e9)
    return applied.sad, applied.spd


class House:
    """An authority over real tables, with one worker's replica that gets its operations as a worker does."""

    def __init__(self, root, capacity=1 << 14):
        (root / "state").mkdir(exist_ok=True)
        self.table = SharedTable.open(root / "table", bytes(range(16)), capacity=capacity)
        self.book = LeaseBook.open(root / "state", self.table, b"m" * 32)
        self.authority = Authority(self.table, self.book)
        self.replica = Replica()
        self.operations = []

    def become(self, *lines, sysctl=None, was=()):
        sad, spd = files(*lines)
        self.authority.become(sad, spd, sysctl or {}, was=was)
        return self.publish()

    def publish(self):
        """What a supervisor does with a change; returns the operations of it."""
        sent = []
        while batch := self.authority.take():
            operations = pickle.loads(encode(1, batch.operations)[4:])[1]
            self.replica.apply(operations)
            self.authority.done(batch)
            sent += operations
        return sent

    def sa(self, spi, back=False):
        return self.authority.sad.get(bytes([192, 0, 2, 1] if back else [198, 51, 100, 1]), Protocol.ESP, spi)

    def keys(self):
        return {sa.key for sa in self.authority.sad}


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


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.replica = None
    house.table.close()


# -- reload ----------------------------------------------------------------------------------------------------------


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
    house.authority.become(sad, spd, {"net.inet.ipsec.dfbit": 2}, was=was, undo=undo)
    house.publish()
    house.authority.revert(undo)
    house.publish()
    assert {sa.key: sa for sa in house.authority.sad} == there
    assert {sa.key for sa in house.replica.sad} == set(there)
    assert house.authority.spd.dump() == policies == house.replica.spd.dump()
    assert house.authority.sysctl.get("net.inet.ipsec.dfbit") == 1
    assert [list(house.table.words[sa.slot : sa.slot + Slot.WINDOW]) for sa in there.values()] == words


def test_a_reload_taken_back_keeps_what_others_did_meanwhile(house):
    house.become(add(0x1001), policy(2))
    undo = Undo()
    house.authority.become(*files(add(0x1001, key="33"), add(0x1002), policy(3)), {}, was=house.keys(), undo=undo)
    negotiated = replace(files(add(0x2001, key="22"))[0].dump()[0], label="pfkey:1")
    house.authority.add_sa(negotiated, passing=True)
    house.authority.delete_sa(house.sa(0x1002).key)
    mine = house.authority.add_policy(replace(files(policy(7))[1].dump()[0], id=0, label="pfkey:1"))
    house.authority.revert(undo)
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
        house.authority.become(*files(*many, policy(9)), {}, was=there, undo=undo)
    assert len(house.keys()) > 2
    house.authority.revert(undo)
    house.publish()
    assert house.keys() == there == {sa.key for sa in house.replica.sad}
    assert house.authority.spd.dump() == policies


def test_a_deleted_sas_slot_is_free_only_when_the_workers_know(house):
    house.become(add(0x1001))
    slot = house.sa(0x1001).slot
    was = house.keys()
    sad, spd = files(add(0x1005, key="55"))
    house.authority.become(sad, spd, {}, was=was)
    assert house.sa(0x1005).slot != slot
    house.publish()
    assert house.sa(0x1005).slot != slot


def test_a_changed_key_gets_numbers_of_its_own(house):
    house.become(add(0x1001))
    old = house.sa(0x1001).slot
    _, end = house.book.lease(old, LIMIT)
    house.become(add(0x1001, key="33"), was=house.keys())
    new = house.sa(0x1001).slot
    assert new != old
    assert house.book.lease(new, LIMIT)[0] == 1
    house.become(add(0x1001), was=house.keys())
    assert house.book.lease(house.sa(0x1001).slot, LIMIT)[0] >= end


def test_knobs_of_the_files_are_set_and_a_bad_one_is_an_error(house):
    operations = house.become(sysctl={"net.inet.ipsec.dfbit": 1})
    assert ("sysctl", "net.inet.ipsec.dfbit", 1) in operations
    assert house.replica.sysctl.v4.dfbit == 1
    with pytest.raises(SysctlError):
        house.authority.set_sysctl("net.inet.ipsec.no_such", 1)


def test_a_full_table_refuses_the_new_sa_and_leaves_no_trace_of_it(tmp_path):
    house = House(tmp_path, capacity=1 << 10)
    with pytest.raises(DaemonError, match="full"):
        house.become(*(add(0x1001 + n, key=f"{n:02x}", window=1024) for n in range(20)))
    present = {sa.spi for sa in house.authority.sad}
    assert 0 < len(present) < 20
    assert all(sa.slot >= 0 for sa in house.authority.sad)
    house.publish()
    assert {sa.spi for sa in house.replica.sad} == present


def test_a_full_disk_refuses_the_new_sa(house, monkeypatch):
    def full(*_):
        raise StateError("state file: No space left on device: no room for another SA")

    monkeypatch.setattr(house.book.state, "make_room", full)
    with pytest.raises(StateError, match="No space left"):
        house.become(add(0x1001))
    assert len(house.authority.sad) == 0
    assert house.publish() == []


def test_problems_name_the_sa_and_the_way_out_and_go_with_it(tmp_path):
    House(tmp_path).become(add(0x1001))
    state = tmp_path / "state" / "sequences"
    state.write_bytes(b"x" * state.stat().st_size)
    house = House(tmp_path)
    house.become(add(0x1001), add(0x1002, more="-u 7").replace("aes-gcm-16", "aes-cbc").replace("11" * 20, "11" * 16)
                 .replace(";", " -A hmac-sha2-256 0x" + "22" * 32 + ";"))  # fmt: skip
    problem = house.authority.problems[house.sa(0x1001).key]
    assert "0x00001001" in problem
    assert "ipsecq state reset 0x00001001" in problem
    assert house.sa(0x1002).key not in house.authority.problems
    house.become(was=house.keys())
    assert house.authority.problems == {}


def test_same_looks_at_what_packets_see_and_at_nothing_else():
    one = files(add(0x1001))[0].dump()[0]
    assert same(one, replace(one, created=5.0, slot=9, label="x:1", pid=4))
    for change in ({"spi": 9}, {"replay_window": 64}, {"encryption_key": Key(b"2" * 20)}, {"reqid": 1}, {"esn": True}):
        assert not same(one, replace(one, **change)), change


# -- replica ---------------------------------------------------------------------------------------------------------

SPIS = st.sampled_from([0x1001, 0x1002, 0x1003])
NETS = st.sampled_from([2, 3, 4])
STEPS = st.one_of(
    st.tuples(st.just("add"), SPIS, st.sampled_from(["11", "22"]), st.sampled_from([0, 32, 256])),
    st.tuples(st.just("delete"), SPIS),
    st.tuples(st.just("policy"), NETS, st.sampled_from(["in", "out"]), st.sampled_from(["use", "require"])),
    st.tuples(st.just("forget"), NETS),
    st.tuples(st.just("flush")),
    st.tuples(st.just("files"), st.lists(SPIS, unique=True), st.lists(NETS, unique=True)),
    st.tuples(st.just("sysctl"), st.sampled_from([0, 1])),
    st.tuples(st.just("publish")),
    st.tuples(st.just("worker")),
)  # fmt: skip


def step(house, name, *arguments):
    authority = house.authority
    if name == "add":
        spi, key, window = arguments
        sa = files(add(spi, key=key, window=window))[0].dump()[0]
        if sa.key in authority.sad:
            authority.update_sa(sa)
        else:
            authority.add_sa(sa)
    elif name == "delete":
        authority.delete_sa(SaKey(bytes([198, 51, 100, 1]), int(Protocol.ESP), arguments[0]))
    elif name == "policy":
        authority.update_policy(files(policy(*arguments))[1].dump()[0])
    elif name == "forget":
        found = [each.id for each in authority.spd if each.selector.dst_first[1] == arguments[0]]
        authority.delete_policy(found[0] if found else 99999)
    elif name == "flush":
        authority.flush_policies()
    elif name == "files":
        lines = [add(spi) for spi in arguments[0]] + [policy(net) for net in arguments[1]]
        authority.become(*files(*lines), {}, was=house.keys())
    elif name == "sysctl":
        authority.set_sysctl("net.inet.ipsec.ecn", arguments[0])
    elif name == "publish":
        house.publish()
    else:
        # A worker that died meanwhile begins with the whole state, and gets what is still to come on top of it.
        house.replica = Replica()
        house.replica.apply(pickle.loads(encode(1, list(authority.whole_state()))[4:])[1])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
@example(steps=[("policy", 2, "in", "use"), ("forget", 2), ("policy", 2, "out", "use"), ("worker",)])
def test_a_replica_ends_up_like_the_original_whatever_happened(tmp_path_factory, steps):
    house = House(tmp_path_factory.mktemp("house"))
    for each in steps:
        # No such SA, no such policy: an operator's mistake changes nothing.
        with contextlib.suppress(SadError, SpdError):
            step(house, *each)
    house.publish()
    original, copy = house.authority, house.replica
    assert {sa.key: sa for sa in copy.sad} == {sa.key: sa for sa in original.sad}
    assert copy.spd.dump() == original.spd.dump()
    assert copy.sysctl.all() == original.sysctl.all()
    slots = [sa.slot for sa in original.sad]
    assert len(set(slots)) == len(slots)
    assert min(slots, default=0) >= 0
    house.table.close()


def test_operations_hold_keys_only_where_an_sa_goes_to_a_worker(house):
    """repr of an operation may reach a log by mistake; a key must not."""
    house.become(add(0x1001, key="ab"))
    batch = [("sa_put", house.sa(0x1001))]
    assert "abab" not in repr(batch)


def test_an_sa_without_a_reservation_of_its_own_is_ipcomp_alone(house):
    sa = SecurityAssociation(
        Protocol.IPCOMP, 7, bytes([192, 0, 2, 1]), bytes([198, 51, 100, 1]), Mode.TUNNEL, compression="deflate"
    )
    house.authority.add_sa(sa)
    assert sa.slot >= 0
    assert house.book.lease(sa.slot, LIMIT) == (0, 0)
