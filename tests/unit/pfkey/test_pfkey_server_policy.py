import errno

import pytest

from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.extensions import Address, LifetimeExt
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.spconvert import from_policy
from ipsecq.policy.model import Policy, Selector, Transform

T = MessageType
IN, OUT, FWD = 1, 2, 3


def test_spdadd_stores_the_policy_and_tells_everybody_its_id(bench, make):
    bench.open(2)
    reply = bench.one(make.spd(lifetime_hard=LifetimeExt(addtime=600), priority=0x80000005))
    assert bench.inbox[2] == [reply]
    assert (reply.type, reply.satype, reply.seq, reply.pid, reply.reserved) == (T.X_SPDADD, 0, 8, 77, 1)
    policy = bench.database.spd.get(reply.policy.id)
    assert (policy.direction, policy.action, policy.lifetime) == (Direction.OUT, Action.IPSEC, 600)
    assert policy.selector == Selector(
        bytes((10, 1, 0, 0)), bytes((10, 1, 255, 255)), bytes((10, 2, 0, 0)), bytes((10, 2, 255, 255))
    )
    assert policy.transforms == (Transform(Protocol.ESP, Mode.TUNNEL, make.A, make.B, Level.REQUIRE),)
    assert reply.policy.requests == [Request(50, 2, 2, 0, make.A, make.B)]
    assert (reply.src.prefix, reply.src.protocol, reply.policy.priority) == (16, 255, 0x80000005)
    assert (reply.lifetime_hard.addtime, reply.lifetime_current.addtime) == (600, int(bench.now))


def test_ports_protocols_and_host_bits_of_a_selector(bench, make):
    reply = bench.one(make.spd(src=Address(bytes((10, 1, 2, 3)), 24, 6, 80), dst=Address(make.B, 32, 6)))
    assert reply.src == Address(bytes((10, 1, 2, 0)), 24, 6, 80)
    assert reply.dst == Address(make.B, 32, 6, 0)
    selector = bench.database.spd.get(reply.policy.id).selector
    assert (selector.protocol, selector.sport_first, selector.sport_last) == (6, 80, 80)
    assert (selector.dport_first, selector.dport_last) == (0, 65535)
    everything = bench.one(make.spd(src=Address(bytes(16), 0, 0), dst=Address(bytes(16), 0, 0), action=1))
    assert (everything.src.prefix, everything.src.protocol, everything.policy.type) == (0, 255, 1)


@pytest.mark.parametrize("wire", [0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF])
def test_the_answer_has_the_priority_that_was_asked_for(bench, make, wire):
    """setkey(8) of ipsec-tools compares them, and warns of a kernel without priorities."""
    assert bench.one(make.spd(priority=wire)).policy.priority == wire
    assert bench.one(make.spd(T.X_SPDUPDATE, priority=wire)).policy.priority == wire
    assert bench.one(make.spd(T.X_SPDUPDATE, direction=FWD, priority=wire)).policy.priority == wire


@pytest.mark.parametrize("limit", [LifetimeExt(usetime=60), LifetimeExt(octets=1), LifetimeExt(allocations=1)])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_limits_of_a_policy_that_nobody_watches_are_refused(bench, make, limit, dialect):
    bench.open(2, dialect)
    assert bench.one(make.spd(lifetime_hard=limit), 2).errno == errno.EINVAL
    assert not len(bench.database.spd)


@pytest.mark.parametrize(("change", "number"), [
    ({"src": None}, errno.EINVAL),
    ({"policy": None}, errno.EINVAL),
    ({"policy": PolicyExt(3, OUT)}, errno.EINVAL),
    ({"policy": PolicyExt(2, 0)}, errno.EINVAL),
    ({"policy": PolicyExt(2, 4)}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT)}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT, requests=[Request(6, 1, 2)])}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT, requests=[Request(50, 0, 2)])}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT, requests=[Request(50, 3, 2)])}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT, requests=[Request(50, 1, 4)])}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT, requests=[Request(50, 2, 2)])}, errno.EINVAL),
    ({"policy": PolicyExt(2, OUT, requests=[Request(50, 1, 2)] * 5)}, errno.ELOOP),
    ({"src": Address(bytes(16), 0)}, errno.EINVAL),
])  # fmt: skip
def test_a_policy_that_lacks_something_is_refused_and_changes_nothing(bench, make, change, number):
    message = make.spd()
    for name, value in change.items():
        setattr(message, name, value)
    assert bench.one(message).errno == number
    assert not len(bench.database.spd)


