"""The SPD against a naive list: sorted by priority and age, walked from the front."""

import errno
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.errors import SpdError
from ipsecq.numbers import IPPROTO_ANY, Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.rules import matches
from ipsecq.policy.spd import AUTOMATIC_REQID, Spd


def net(text: str) -> tuple[bytes, bytes]:
    address, _, length = text.partition("/")
    value = int.from_bytes(bytes(map(int, address.split("."))), "big")
    host = (1 << 32 - int(length or 32)) - 1
    return (value & ~host).to_bytes(4, "big"), (value | host).to_bytes(4, "big")


def selector(src="0.0.0.0/0", dst="0.0.0.0/0", protocol=IPPROTO_ANY, sport=(0, 65535), dport=(0, 65535)) -> Selector:
    return Selector(*net(src), *net(dst), protocol, *sport, *dport)


def policy(direction=Direction.OUT, priority=0, action=Action.NONE, **which) -> Policy:
    return Policy(direction, selector(**which), action, priority=priority)


# A small world, so that packets and policies meet often.
low_bits = st.integers(0, 15)
addresses4 = low_bits.map(lambda n: b"\x0a\x00\x00" + bytes([n]))
addresses6 = low_bits.map(lambda n: b"\x20\x01" + bytes(13) + bytes([n]))


@st.composite
def ranges(draw, address):
    first = draw(address)
    kind = draw(st.sampled_from(["prefix", "host", "range"]))
    if kind == "host":
        return first, first
    if kind == "range":
        second = draw(address)
        return min(first, second), max(first, second)
    bits = len(first) * 8
    host = (1 << draw(st.sampled_from([1, 2, 3, 4, 8, bits]))) - 1
    value = int.from_bytes(first, "big")
    return (value & ~host).to_bytes(len(first), "big"), (value | host).to_bytes(len(first), "big")


def spans(most):
    small = st.integers(0, 5)
    return st.one_of(
        st.just((0, most)), small.map(lambda n: (n, n)), st.tuples(small, small).map(lambda pair: tuple(sorted(pair)))
    )


@st.composite
def policies(draw):
    address = draw(st.sampled_from([addresses4, addresses6]))
    which = Selector(
        *draw(ranges(address)), *draw(ranges(address)), draw(st.sampled_from([IPPROTO_ANY, 1, 6, 17, 47])),
        *draw(spans(65535)), *draw(spans(65535)),
    )  # fmt: skip
    return Policy(draw(st.sampled_from(Direction)), which, draw(st.sampled_from([Action.NONE, Action.DISCARD])),
                  priority=draw(st.integers(-2, 2)))  # fmt: skip


packets = st.sampled_from([addresses4, addresses6]).flatmap(
    lambda address: st.tuples(
        st.sampled_from(Direction), address, address, st.sampled_from([1, 6, 17, 47]), st.integers(0, 6),
        st.integers(0, 6), st.booleans(),
    )
)
steps = st.lists(st.tuples(st.sampled_from(["add", "add", "add", "update", "delete", "delete_id"]), policies()),
                 max_size=40)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(steps, st.lists(packets, max_size=20))
def test_lookup_agrees_with_a_naive_list_after_any_changes(changes, lookups):
    spd = Spd()
    naive: list[tuple[int, int, Policy]] = []  # (priority, order, policy as stored)

    def find(wanted):
        return next((row for row in naive if (row[2].direction, row[2].selector) == wanted), None)

    for order, (what, new) in enumerate(changes):
        row = find((new.direction, new.selector))
        if what == "add" and row is not None:
            with pytest.raises(SpdError):
                spd.add(new)
        elif what == "add":
            naive.append((new.priority, order, spd.add(new)))
        elif what == "update":
            stored = spd.update(new)
            if row is not None:
                naive.remove(row)
            keeps_place = row is not None and row[0] == new.priority
            naive.append((new.priority, row[1] if keeps_place else order, stored))
        elif row is not None:
            naive.remove(row)
            if what == "delete":
                assert spd.delete(new.direction, new.selector) == row[2]
            else:
                assert spd.delete_id(row[2].id) == row[2]
        naive.sort(key=lambda row: row[:2])
        for direction, src, dst, protocol, sport, dport, fragment in lookups:
            packet = (src, dst, protocol, sport, dport, fragment)
            expected = next((entry for *_, entry in naive if entry.direction == direction
                             and matches(entry.selector, *packet)), None)  # fmt: skip
            assert spd.lookup(direction, *packet) == expected
    dumped = spd.dump()
    assert dumped == sorted((row[2] for row in naive), key=lambda entry: entry.direction)
    assert spd.copy().dump() == dumped
    for direction, *packet in lookups:
        assert spd.copy().lookup(direction, *packet) == spd.lookup(direction, *packet)


