"""The plan keeps the SPD's order: whatever is added and removed, the first hit in it is the SPD's first match."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.netfilter.boxes import Box
from ipsecq.netfilter.plan import Group, Plan, comment_of
from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sysctl import Sysctl

Packet = tuple[int, int, int, int, int]


def net(base: int, length: int) -> tuple[bytes, bytes]:
    size = 1 << 32 - length
    first = base & ~(size - 1)
    return first.to_bytes(4, "big"), (first + size - 1).to_bytes(4, "big")


def make(number: int, seed: int) -> Policy:
    rng = random.Random(seed)
    src = net(0x0A000000 | rng.getrandbits(5), rng.choice([27, 28, 30, 32]))
    dst = net(0x0A000000 | rng.getrandbits(5), rng.choice([0, 27, 29, 32]))
    protocol, ports = 255, (0, 65535, 0, 65535)
    if rng.random() < 0.4:
        protocol = rng.choice([6, 17])
        if rng.random() < 0.6:
            first = rng.choice([0, 1, 3, 4])
            ports = (0, 65535, first, rng.choice([4, 5, 7]))
    if rng.random() < 0.1:
        protocol, ports = 1, (rng.choice([0, 8]), 8, 0, 255)
    action = rng.choice([Action.DISCARD, Action.NONE, Action.IPSEC])
    return Policy(
        Direction.OUT, Selector(*src, *dst, protocol, *ports), action,
        tunnel(number % 7) if action == Action.IPSEC else (), rng.choice([0, 0, 0, 5]), number, label=f"test:{number}",
    )  # fmt: skip


def tunnel(peer: int) -> tuple[Transform, ...]:
    return (Transform(Protocol.ESP, Mode.TUNNEL, b"\xc0\0\2\1", bytes([192, 0, 2, 10 + peer]), Level.REQUIRE),)


def inside(box: Box, packet: Packet) -> bool:
    src, dst, protocol, sport, dport = packet
    return (
        box.src[0] <= src <= box.src[1] and box.dst[0] <= dst <= box.dst[1] and box.protocol in (-1, protocol)
        and box.sport[0] <= sport <= box.sport[1] and box.dport[0] <= dport <= box.dport[1]
    )  # fmt: skip


def of_plan(plan: Plan, packet: Packet) -> str | None:
    for group in plan.sides[Direction.OUT, 4].groups:
        hits = [item for item in group.items.values() if inside(item.box, packet)]
        if hits:
            assert group.shape is None or len(hits) == 1, "a map can give one answer only"
            return min(hits, key=lambda item: item.order).verdict
    return None


def of_spd(policies: list[Policy], packet: Packet) -> str | None:
    for policy in sorted(policies, key=lambda policy: (policy.priority, policy.id)):
        s = policy.selector
        box = Box(
            (int.from_bytes(s.src_first), int.from_bytes(s.src_last)),
            (int.from_bytes(s.dst_first), int.from_bytes(s.dst_last)),
            -1 if s.protocol == 255 else s.protocol, (s.sport_first, s.sport_last), (s.dport_first, s.dport_last),
        )  # fmt: skip
        if inside(box, packet):
            return verdict_of(policy, Sysctl(), 4)
    return None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 400), max_size=25, unique=True), min_size=1, max_size=4), st.randoms())
def test_first_hit_is_the_spds_first_match_after_any_updates(rounds: list[list[int]], rng: random.Random) -> None:
    plan = Plan("t", 4)
    for numbers in rounds:
        policies = [make(number + 1, number) for number in numbers]
        plan.update(policies, Sysctl())
        for _ in range(60):
            packet = (
                0x0A000000 | rng.getrandbits(5), 0x0A000000 | rng.getrandbits(5), rng.choice([1, 6, 17, 47]),
                rng.choice([0, 8]), rng.choice([0, 2, 4, 6, 9]),
            )  # fmt: skip
            if packet[2] == 47:
                packet = (*packet[:3], 0, 0)
            assert of_plan(plan, packet) == of_spd(policies, packet)
        assert all(group.items for side in plan.sides.values() for group in side.groups)


def disjoint(count: int) -> list[Policy]:
    return [
        Policy(
            Direction.OUT, Selector(*net(0x0A000000 + (i << 8), 24), *net(0xAC100000 + i, 32)), Action.IPSEC,
            tunnel(i % 7), id=i + 1,
        )
        for i in range(count)
    ]  # fmt: skip


def test_disjoint_policies_of_one_shape_are_one_map_and_one_rule() -> None:
    plan = Plan("t", 4)
    plan.update(disjoint(3000), Sysctl())
    groups: list[Group] = plan.sides[Direction.OUT, 4].groups
    assert [len(group.items) for group in groups] == [3000]


def test_one_change_among_many_touches_one_element() -> None:
    plan, policies = Plan("t", 4), disjoint(3000)
    plan.update(policies, Sysctl())
    commands = plan.update(policies[:70] + policies[71:], Sysctl())
    assert len(commands) == 1
    assert commands[0].startswith("delete element inet t out_ipv4_map_1 {\n10.0.70.0 . 172.16.0.70 : goto out_worker_")
    assert plan.update(policies[:70] + policies[71:], Sysctl()) == []


def test_two_policies_with_one_id_are_refused() -> None:
    with pytest.raises(ValueError, match="two policies have id 1"):
        Plan("t", 1).update([*disjoint(2), *disjoint(1)], Sysctl())


def test_a_label_cannot_end_the_comment_and_begin_a_rule() -> None:
    selector = Selector(*net(0, 0), *net(0, 0))
    text = comment_of(Policy(Direction.OUT, selector, Action.NONE, label='x" ; flush ruleset\n'))
    assert text.count('"') == 2
    assert not set(text) & set(";\n{}\\")
