"""Any sequence of PF_KEY messages, delays and restarts of workers keeps SAD, SPD and workers equal to a naive model."""

import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.keys import AuthorityDatabase
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.replica import Replica
from ipsecq.daemon.table import SharedTable
from ipsecq.numbers import Direction, SaState
from ipsecq.pfkey import messages
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.extensions import Address, KeyExt, LifetimeExt, Sa, SpiRange
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.server import PfkeyServer
from ipsecq.pfkey.xextensions import Sa2
from ipsecq.policy.setpolicy import priority_from_wire
from ipsecq.sa.association import SaKey
from ipsecq.secret import Key

T = MessageType
HOSTS = (bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)), bytes(15) + b"\1", bytes(15) + b"\2")
PAIRS = ((HOSTS[0], HOSTS[1]), (HOSTS[2], HOSTS[3]))
SATYPES = {3: 50, 2: 51}
NETS = (bytes((10, 1, 0, 0)), bytes((10, 2, 0, 0)))
IN, OUT, FWD = 1, 2, 3
GRACE, LARVAL = 2, 30
WORKERS = 2


@dataclass
class ModelSa:
    """What a client knows of an SA."""

    src: bytes
    larval: bool
    created: float
    mode: int = 0
    reqid: int = 0
    key: bytes = b""
    replay: int = 0
    soft: int = 0
    hard: int = 0
    dying: bool = False


@dataclass
class ModelPolicy:
    """What a client knows of a policy."""

    action: int
    priority: int
    requests: tuple
    id: int
    created: float
    lifetime: int = 0


@dataclass
class Model:
    """All of it, as a reader of RFC 2367 and docs/pfkey.md would keep it."""

    sas: dict = field(default_factory=dict)
    leaving: dict = field(default_factory=dict)
    policies: dict = field(default_factory=dict)

    def successor(self, key, sa):
        return any(
            other.src == sa.src and there[:2] == key[:2] and other.mode == sa.mode and sa.reqid in (0, other.reqid)
            for there, other in self.sas.items()
            if there != key and not other.larval
        )

    def enforced(self):
        """(direction, selector) to policy: out, and in by the client's own or the fwd policy with its selector."""
        found = {}
        for (direction, selector), policy in self.policies.items():
            if direction == FWD:
                found.setdefault((Direction.IN, selector), policy)
            else:
                found[Direction(direction), selector] = policy
        return found


def address(packed, prefix=None, protocol=0, port=0):
    return Address(packed, len(packed) * 8 if prefix is None else prefix, protocol, port)


pairs = st.sampled_from(PAIRS)
satypes = st.sampled_from((3, 3, 3, 2))
spis = st.integers(0x1000, 0x1003)
directions = st.sampled_from((IN, OUT, FWD))
selectors = st.tuples(st.just((0, 1)), st.sampled_from((16, 24)), st.sampled_from((255, 255, 6)))
limits = st.sampled_from((0, 0, 5, 60))