def at(text: str) -> bytes:
    return net(text)[0]


def test_the_lower_priority_wins_and_among_equals_the_first():
    spd = Spd()
    wide = spd.add(policy(priority=5))
    narrow = spd.add(policy(priority=5, src="10.0.0.0/24", dst="10.1.0.0/16"))
    assert spd.lookup(2, at("10.0.0.1"), at("10.1.0.1"), 6, 1, 2) == wide
    urgent = spd.add(policy(priority=-5, src="10.0.0.1", dst="10.1.0.1"))
    assert spd.lookup(2, at("10.0.0.1"), at("10.1.0.1"), 6, 1, 2) == urgent
    spd.delete(Direction.OUT, wide.selector)
    assert spd.lookup(2, at("10.0.0.2"), at("10.1.0.1"), 6, 1, 2) == narrow
    assert spd.lookup(1, at("10.0.0.2"), at("10.1.0.1"), 6, 1, 2) is None


def test_a_fragment_matches_only_selectors_without_ports():
    spd = Spd()
    ported = spd.add(policy(protocol=6, dport=(443, 443)))
    rest = spd.add(policy(protocol=6))
    arguments = (2, at("10.0.0.1"), at("10.0.0.2"), 6, 1, 443)
    assert spd.lookup(*arguments) == ported
    assert spd.lookup(*arguments, True) == rest


def test_icmp_type_and_code_are_ranges():
    spd = Spd()
    echo = spd.add(policy(protocol=1, sport=(8, 8)))
    unreachable = spd.add(policy(protocol=1, sport=(3, 3), dport=(2, 4)))
    ends = (at("10.0.0.1"), at("10.0.0.2"))
    assert spd.lookup(2, *ends, 1, 8, 0) == echo
    assert spd.lookup(2, *ends, 1, 3, 4) == unreachable
    assert spd.lookup(2, *ends, 1, 3, 1) is None
    assert spd.lookup(2, *ends, 6, 8, 0) is None


def test_ports_without_a_protocol_do_not_mean_icmp_types():
    spd = Spd()
    spd.add(policy(sport=(8, 8)))
    ends = (at("10.0.0.1"), at("10.0.0.2"))
    assert spd.lookup(2, *ends, 17, 8, 0) is not None
    assert spd.lookup(2, *ends, 1, 8, 0) is None


def test_families_do_not_mix():
    spd = Spd([policy()])
    assert spd.lookup(2, bytes(16), bytes(16), 6, 1, 2) is None


def test_unique_without_a_number_gets_one_of_its_own():
    rule = Transform(Protocol.ESP, Mode.TRANSPORT, level=Level.UNIQUE)
    named = replace(rule, reqid=7)
    spd = Spd()
    first = spd.add(Policy(Direction.OUT, selector("10.0.0.0/8"), Action.IPSEC, (rule, named)))
    second = spd.add(Policy(Direction.OUT, selector("11.0.0.0/8"), Action.IPSEC, (rule,)))
    assert [rule.reqid for rule in first.transforms] == [AUTOMATIC_REQID, 7]
    assert second.transforms[0].reqid == AUTOMATIC_REQID + 1


