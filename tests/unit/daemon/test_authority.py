"""The originals and their copies: slots and reservations of SAs, and workers that always end up with the same."""

import contextlib
import pickle

import pytest
from house import House, add, files, policy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ipsecq.daemon.messages import encode
from ipsecq.daemon.replica import Replica
from ipsecq.daemon.takeover import take_over
from ipsecq.errors import DaemonError, SadError, SpdError, StateError
from ipsecq.numbers import Mode, Protocol
from ipsecq.sa.association import SaKey, SecurityAssociation

LIMIT = (1 << 32) - 1


def test_a_deleted_sas_slot_is_free_only_when_the_workers_know(house):
    house.become(add(0x1001))
    slot = house.sa(0x1001).slot
    was = house.keys()
    sad, spd = files(add(0x1005, key="55"))
    take_over(house.authority, sad, spd, {}, was=was)
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
        take_over(authority, *files(*lines), {}, was=house.keys())
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