class Machine(RuleBasedStateMachine):
    """A real server over the daemon's authority, time, and workers that follow late or begin anew."""

    def __init__(self):
        super().__init__()
        self.directory = TemporaryDirectory()
        path = Path(self.directory.name)
        (path / "state").mkdir()
        table = SharedTable.open(path / "table", bytes(16), capacity=1 << 14)
        self.authority = Authority(table, LeaseBook.open(path / "state", table, b"m" * 32), rekey_grace=GRACE)
        self.now = 1_700_000_000.0
        database = AuthorityDatabase(self.authority, lambda *what: None, lambda: self.now)
        self.server = PfkeyServer(database, lambda: self.now, random.Random(1).randrange)
        self.server.open(1, privileged=True)
        self.server.open(2, privileged=False)
        self.model = Model()
        self.workers = [Replica() for _ in range(WORKERS)]
        self.seq, self.late = 0, False

    def teardown(self):
        self.directory.cleanup()

    # -- talk ------------------------------------------------------------------------------------------------------

    def send(self, data, client=1):
        """(what the sender got, what the other client got), parsed."""
        got = {1: [], 2: []}
        for who, octets in self.server.handle(client, data):
            got[who].append(messages.parse(octets, Dialect.LINUX, reply=True))
        while more := self.server.more(client, 3):
            got[client] += [messages.parse(octets, Dialect.LINUX, reply=True) for octets in more]
        return got[client], got[3 - client]

    def ask(self, message):
        """The one reply; what everybody is told is told to the other client, too."""
        self.seq += 1
        message.seq, message.pid = self.seq, 77
        mine, others = self.send(messages.build(message, Dialect.LINUX))
        assert len(mine) >= 1
        assert all((each.type, each.seq, each.pid) == (message.type, self.seq, 77) for each in mine + others)
        assert all(each.key_encrypt is None for each in others)
        if mine[0].errno:
            assert len(mine) == 1
            assert others == []
        return mine[0]

    def publish(self):
        """Until nothing is left to say: all workers have it."""
        while batch := self.authority.take():
            for worker in self.workers:
                worker.apply(batch.operations)
            self.authority.done(batch)

    # -- time, workers ---------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from((0.5, 3.0, 10.0, 31.0)))
    def time_passes(self, seconds):
        self.publish()  # workers judge what they have
        self.now += seconds
        self.server.tick()
        self.authority.part(self.now)
        for sa, hard in self.authority.expire(self.now, self.authority.sad.dump()):
            self.server.expire(sa, hard=hard)
        for policy in self.authority.expire_policies(self.now):
            self.server.policy_expired(policy)
        for at, sa in list(self.model.sas.items()):
            age = self.now - sa.created
            if (sa.larval and age >= LARVAL) or (sa.hard and age >= sa.hard):
                del self.model.sas[at]
            elif sa.soft and age >= sa.soft:
                sa.dying = True
        self.model.leaving = {at: each for at, each in self.model.leaving.items() if each[0] > self.now}
        enforced = self.model.enforced()
        for (direction, selector), policy in list(self.model.policies.items()):
            # A shadow goes with the policy that stands for it.
            stands = enforced[Direction.IN, selector] if direction == FWD else policy
            if stands.lifetime and self.now - stands.created >= stands.lifetime and policy.lifetime:
                del self.model.policies[direction, selector]

    @rule(number=st.integers(0, WORKERS - 1))
    def a_worker_is_replaced(self, number):
        """The new one gets the whole state, and after it what the others have not been told yet."""
        self.workers[number] = Replica()
        self.workers[number].apply(self.authority.whole_state())

    @rule(late=st.booleans())
    def workers_follow(self, late):
        """From now on at once, or when they are told next."""
        self.late = late

    @invariant()
    def workers_have_the_models_tables(self):
        if not self.late:
            self.publish()
            for worker in self.workers:
                self.check_worker(worker)

    # -- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def the_sad_is_the_models(self):
        assert {tuple(sa.key) for sa in self.authority.sad} == set(self.model.sas)
        for at, expected in self.model.sas.items():
            sa = self.authority.sad.get(*at)
            assert (sa.src, sa.state is SaState.LARVAL) == (expected.src, expected.larval)
            if not expected.larval:
                self.check_sa(sa, expected)

    @invariant()
    def the_spd_is_the_models(self):
        self.check_spd(self.authority.spd)

    @invariant()
    def dumps_are_whole(self):
        mine, _ = self.send(messages.build(Message(T.DUMP, seq=1), Dialect.LINUX))
        if self.model.sas:
            assert [each.seq for each in mine] == list(range(len(self.model.sas) - 1, -1, -1))
            assert {(each.dst.address, SATYPES[each.satype], each.sa.spi) for each in mine} == set(self.model.sas)
        mine, _ = self.send(messages.build(Message(T.X_SPDDUMP, seq=1), Dialect.LINUX))
        if self.model.policies:
            assert {(each.policy.direction, each.policy.id) for each in mine} == {
                (direction, policy.id) for (direction, _), policy in self.model.policies.items()
            }

    def check_sa(self, sa, expected):
        assert (int(sa.mode), sa.reqid, sa.replay_window) == (expected.mode, expected.reqid, expected.replay)
        assert (sa.soft.addtime, sa.hard.addtime, sa.created) == (expected.soft, expected.hard, expected.created)
        assert sa.state is (SaState.DYING if expected.dying else SaState.MATURE)

    def check_spd(self, spd):
        found = {}
        for policy in spd.dump():
            src, dst = (NETS.index(each) for each in (policy.selector.src_first, policy.selector.dst_first))
            prefix = 24 if policy.selector.src_last[2] == 0 else 16
            found[policy.direction, ((src, dst), prefix, policy.selector.protocol)] = policy
        expected = self.model.enforced()
        assert set(found) == set(expected)
        for at, policy in found.items():
            want = expected[at]
            assert int(policy.action) == want.action
            assert policy.priority == priority_from_wire(want.priority)
            assert tuple((int(each.level), each.src, each.dst) for each in policy.transforms) == want.requests

    def check_worker(self, worker):
        live = {at: sa for at, sa in self.model.sas.items() if not sa.larval}
        receiving = live | {at: sa for at, (_, sa) in self.model.leaving.items()}
        assert {tuple(sa.key) for sa in worker.sad} == set(receiving)
        assert {tuple(at) for at in worker.larval} == {at for at, sa in self.model.sas.items() if sa.larval}
        for at, expected in receiving.items():
            sa = worker.sad.inbound(SaKey(*at))
            assert sa is not None
            if at in live:
                self.check_sa(sa, expected)
            assert sa.slot >= 0
        slots = [sa.slot for sa in worker.sad]
        assert len(set(slots)) == len(slots)
        # What sends is never an SA that its daemon has deleted.
        for at, sa in receiving.items():
            found = worker.sad.outbound(at[1], sa.mode, sa.src, at[0], sa.reqid)
            assert found is None or tuple(found.key) in live
            assert (found is not None) == self.model.successor((*at[:2], None), sa)
            for oldest in (True, False):
                found = worker.sad.outbound(at[1], sa.mode, sa.src, at[0], sa.reqid, oldest=oldest)
                original = self.authority.sad.outbound(at[1], sa.mode, sa.src, at[0], sa.reqid, oldest=oldest)
                assert (found and found.key) == (original and original.key)
        self.check_spd(worker.spd)
        assert [replace(each) for each in worker.spd.dump()] == self.authority.spd.dump()


