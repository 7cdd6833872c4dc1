"""The plan keeps the SPD's order: whatever is added and removed, the first hit in it is the SPD's first match."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.netfilter.boxes import Box
from ipsecq.netfilter.plan import Group, Plan, comment_of
from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.spd import Spd
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
    for policy in policies:
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
        # Ids say nothing about the order: a reload gives what was there before the id that it had.
        policies = sorted((make(number + 1, number) for number in numbers), key=lambda policy: policy.priority)
        plan.update(policies, Sysctl())
        for packet in packets(rng, 60):
            assert of_plan(plan, packet) == of_spd(policies, packet)
        assert all(group.items for side in plan.sides.values() for group in side.groups)


def packets(rng: random.Random, count: int) -> Iterator[Packet]:
    for _ in range(count):
        protocol = rng.choice([1, 6, 17, 47])
        sport, dport = (0, 0) if protocol == 47 else (rng.choice([0, 8]), rng.choice([0, 2, 4, 6, 9]))
        yield 0x0A000000 | rng.getrandbits(5), 0x0A000000 | rng.getrandbits(5), protocol, sport, dport


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "update", "update", "delete", "reload", "swap"]), st.integers(0, 60), st.integers(0, 3)
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(CHANGES, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_kernel_and_spd_agree_whatever_was_done_to_the_spd(
    rounds: list[list[tuple[str, int, int]]], rng: random.Random
) -> None:
    """Also where an id is older than its policy's place: spdupdate with another priority, a file in a new order."""
    spd, plan, kernel = Spd(), Plan("t", 4), Kernel()
    for changes in rounds:
        for what, number, priority in changes:
            policy = replace(make(0, number), priority=priority)
            there = spd.find(policy.direction, policy.selector)
            if what == "update" or (what == "add" and there is None):
                spd.update(policy)
            elif what == "delete" and there is not None:
                spd.delete_id(there.id)
            elif what == "reload":
                spd.replace_all(rng.sample([replace(each, id=0) for each in spd.dump()], len(spd)))
            elif what == "swap" and len(spd) > 1:
                listed = [replace(each, id=0) for each in spd.dump()]
                at = number % (len(listed) - 1)
                listed[at : at + 2] = listed[at + 1], listed[at]
                spd.replace_all(listed)
        kernel.take(plan.update(spd.dump(), Sysctl()))
        assert kernel.groups == {
            group.name: len(group.items) for side in plan.sides.values() for group in side.groups if group.shape
        }
        for packet in packets(rng, 60):
            s, d, protocol, sport, dport = packet
            found = spd.lookup(Direction.OUT, s.to_bytes(4, "big"), d.to_bytes(4, "big"), protocol, sport, dport)
            assert of_plan(plan, packet) == (verdict_of(found, Sysctl(), 4) if found else None)


class Kernel:
    """Counts the elements of maps as nf_tables would: what is deleted must be there, what is added must not."""

    def __init__(self) -> None:
        self.elements: dict[str, set[str]] = {}

    def take(self, commands: list[str]) -> None:
        for command in commands:
            verb, kind, _, _, name, *_ = command.split()
            if kind == "map":
                if verb == "add":
                    assert self.elements.setdefault(name, set()) == set()
                else:
                    del self.elements[name]
            elif kind == "element":
                keys = {line.split(" : ")[0].split(" comment ")[0] for line in command.splitlines()[1:-1]}
                if verb == "add":
                    assert not keys & self.elements[name]
                    self.elements[name] |= keys
                else:
                    assert keys <= self.elements[name]
                    self.elements[name] -= keys

    @property
    def groups(self) -> dict[str, int]:
        return {name: len(keys) for name, keys in self.elements.items()}


def test_updating_a_priority_there_and_back_leaves_the_kernel_with_the_spds_order() -> None:
    protect = replace(disjoint(1)[0], id=0)
    spare = replace(protect, selector=replace(protect.selector, src_last=protect.selector.src_first), action=Action.NONE,
                    transforms=())  # fmt: skip
    spd = Spd([spare, protect])
    plan = Plan("t", 4)
    plan.update(spd.dump(), Sysctl())
    packet = (*(int.from_bytes(each, "big") for each in (spare.selector.src_first, spare.selector.dst_first)), 6, 1, 1)
    assert of_plan(plan, packet) == "accept"
    for priority in (7, 0):
        spd.update(replace(spare, priority=priority))
        plan.update(spd.dump(), Sysctl())
        assert of_plan(plan, packet) != "accept"


@pytest.mark.parametrize(("priority", "moved"), [(0, 0), (1, 0), (3, 600), (4, 300), (5, 0)])
def test_a_policy_between_priorities_moves_no_more_than_it_must(priority: int, moved: int) -> None:
    """The first few priorities have maps of their own; in a map that several share, what comes after it moves."""
    many = sorted(
        (replace(policy, priority=i % 6) for i, policy in enumerate(disjoint(1800))), key=lambda policy: policy.priority
    )
    plan = Plan("t", 4)
    plan.update(many, Sysctl())
    assert [len(group.items) for group in plan.sides[Direction.OUT, 4].groups] == [300, 300, 300, 900]
    broad = Policy(Direction.OUT, Selector(*net(0, 0), *net(0xAC000000, 8)), Action.DISCARD, (), priority, 9000)
    at = 300 * (priority + 1)
    commands = plan.update([*many[:at], broad, *many[at:]], Sysctl())
    added = [command for command in commands if command.startswith("add element")]
    assert sum(command.count(" : goto out_worker_") for command in added) == moved
    assert sum(command.count(" : goto out_discard") for command in added) == 1


def test_an_order_number_without_room_for_another_gives_new_ones_to_all() -> None:
    plan, policies = Plan("t", 4), disjoint(2)
    for number in range(200):  # each time between the first two
        selector = Selector(*net(number << 8, 24), *net(0, 0))
        policies.insert(1, replace(policies[0], selector=selector, id=1000 + number))
        plan.update(policies, Sysctl())
    groups = plan.sides[Direction.OUT, 4].groups
    places = {item.policy.id: item.order for group in groups for item in group.items.values()}
    assert sorted(places, key=places.__getitem__) == [policy.id for policy in policies]


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
