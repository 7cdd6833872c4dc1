"""What is printed: the layout of setkey -D and -DP, and sentences that load again."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.crypto import registry
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol, SaState
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sa.association import Lifetime, NatTraversal, SecurityAssociation
from ipsecq.secret import Key
from ipsecq.setkey import commands as c
from ipsecq.setkey.parser import parse
from ipsecq.setkey.printer import Usage, config_policy, config_sa, dump_policy, dump_sa

A, B = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


SA = SecurityAssociation(
    Protocol.ESP, 0x1000, A, B, Mode.TUNNEL, 5, "aes-cbc", Key(bytes(range(16))), "hmac-sha2-256",
    Key(bytes(range(32))),
    replay_window=256, hard=Lifetime(addtime=3600, bytes=1000), soft=Lifetime(addtime=3000), created=NOW - 60, pid=42,
)  # fmt: skip


def test_dump_has_the_layout_that_scripts_know():
    assert dump_sa(SA, NOW, Usage(3, 252, int(NOW) - 50, 3), remaining=1) == (
        "10.0.0.1 10.0.0.2\n"
        "\tesp mode=tunnel spi=4096(0x00001000) reqid=5(0x00000005)\n"
        "\tE: aes-cbc  00010203 04050607 08090a0b 0c0d0e0f\n"
        "\tA: hmac-sha2-256  00010203 04050607 08090a0b 0c0d0e0f 10111213 14151617 18191a1b 1c1d1e1f\n"
        "\tseq=0x00000003 replay=32 flags=0x00000000 state=mature \n"
        "\tcreated: Nov 14 22:12:20 2023\tcurrent: Nov 14 22:13:20 2023\n"
        "\tdiff: 60(s)\thard: 3600(s)\tsoft: 3000(s)\n"
        "\tlast: Nov 14 22:12:30 2023\thard: 0(s)\tsoft: 0(s)\n"
        "\tcurrent: 252(bytes)\thard: 1000(bytes)\tsoft: 0(bytes)\n"
        "\tallocated: 3\thard: 0\tsoft: 0\n"
        "\tsadb_seq=1 pid=42 refcnt=0\n"
    )


@pytest.mark.parametrize(("packets", "octets"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (32, 4)])
def test_a_window_is_shown_in_octets_rounded_up_so_that_none_looks_turned_off(packets, octets):
    assert f" replay={octets} " in dump_sa(replace(SA, replay_window=packets), NOW)


def test_dump_of_nat_traversal_ipcomp_and_long_keys():
    natt = replace(SA, natt=NatTraversal(4500, 1024, B, A))
    lines = dump_sa(natt, NOW).splitlines()
    assert lines[0] == "10.0.0.1[4500] 10.0.0.2[1024]"
    assert lines[1].startswith("\tesp-udp mode=tunnel ")
    assert lines[2] == "\tNAT: OAI=10.0.0.2 OAR=10.0.0.1"
    compressed = SecurityAssociation(Protocol.IPCOMP, 0x1000, A, B, compression="deflate", state=SaState.LARVAL)
    text = dump_sa(compressed, NOW)
    assert "\tC: deflate \n" in text
    assert "state=larval \n" in text
    assert "\tcreated:                     \tcurrent: " in text
    long = replace(SA, authentication="hmac-sha2-512", authentication_key=Key(bytes(64)))
    assert f"\tA: hmac-sha2-512  {' '.join(['00000000'] * 8)}\n {' '.join(['00000000'] * 8)}\n" in dump_sa(long, NOW)


def test_policy_dump_has_the_layout_that_scripts_know():
    rule = Transform(Protocol.ESP, Mode.TUNNEL, A, B, Level.UNIQUE, 7)
    policy = Policy(
        Direction.OUT, Selector(A, A, bytes([192, 168, 0, 0]), bytes([192, 168, 255, 255]), 6, 22, 22), Action.IPSEC,
        (rule, Transform(Protocol.AH, Mode.TRANSPORT, level=Level.REQUIRE)), priority=-0x40000003, id=9,
        created=NOW, lifetime=60,
    )  # fmt: skip
    assert dump_policy(policy, NOW, remaining=1, pid=42) == (
        "10.0.0.1[22] 192.168.0.0/16[any] tcp\n"
        "\tout prio high + 3 ipsec\n"
        "\tesp/tunnel/10.0.0.1-10.0.0.2/unique:7\n"
        "\tah/transport//require\n"
        "\tcreated: Nov 14 22:13:20 2023  lastused: Nov 14 22:13:20 2023\n"
        "\tlifetime: 60(s) validtime: 0(s)\n"
        "\tspid=9 seq=1 pid=42 scope=global \n"
        "\trefcnt=0\n"
    )


def addresses(size):
    return st.binary(min_size=size, max_size=size)


families = st.sampled_from([4, 16])
u32 = st.integers(0, 0xFFFFFFFF)
lifetimes = st.builds(Lifetime, u32, st.integers(0, (1 << 64) - 1), u32, u32)
ports = st.integers(1, 65535)


@st.composite
def associations(draw):
    size = draw(families)
    ends = draw(addresses(size)), draw(addresses(size))
    protocol = draw(st.sampled_from(Protocol))
    sa = SecurityAssociation(protocol, draw(u32), *ends, draw(st.sampled_from(Mode)), draw(u32))
    if protocol is Protocol.IPCOMP:
        sa.compression = "deflate"
        sa.flags = draw(st.sampled_from([0, c.SADB_X_EXT_RAWCPI]))
        return sa
    if protocol is Protocol.ESP:
        row = registry.ENCRYPTION[draw(st.sampled_from(sorted(registry.ENCRYPTION)))]
        length = draw(st.sampled_from(row.key_bits)) // 8
        sa.encryption, sa.encryption_key = row.name, Key(draw(st.binary(min_size=length, max_size=length)))
        sa.tfc_pad = draw(st.integers(0, 65535))
        sa.flags = draw(st.sampled_from([0, c.SADB_X_EXT_PRAND, c.SADB_X_EXT_PZERO]))
        sa.natt = draw(st.none() | st.builds(
            NatTraversal, ports, ports, st.none() | addresses(size), st.none() | addresses(size), st.booleans(),
        ))  # fmt: skip
    if protocol is Protocol.AH or draw(st.booleans()):
        auth = registry.AUTHENTICATION[draw(st.sampled_from(sorted(registry.AUTHENTICATION)))]
        length = draw(st.sampled_from(auth.key_bits)) // 8
        sa.authentication, sa.authentication_key = auth.name, Key(draw(st.binary(min_size=length, max_size=length)))
    sa.replay_window = 8 * draw(st.integers(0, 16384))
    sa.esn = draw(st.booleans())
    sa.hard, sa.soft = draw(lifetimes), draw(lifetimes)
    return sa


@given(associations())
def test_an_sa_loads_as_it_was_printed(sa):
    assert parse(config_sa(sa)) == [c.Add(sa, line=1, column=1)]


def spans(most):
    return st.tuples(st.integers(0, most), st.integers(0, most)).map(lambda pair: tuple(sorted(pair))) | st.just(
        (0, 65535)
    )


@st.composite
def policies(draw):
    size = draw(families)
    sides = []
    for _ in range(2):
        if draw(st.booleans()):
            sides += sorted((draw(addresses(size)), draw(addresses(size))))
        else:
            value = int.from_bytes(draw(addresses(size)), "big")
            host = (1 << draw(st.integers(0, size * 8))) - 1
            sides += [(value & ~host).to_bytes(size, "big"), (value | host).to_bytes(size, "big")]
    protocol = draw(st.integers(0, 255))
    most = 255 if protocol in (1, 58) else 65535
    selector = Selector(*sides, protocol, *draw(spans(most)), *draw(spans(most)))
    action = draw(st.sampled_from([Action.DISCARD, Action.NONE, Action.IPSEC]))
    rule = st.builds(
        lambda protocol, mode, level, reqid: Transform(
            protocol, mode, *((A, B) if mode is Mode.TUNNEL else (None, None)), level, reqid
        ),
        st.sampled_from(Protocol), st.sampled_from(Mode), st.sampled_from(Level), u32,
    )  # fmt: skip
    rules = tuple(draw(st.lists(rule, min_size=1, max_size=4))) if action is Action.IPSEC else ()
    return Policy(
        draw(st.sampled_from(Direction)), selector, action, rules, draw(st.integers(-0x7FFFFFFF, 0x7FFFFFFF)),
        lifetime=draw(u32), fail_open=draw(st.booleans()),
    )  # fmt: skip


@given(policies())
def test_a_policy_loads_as_it_was_printed(policy):
    assert parse(config_policy(policy)) == [c.SpdAdd(policy, line=1, column=1)]
    assert parse(config_policy(policy, "spdupdate")) == [c.SpdUpdate(policy, line=1, column=1)]