class Associations(Machine):
    """Messages about SAs, and nonsense."""

    def message(self, kind, satype, pair, spi, key=b"k" * 20, *, mode=2, reqid=0, replay=32, soft=0, hard=0):
        esp = satype == 3
        return Message(
            kind, satype, sa=Sa(spi, replay, 1, 5 if not esp else 0, 20 if esp else 0),
            src=address(pair[0]), dst=address(pair[1]), sa2=Sa2(mode, reqid),
            key_encrypt=KeyExt(Key(key)) if esp else None,
            key_auth=None if esp else KeyExt(Key(key + bytes(12))),
            lifetime_hard=LifetimeExt(0, 0, hard, 0), lifetime_soft=LifetimeExt(0, 0, soft, 0),
        )  # fmt: skip

    @rule(pair=pairs, satype=satypes, width=st.integers(0, 3))
    def getspi(self, pair, satype, width):
        taken = {spi for dst, protocol, spi in self.model.sas if (dst, protocol) == (pair[1], SATYPES[satype])}
        reply = self.ask(
            Message(T.GETSPI, satype, src=address(pair[0]), dst=address(pair[1]), spirange=SpiRange(0x1000, 0x1000 + width))
        )
        if set(range(0x1000, 0x1001 + width)) <= taken:
            assert reply.errno == 2
            return
        assert reply.errno == 0
        assert 0x1000 <= reply.sa.spi <= 0x1000 + width
        assert reply.sa.spi not in taken
        at = (pair[1], SATYPES[satype], reply.sa.spi)
        self.model.leaving.pop(at, None)
        self.model.sas[at] = ModelSa(pair[0], True, self.now)

    def one_of(self, data):
        """(src, dst), SA type and SPI, mostly those of an SA that is there."""
        there = [((sa.src, at[0]), 3 if at[1] == 50 else 2, at[2]) for at, sa in self.model.sas.items()]
        return data.draw(st.sampled_from([*there, *there, (PAIRS[0], 3, 0x1003)]))

    @rule(
        pair=pairs, satype=satypes, spi=spis, which=st.integers(0, 1), mode=st.sampled_from((2, 2, 2, 1)),
        reqid=st.sampled_from((0, 0, 0, 9)), replay=st.sampled_from((32, 32, 200)), soft=limits, hard=limits,
    )  # fmt: skip
    def add(self, pair, satype, spi, which, mode, reqid, replay, soft, hard):
        at, key = (pair[1], SATYPES[satype], spi), self.key(which, satype, spi, pair)
        reply = self.ask(
            self.message(T.ADD, satype, pair, spi, key, mode=mode, reqid=reqid, replay=replay, soft=soft, hard=hard)
        )
        if at in self.model.sas:
            assert reply.errno == 17
            return
        assert reply.errno == 0
        self.model.leaving.pop(at, None)
        self.model.sas[at] = ModelSa(pair[0], False, self.now, mode, reqid, key, replay, soft, hard)

    @staticmethod
    def key(which, satype, spi, pair):
        """An SA has a key of its own, whatever it replaces: what two of them share is the operator's to avoid."""
        return bytes((which, satype, spi & 255, PAIRS.index(pair))) * 5

    @rule(
        data=st.data(), which=st.sampled_from((0, 0, 1)), mode=st.sampled_from((2, 2, 2, 1)),
        replay=st.sampled_from((32, 32, 200)), soft=limits, hard=limits,
    )  # fmt: skip
    def update(self, data, which, mode, replay, soft, hard):
        pair, satype, spi = self.one_of(data)
        at, key = (pair[1], SATYPES[satype], spi), self.key(which, satype, spi, pair)
        old = self.model.sas.get(at)
        reply = self.ask(self.message(T.UPDATE, satype, pair, spi, key, mode=mode, replay=replay, soft=soft, hard=hard))
        if old is None:
            assert reply.errno == 3
        elif old.larval:
            assert reply.errno == 0
            self.model.sas[at] = ModelSa(pair[0], False, self.now, mode, 0, key, replay, soft, hard)
        elif (old.mode, old.key) != (mode, key):
            assert reply.errno == 22
        else:
            assert reply.errno == 0
            old.soft, old.hard, old.dying = soft, hard, False

    @rule(data=st.data())
    def delete(self, data):
        pair, satype, spi = self.one_of(data)
        at = (pair[1], SATYPES[satype], spi)
        reply = self.ask(Message(T.DELETE, satype, sa=Sa(spi), src=address(pair[0]), dst=address(pair[1])))
        sa = self.model.sas.pop(at, None)
        assert reply.errno == (3 if sa is None else 0)
        if sa is not None and not sa.larval and self.model.successor(at, sa):
            self.model.leaving[at] = self.now + GRACE, sa

    @rule(data=st.data())
    def get(self, data):
        pair, satype, spi = self.one_of(data)
        reply = self.ask(Message(T.GET, satype, sa=Sa(spi), src=address(pair[0]), dst=address(pair[1])))
        sa = self.model.sas.get((pair[1], SATYPES[satype], spi))
        assert reply.errno == (3 if sa is None else 0)
        if sa is not None and not sa.larval:
            assert (reply.sa2.mode, reply.sa2.reqid, reply.sa.replay) == (sa.mode, sa.reqid, sa.replay)
            assert (reply.lifetime_soft.addtime, reply.lifetime_hard.addtime) == (sa.soft, sa.hard)

    @rule(satype=st.sampled_from((0, *SATYPES)))
    @precondition(lambda self: len(self.model.sas) > 5)
    def flush(self, satype):
        assert self.ask(Message(T.FLUSH, satype)).errno == 0
        for table in (self.model.sas, self.model.leaving):
            for at in [at for at in table if not satype or at[1] == SATYPES[satype]]:
                del table[at]

    @rule(
        kind=st.sampled_from((T.ADD, T.UPDATE, T.DELETE, T.GETSPI)), pair=pairs, satype=satypes, spi=spis,
        how=st.sampled_from(("cut", "twice", "empty", "beyond", "unaddressed")),
    )  # fmt: skip
    def nonsense(self, kind, pair, satype, spi, how):
        """A message that is malformed anywhere is refused; nothing of it happens, and nobody else hears of it."""
        message = self.message(kind, satype, pair, spi)
        if how == "unaddressed":
            message.dst = None
        data = messages.build(message, Dialect.LINUX)
        if how == "cut":
            data = data[:-8]
        else:
            if how == "twice":
                data += data[16:32]
            elif how == "empty":
                data += bytes(8)
            elif how == "beyond":
                data += bytes((9, 0, 1, 0)) + bytes(4)
            data = data[:4] + (len(data) // 8).to_bytes(2, sys.byteorder) + data[6:]
        mine, others = self.send(data)
        assert [each.errno for each in mine] == [90 if how == "cut" else 22]
        assert others == []

    @rule(kind=st.sampled_from((T.ADD, T.DELETE, T.FLUSH, T.GETSPI)), pair=pairs, satype=satypes, spi=spis)
    def one_who_only_looks_on(self, kind, pair, satype, spi):
        mine, others = self.send(messages.build(self.message(kind, satype, pair, spi), Dialect.LINUX), client=2)
        assert [each.errno for each in mine] == [1]
        assert others == []


class Policies(Machine):
    """Messages about policies."""

    def selector(self, selector):
        (src, dst), prefix, protocol = selector
        return {"src": address(NETS[src], prefix, protocol), "dst": address(NETS[dst], prefix, protocol)}

    @rule(
        kind=st.sampled_from((T.X_SPDADD, T.X_SPDUPDATE)), direction=directions, selector=selectors,
        action=st.integers(0, 2), priority=st.sampled_from((0, 1 << 31, (1 << 31) - 5, (1 << 31) + 5)),
        level=st.integers(0, 2), lifetime=limits,
    )  # fmt: skip
    def spd_put(self, kind, direction, selector, action, priority, level, lifetime):
        ends = (HOSTS[0], HOSTS[1])[:: 1 if direction == OUT else -1]
        requests = [Request(50, 2, level, 0, *ends)] if action == 2 else []
        reply = self.ask(Message(
            kind, **self.selector(selector), policy=PolicyExt(action, direction, 0, priority, requests),
            lifetime_hard=LifetimeExt(0, 0, lifetime, 0),
        ))  # fmt: skip
        old = self.model.policies.get((direction, selector))
        if kind == T.X_SPDADD and old is not None:
            assert reply.errno == 17
            return
        assert reply.errno == 0
        assert not any(each.id == reply.policy.id for each in self.model.policies.values() if each is not old)
        self.model.policies[direction, selector] = ModelPolicy(
            action, priority, tuple((each.level, each.src, each.dst) for each in requests), reply.policy.id,
            self.now, lifetime,
        )  # fmt: skip

    @rule(direction=directions, selector=selectors)
    def spd_delete(self, direction, selector):
        reply = self.ask(Message(T.X_SPDDELETE, **self.selector(selector), policy=PolicyExt(0, direction, 0, 0, [])))
        assert reply.errno == (0 if self.model.policies.pop((direction, selector), None) else 2)

    @rule(kind=st.sampled_from((T.X_SPDDELETE2, T.X_SPDGET)), data=st.data())
    @precondition(lambda self: self.model.policies)
    def spd_by_id(self, kind, data):
        at = data.draw(st.sampled_from(sorted(self.model.policies)))
        policy = self.model.policies[at]
        reply = self.ask(Message(kind, policy=PolicyExt(0, 0, policy.id, 0, [])))
        assert reply.errno == 0
        assert (reply.policy.id, reply.policy.direction, reply.policy.type) == (policy.id, at[0], policy.action)
        if kind == T.X_SPDDELETE2:
            del self.model.policies[at]

    @rule()
    @precondition(lambda self: len(self.model.policies) > 5)
    def spd_flush(self):
        assert self.ask(Message(T.X_SPDFLUSH)).errno == 0
        self.model.policies.clear()


class Everything(Associations, Policies):
    """Both."""


# Shrinking a failure takes longer than a test may; a seed in the output repeats it.
LIMITS = settings(
    max_examples=50, stateful_step_count=50, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)  # fmt: skip
TestAssociations, TestPolicies, TestEverything = (each.TestCase for each in (Associations, Policies, Everything))
TestAssociations.settings = TestPolicies.settings = TestEverything.settings = LIMITS