def test_errors_carry_the_errno_of_pf_key():
    spd = Spd([policy()])
    for number, call in (
        (errno.EEXIST, lambda: spd.add(policy(action=Action.DISCARD))),
        (errno.ENOENT, lambda: spd.delete(Direction.IN, selector())),
        (errno.ENOENT, lambda: spd.delete_id(99)),
        (errno.ENOENT, lambda: spd.get(99)),
        (errno.EINVAL, lambda: spd.add(policy(action=Action.IPSEC))),
        (errno.EINVAL, lambda: spd.add(policy(action=Action.BYPASS))),
        (errno.EINVAL, lambda: spd.add(policy(sport=(9, 8)))),
        (errno.EINVAL, lambda: spd.add(replace(policy(), selector=replace(selector(), dst_first=bytes(16))))),
        (errno.EINVAL, lambda: spd.add(Policy(Direction.OUT, selector("9.0.0.0/8"), Action.IPSEC,
                                              (Transform(Protocol.ESP, Mode.TUNNEL),)))),
    ):  # fmt: skip
        with pytest.raises(SpdError) as caught:
            call()
        assert caught.value.errno == number
    assert len(spd) == 1


def test_the_low_bits_of_an_id_say_the_direction_as_linux_has_it():
    """setkey and racoon of ipsec-tools take others for policies of sockets, and pass over them."""
    spd = Spd(policy(direction, src=f"10.0.0.{number}") for number in range(4) for direction in Direction)
    assert {each.direction: each.id % 8 for each in spd} == {Direction.IN: 0, Direction.OUT: 1}
    assert len({each.id for each in spd}) == 8
    spd.add(replace(policy(src="10.1.0.0/16"), id=4001))
    assert spd.add(policy(Direction.IN, src="10.2.0.0/16")).id == 4008


def test_replace_all_is_all_or_nothing_and_keeps_ids():
    spd = Spd()
    kept = spd.add(policy(src="10.0.0.0/8"))
    spd.add(policy(src="11.0.0.0/8"))
    before, generation = spd.dump(), spd.generation
    with pytest.raises(SpdError):
        spd.replace_all([policy(src="12.0.0.0/8"), policy(src="12.0.0.0/8")])
    assert (spd.dump(), spd.generation) == (before, generation)
    spd.replace_all([policy(src="12.0.0.0/8"), policy(src="10.0.0.0/8", action=Action.DISCARD)])
    assert spd.generation > generation
    assert [entry.id for entry in spd.dump() if entry.selector == kept.selector] == [kept.id]
    assert len({entry.id for entry in spd.dump()}) == 2
    assert spd.lookup(2, at("11.0.0.1"), at("9.9.9.9"), 6) is None
    assert spd.lookup(2, at("10.0.0.1"), at("9.9.9.9"), 6).action is Action.DISCARD


def test_replace_all_never_gives_one_id_twice():
    spd = Spd()
    first = spd.add(policy(src="10.0.0.0/8"))
    spd.replace_all([policy(src="12.0.0.0/8"), policy(src="10.0.0.0/8")])
    ids = {entry.selector: entry.id for entry in spd.dump()}
    assert ids[first.selector] == first.id
    assert ids[selector("12.0.0.0/8")] > first.id


def test_policies_go_when_their_lifetime_is_over():
    spd = Spd([replace(policy(), created=100.0, lifetime=60), policy(src="10.0.0.0/8")])
    assert spd.expired(159.9) == []
    generation = spd.generation
    assert [entry.lifetime for entry in spd.expired(160.0)] == [60]
    assert spd.generation > generation
    assert len(spd) == 1
    assert len(spd.flush()) == 1
    assert spd.lookup(2, at("10.0.0.1"), at("9.9.9.9"), 6) is None


def test_lookup_work_does_not_grow_with_the_number_of_policies():
    """Counts the interpreter's line events of one look-up, which no other load on the machine can change."""

    def cost(count: int) -> int:
        spd = Spd()
        for n in range(count):
            spd.add(Policy(Direction.OUT, Selector(*[(n << 8).to_bytes(4, "big"), (n << 8 | 255).to_bytes(4, "big")],
                                                   *net("10.0.0.0/8")), Action.NONE))  # fmt: skip
        events = 0

        def trace(frame, event, argument):
            nonlocal events
            events += 1
            return trace

        hit = ((count - 1) << 8 | 3).to_bytes(4, "big")
        old = sys.gettrace()
        sys.settrace(trace)
        try:
            assert spd.lookup(2, hit, at("10.1.2.3"), 6, 1, 2) is not None
            assert spd.lookup(2, b"\xff" * 4, at("10.1.2.3"), 6, 1, 2) is None
        finally:
            sys.settrace(old)
        return events

    assert cost(3000) == cost(3)
