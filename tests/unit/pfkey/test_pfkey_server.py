import errno
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.numbers import SaState
from ipsecq.pfkey import messages
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.extensions import SpiRange
from ipsecq.pfkey.memory import MemoryDatabase
from ipsecq.pfkey.messages import Message, build
from ipsecq.pfkey.server import PfkeyServer

T = MessageType


def test_register_lists_algorithms_and_a_second_one_is_eexist(bench):
    reply = bench.one(Message(T.REGISTER, 3, seq=1, pid=2))
    assert (reply.type, reply.satype, reply.seq, reply.pid) == (T.REGISTER, 3, 1, 2)
    assert {each.id for each in reply.supported_encrypt.algorithms} >= {11, 12, 13, 18, 19, 20}
    assert {each.id for each in reply.supported_auth.algorithms} >= {3, 5, 6, 7}
    aes = next(each for each in reply.supported_encrypt.algorithms if each.id == 12)
    assert (aes.ivlen, aes.minbits, aes.maxbits) == (16, 128, 256)
    assert bench.one(Message(T.REGISTER, 3)).errno == errno.EEXIST
    assert bench.one(Message(T.REGISTER, 0)).errno == 0
    assert bench.one(Message(T.REGISTER, 10)).errno == errno.EINVAL


def test_legacy_algorithms_are_offered_and_taken_only_when_allowed(make):
    for allowed in (False, True):
        server = PfkeyServer(MemoryDatabase(), lambda: 0.0, lambda n: 0, allow_legacy=allowed)
        server.open(1, privileged=True)
        ((_, octets),) = server.handle(1, build(Message(T.REGISTER, 3)))
        offered = {each.id for each in messages.parse(octets).supported_encrypt.algorithms}
        assert (3 in offered) is allowed


def test_a_register_is_seen_by_those_who_registered_for_that_type(bench):
    bench.open(2)
    bench.open(3)
    bench.ask(Message(T.REGISTER, 3), 2)
    bench.ask(Message(T.REGISTER, 2), 3)
    bench.ask(Message(T.REGISTER, 3))
    assert [len(bench.inbox[client]) for client in (1, 2, 3)] == [1, 2, 1]


def test_a_promiscuous_client_sees_requests_and_replies_of_others(bench, make):
    bench.open(2)
    assert bench.one(Message(T.X_PROMISC, 2), 2).errno == errno.EINVAL
    assert [each.type for each in bench.ask(Message(T.X_PROMISC, 1), 2)] == [T.X_PROMISC] * 2
    bench.inbox[2].clear()
    bench.ask(make.named(T.GET))
    assert [(each.type, each.errno) for each in bench.inbox[2]] == [(T.GET, 0), (T.GET, errno.ESRCH)]
    bench.ask(Message(T.X_PROMISC, 0), 2)
    bench.inbox[2].clear()
    bench.ask(make.named(T.GET))
    assert bench.inbox[2] == []


def test_a_promiscuous_client_of_the_other_dialect_gets_a_translation_without_keys_unless_it_is_root(bench, make):
    bench.open(2, Dialect.FREEBSD, privileged=False)
    bench.ask(Message(T.X_PROMISC, 1), 2)
    bench.inbox[2].clear()
    bench.ask(make.add())
    request = bench.inbox[2][0]
    assert (request.type, request.src.address, request.key_auth) == (T.ADD, make.A, None)


@pytest.mark.parametrize("kind", [T.EXPIRE, T.X_PCHANGE, T.X_SPDACQUIRE, T.X_SPDEXPIRE, T.X_NAT_T_NEW_MAPPING])
def test_what_is_not_for_clients_to_send_is_eopnotsupp(bench, kind):
    assert bench.one(Message(kind)).errno == errno.EOPNOTSUPP


@pytest.mark.parametrize(("octets", "number"), [
    (b"", errno.EMSGSIZE),
    (b"\2", errno.EMSGSIZE),
    (struct.pack("=BBBBHHII", 1, 10, 0, 0, 2, 0, 7, 8), errno.EINVAL),
    (struct.pack("=BBBBHHII", 2, 10, 0, 0, 9, 0, 7, 8), errno.EMSGSIZE),
    (struct.pack("=BBBBHHII", 2, 10, 0, 0, 3, 0, 7, 8) + struct.pack("=HHI", 5, 1, 0), errno.EINVAL),
])  # fmt: skip
def test_a_malformed_message_is_answered_with_its_header_and_an_errno(bench, octets, number):
    ((client, reply),) = bench.server.handle(1, octets)
    assert (client, len(reply)) == (1, 16)
    assert reply[2] == number
    if len(octets) >= 16:
        assert reply[8:16] == octets[8:16]


def test_a_client_that_left_in_the_middle_of_a_dump_leaves_nothing_behind(bench, make):
    bench.open(2)
    bench.ask(make.add())
    bench.server.handle(2, build(Message(T.DUMP)))
    bench.server.close(2)
    bench.deliver(bench.server.handle(1, build(make.add(0x2000))))
    assert sorted(bench.server.hub.clients) == [1]