def test_spdadd_of_a_taken_selector_is_eexist_and_spdupdate_replaces_it_under_the_same_id(bench, make):
    number = bench.one(make.spd()).policy.id
    assert bench.one(make.spd(action=0)).errno == errno.EEXIST
    assert bench.one(make.spd(T.X_SPDSETIDX)).errno == errno.EEXIST
    reply = bench.one(make.spd(T.X_SPDUPDATE, action=0))
    assert (reply.type, reply.policy.type, reply.policy.id) == (T.X_SPDUPDATE, 0, number)
    assert bench.one(make.spd(T.X_SPDUPDATE, direction=IN)).errno == 0


def test_unique_without_a_number_gets_one_above_the_manual_range_and_require_has_none(bench, make):
    requests = [Request(50, 1, 3, 0), Request(51, 1, 3, 0x4000), Request(108, 1, 3, 7), Request(51, 1, 2, 9)]
    reply = bench.one(make.spd(requests=requests))
    reqids = [each.reqid for each in reply.policy.requests]
    assert min(reqids[:2]) > 0x3FFF
    assert reqids[0] != reqids[1]
    assert reqids[2:] == [7, 0]


def test_delete_by_selector_and_by_id_and_get_by_id(bench, make):
    number = bench.one(make.spd()).policy.id
    bench.open(2)
    reply = bench.one(make.spd(T.X_SPDGET, number=number))
    assert (reply.type, reply.policy.requests) == (T.X_SPDGET, [Request(50, 2, 2, 0, make.A, make.B)])
    assert bench.inbox[2] == []
    assert bench.one(make.spd(T.X_SPDDELETE, direction=IN)).errno == errno.ENOENT
    assert bench.one(make.spd(T.X_SPDDELETE)).policy.id == number
    assert bench.one(make.spd(T.X_SPDGET, number=number)).errno == errno.ENOENT
    number = bench.one(make.spd()).policy.id
    assert bench.one(Message(T.X_SPDDELETE2, policy=PolicyExt(0, OUT, number))).type == T.X_SPDDELETE2
    assert bench.one(Message(T.X_SPDDELETE2, policy=PolicyExt(0, OUT, number))).errno == errno.ENOENT
    assert [each.type for each in bench.inbox[2]] == [T.X_SPDDELETE, T.X_SPDADD, T.X_SPDDELETE2]


def test_dump_and_flush_of_policies(bench, make):
    assert bench.one(Message(T.X_SPDDUMP)).errno == errno.ENOENT
    for last in range(5):
        bench.ask(make.spd(dst=Address(bytes((10, 3, last, 0)), 24, 255)))
    records = bench.ask(Message(T.X_SPDDUMP, seq=1, pid=4))
    assert [each.seq for each in records] == [4, 3, 2, 1, 0]
    assert [each.dst.address[2] for each in records] == [0, 1, 2, 3, 4]
    assert [each.type for each in bench.ask(Message(T.X_SPDFLUSH))] == [T.X_SPDFLUSH] * 2
    assert [each.type for each in bench.ask(Message(T.X_SPDFLUSH))] == [T.X_SPDFLUSH]


def inbound(bench):
    return [policy for policy in bench.database.spd if policy.direction is Direction.IN]


@pytest.mark.parametrize("order", [(IN, FWD), (FWD, IN)])
def test_a_fwd_policy_of_linux_is_one_with_the_in_policy_in_whatever_order_they_come(bench, make, order):
    ids = {direction: bench.one(make.spd(direction=direction)).policy.id for direction in order}
    assert len(inbound(bench)) == 1
    assert len(set(ids.values())) == 2
    records = bench.ask(Message(T.X_SPDDUMP))
    assert sorted(each.policy.direction for each in records) == [IN, FWD]
    assert bench.one(make.spd(direction=FWD)).errno == errno.EEXIST
    assert bench.one(make.spd(direction=IN)).errno == errno.EEXIST
    assert bench.one(make.spd(T.X_SPDGET, number=ids[FWD])).policy.direction == FWD


def test_a_fwd_policy_alone_is_enforced_and_dumped_as_fwd_only(bench, make):
    number = bench.one(make.spd(direction=FWD)).policy.id
    assert len(inbound(bench)) == 1
    assert [each.policy.direction for each in bench.ask(Message(T.X_SPDDUMP))] == [FWD]
    assert bench.one(make.spd(T.X_SPDDELETE, direction=IN)).errno == errno.ENOENT
    bench.open(2, Dialect.FREEBSD)
    assert [each.policy.direction for each in bench.ask(Message(T.X_SPDDUMP), 2)] == [IN]
    assert bench.one(make.spd(T.X_SPDDELETE2, number=number)).errno == 0
    assert inbound(bench) == []


def test_ids_of_fwd_policies_say_their_direction_as_those_of_linux_do(bench, make):
    """racoon reads it in the low three bits: in 0, out 1, fwd 2, sockets from 3 on."""
    ids = [
        bench.one(make.spd(direction=FWD, src=Address(bytes((10, number, 0, 0)), 16, 255))).policy.id
        for number in range(1, 12)
    ]
    assert {number % 8 for number in ids} == {2}
    assert len(set(ids)) == len(ids)


def test_the_inbound_policy_stays_in_force_until_both_in_and_fwd_are_deleted(bench, make):
    for direction in (IN, FWD):
        bench.ask(make.spd(direction=direction))
    assert bench.one(make.spd(T.X_SPDDELETE, direction=IN)).errno == 0
    assert len(inbound(bench)) == 1
    assert bench.one(make.spd(direction=IN)).errno == 0
    assert bench.one(make.spd(T.X_SPDDELETE, direction=FWD)).errno == 0
    assert len(inbound(bench)) == 1
    assert bench.one(make.spd(T.X_SPDDELETE, direction=IN)).errno == 0
    assert inbound(bench) == []
    bench.ask(make.spd(direction=FWD))
    bench.ask(Message(T.X_SPDFLUSH))
    assert bench.one(make.spd(direction=FWD)).errno == 0


def test_spdexpire_tells_everybody(bench, make):
    bench.ask(make.spd(direction=IN, lifetime_hard=LifetimeExt(addtime=5)))
    gone = bench.database.spd.expired(bench.now + 6)
    bench.deliver(bench.server.policy_expired(gone[0]))
    assert bench.inbox[1][-1].type == T.X_SPDEXPIRE


def test_acquire_asks_once_for_each_kind_of_sa_until_it_is_answered_or_half_a_minute_is_over(bench, make):
    bench.ask(make.spd())
    policy = bench.database.spd.dump()[0]
    transform = policy.transforms[0]

    def acquire(src=make.A, dst=make.B):
        before = len(bench.inbox[1])
        bench.deliver(bench.server.acquire(policy, transform, src, dst))
        return bench.inbox[1][before:]

    assert acquire() == []  # nobody registered
    bench.ask(Message(T.REGISTER, 3))
    (message,) = acquire()
    assert (message.type, message.satype, message.seq, message.pid) == (T.ACQUIRE, 3, 1, 0)
    assert (message.src.address, message.dst.address, message.policy.id) == (make.A, make.B, policy.id)
    assert {(c.encrypt, c.auth) for c in message.proposal.combinations} >= {(20, 0), (12, 5)}
    assert acquire() == []
    assert acquire(dst=bytes((10, 0, 0, 3)))[0].seq == 2
    bench.ask(make.add())
    assert acquire()[0].seq == 3
    bench.now += 31
    bench.deliver(bench.server.tick())
    assert acquire()[0].seq == 4


def test_a_key_manager_that_gives_up_is_heard_and_one_that_comes_later_is_asked_again(bench, make):
    bench.ask(make.spd())
    policy = bench.database.spd.dump()[0]
    bench.ask(Message(T.REGISTER, 3))
    bench.deliver(bench.server.acquire(policy, policy.transforms[0], make.A, make.B))
    seq = bench.inbox[1][-1].seq
    assert bench.ask(Message(T.ACQUIRE, 3, errno.ETIMEDOUT, seq)) == []
    assert bench.database.failed == [(50, make.A, make.B, 0)]
    assert bench.ask(Message(T.ACQUIRE, 3, 0, seq)) == []
    assert bench.one(Message(T.ACQUIRE, 3, 1, seq, src=make.host(make.A))).errno == errno.EOPNOTSUPP
    assert len(bench.database.failed) == 1
    bench.open(2)
    bench.ask(Message(T.REGISTER, 3), 2)
    bench.deliver(bench.server.acquire(policy, policy.transforms[0], make.A, make.B))
    assert bench.inbox[2][-1].type == T.ACQUIRE


def test_a_range_that_is_no_prefix_is_shown_as_the_smallest_prefix_that_holds_it():
    selector = Selector(bytes((10, 0, 0, 3)), bytes((10, 0, 0, 9)), bytes(4), b"\xff" * 4, 17, 100, 200)
    message = from_policy(Policy(Direction.OUT, selector, Action.DISCARD))
    assert message.src == Address(bytes((10, 0, 0, 0)), 28, 17, 0)
    assert message.dst == Address(bytes(4), 0, 17, 0)