# -- any sequence of valid messages keeps SAD and SPD equal to a naive model --------------------------------------

spis = st.integers(0x100, 0x104)
steps = st.lists(
    st.tuples(
        st.sampled_from((
            "add", "update", "delete", "getspi", "flush", "wait",
            "spdadd", "spdupdate", "spddelete", "spdflush", "fwdadd", "fwddelete",
        )),
        spis,
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(script=steps)
def test_any_script_leaves_what_a_naive_model_has(script):
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("bench", Path(__file__).with_name("conftest.py"))
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    bench = make.Bench()
    bench.open()
    sas, larval, policies, forwards = {}, {}, set(), set()
    for step, n in script:
        selector = {"src": make.Address(bytes((10, n & 7, 0, 0)), 16), "dst": make.Address(bytes(4), 0), "action": 1}
        match step:
            case "add":
                reply, good = bench.one(make.add(n)), n not in sas
                if good:
                    sas[n] = "mature"
            case "update":
                reply, good = bench.one(make.add(n, T.UPDATE)), n in sas
                if good:
                    sas[n] = "mature"
            case "getspi":
                request = make.named(T.GETSPI, spirange=SpiRange(n, n))
                reply, good = bench.one(request), n not in sas
                if good:
                    sas[n], larval[n] = "larval", bench.now
            case "delete":
                reply, good = bench.one(make.named(T.DELETE, n)), sas.pop(n, None) is not None
            case "flush":
                reply, good = bench.ask(Message(T.FLUSH))[0], True
                sas.clear()
            case "wait":
                bench.now += 12
                bench.deliver(bench.server.tick())
                for spi, born in larval.items():
                    if sas.get(spi) == "larval" and bench.now - born >= 30:
                        del sas[spi]
                continue
            case "spdadd" | "spdupdate":
                kind = T.X_SPDADD if step == "spdadd" else T.X_SPDUPDATE
                reply, good = bench.one(make.spd(kind, 1, **selector)), step == "spdupdate" or n not in policies
                policies.add(n)
            case "spddelete":
                reply, good = bench.one(make.spd(T.X_SPDDELETE, 1, **selector)), n in policies
                policies.discard(n)
            case "fwdadd":
                reply, good = bench.one(make.spd(direction=3, **selector)), n not in forwards
                forwards.add(n)
            case "fwddelete":
                reply, good = bench.one(make.spd(T.X_SPDDELETE, 3, **selector)), n in forwards
                forwards.discard(n)
            case _:
                reply, good = bench.ask(Message(T.X_SPDFLUSH))[0], True
                policies.clear()
                forwards.clear()
        assert (reply.errno == 0) is good, (step, n)
        found = {sa.spi: "larval" if sa.state is SaState.LARVAL else "mature" for sa in bench.database.sad}
        assert found == sas
        assert {policy.selector.src_first[1] for policy in bench.database.spd} == {n & 7 for n in policies | forwards}
        dumped = [each for each in bench.ask(Message(T.X_SPDDUMP)) if not each.errno]
        assert sorted((each.policy.direction, each.src.address[1]) for each in dumped) == sorted(
            [(1, n & 7) for n in policies] + [(3, n & 7) for n in forwards]
        )


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.integers(0, 30), st.sampled_from(list(Dialect)))
def test_no_octets_make_the_server_raise_or_stay_silent(octets, kind, dialect):
    server = PfkeyServer(MemoryDatabase(), lambda: 0.0, random.Random(2).randrange)
    server.open(1, privileged=True, dialect=dialect)
    octets = octets[: len(octets) & ~7]
    data = struct.pack("=BBBBHHII", 2, kind, 0, 3, 2 + len(octets) // 8, 0, 7, 8) + octets
    replies = server.handle(1, data)
    assert replies or kind == T.ACQUIRE


def test_members_of_the_group_look_on_and_change_nothing(bench, make):
    bench.one(make.add())
    bench.one(make.spd())
    bench.open(2, privileged=False)
    for message in (
        make.add(0x2000), make.add(kind=MessageType.UPDATE), make.named(MessageType.DELETE),
        make.spd(MessageType.X_SPDUPDATE),
        Message(MessageType.FLUSH, seq=1, pid=1), Message(MessageType.X_SPDFLUSH, seq=1, pid=1),
        Message(MessageType.GETSPI, 3, seq=1, pid=1, src=make.host(make.A), dst=make.host(make.B)),
    ):  # fmt: skip
        assert bench.one(message, 2).errno == errno.EPERM
    assert len(bench.database.sad) == len(bench.database.spd) == 1
    assert len(bench.ask(Message(MessageType.DUMP, seq=2, pid=1), 2)) == 1
    assert bench.one(make.named(MessageType.GET), 2).errno == 0
