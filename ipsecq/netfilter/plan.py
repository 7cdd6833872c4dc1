"""The SPD as groups of map entries and rules that keep its order, and the commands that turn one SPD into the next.

For each direction and family there is a list of groups; a packet meets them in order and the first hit decides.  A
group is a hash map of boxes of one shape (disjoint, so order does not matter inside) or a chain of rules in SPD order.
Placing a box means: after every group that holds an overlapping policy before it in the SPD, and before every
group with an overlapping policy after it.  So many disjoint policies are one map, however they are mixed in the SPD,
and the kernel's work for a packet grows with the number of shapes, not of policies.

Adding or removing a policy costs O(groups) look-ups and gives O(1) set commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ipsecq.netfilter.boxes import Box, Shape, boxes, pieces
from ipsecq.netfilter.socketmaps import SocketPlan
from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import Direction
from ipsecq.policy.model import Policy
from ipsecq.sysctl import Sysctl

_MAX_COMMENT: Final = 100
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ./:_-+,@=[]()#")


class Rebuild(Exception):  # noqa: N818 - a signal inside this module
    """No place between the groups: the direction's groups have to be planned anew."""


class Item(NamedTuple):
    """One box of one policy.  ``shape`` is None when the box must be a rule."""

    order: tuple[int, int]
    policy: Policy
    box: Box
    cover: Shape
    shape: Shape | None
    verdict: str


@dataclass(slots=True, eq=False)
class Group:
    """A map (``shape`` is set) or a chain of rules."""

    name: str
    shape: Shape | None
    items: dict[tuple[tuple[int, int], Box], Item] = field(default_factory=dict)
    indexes: dict[tuple[int, int], dict[tuple[int, int], dict[Box, Item]]] = field(default_factory=dict)
    """Prefix lengths (source, destination) → truncated addresses → items; made when first asked for."""
    added: dict[Box, Item] = field(default_factory=dict)
    removed: dict[Box, Item] = field(default_factory=dict)
    touched: bool = False
    fresh: bool = True

    def overlapping(self, item: Item, bits: int) -> Iterator[Item]:
        """The items of this group that share a packet with ``item``."""
        box = item.box
        if self.shape is None:
            for other in self.items.values():
                if other.box.overlaps(box):
                    yield other
            return
        src, dst = min(self.shape.src, item.cover.src), min(self.shape.dst, item.cover.dst)
        index = self.indexes.get((src, dst))
        if index is None:
            index = self.indexes[src, dst] = {}
            for other in self.items.values():
                key = other.box.src[0] >> bits - src, other.box.dst[0] >> bits - dst
                index.setdefault(key, {})[other.box] = other
        for other in index.get((box.src[0] >> bits - src, box.dst[0] >> bits - dst), {}).values():
            if other.box.overlaps(box):
                yield other

    def put(self, item: Item, bits: int) -> None:
        """Add an item and remember the command."""
        self.items[item.order, item.box] = item
        self.touched = True
        if self.shape is None:
            return
        for (src, dst), index in self.indexes.items():
            index.setdefault((item.box.src[0] >> bits - src, item.box.dst[0] >> bits - dst), {})[item.box] = item
        self.added[item.box] = item

    def take(self, item: Item, bits: int) -> None:
        """Remove an item and remember the command."""
        del self.items[item.order, item.box]
        self.touched = True
        if self.shape is None:
            return
        for (src, dst), index in self.indexes.items():
            key = item.box.src[0] >> bits - src, item.box.dst[0] >> bits - dst
            del index[key][item.box]
            if not index[key]:
                del index[key]
        if self.added.pop(item.box, None) is None:
            self.removed[item.box] = item


class Side:
    """The groups of one direction and family, and their part of a transaction."""

    def __init__(self, direction: Direction, family: int) -> None:
        self.family, self.bits = family, 32 if family == 4 else 128
        self.prefix = f"{'in' if direction == Direction.IN else 'out'}_ipv{family}"
        self.chain = f"policy_{self.prefix}"
        self.groups: list[Group] = []
        self.retired: list[Group] = []
        self.order_changed = False
        self._serial = 0

    def place(self, item: Item) -> Group:
        """Put an item where the SPD's order is kept; Rebuild when there is no such place."""
        low, high = -1, len(self.groups)
        for position, group in enumerate(self.groups):
            for other in group.overlapping(item, self.bits):
                if other.order <= item.order:
                    low = position
                else:
                    high = min(high, position)
        if low > high:
            raise Rebuild
        if item.shape is not None:
            for group in self.groups[low + 1 : high]:
                if group.shape == item.shape:
                    return self._put(group, item)
            if low < high:
                return self._put(self._insert(high, item.shape), item)
        for group in self.groups[max(low, 0) : high + 1]:
            if group.shape is None:
                return self._put(group, item)
        if low == high:
            raise Rebuild
        return self._put(self._insert(high, None), item)

    def take(self, group: Group, item: Item) -> None:
        """Remove an item; an empty group goes."""
        group.take(item, self.bits)
        if not group.items:
            self.groups.remove(group)
            self.order_changed = True
            if not group.fresh:
                self.retired.append(group)

    def clear(self) -> None:
        """Retire all groups."""
        self.retired.extend(group for group in self.groups if not group.fresh)
        self.groups.clear()
        self.order_changed = True

    def _put(self, group: Group, item: Item) -> Group:
        group.put(item, self.bits)
        return group

    def _insert(self, position: int, shape: Shape | None) -> Group:
        self._serial += 1
        group = Group(f"{self.prefix}_{'rules' if shape is None else 'map'}_{self._serial}", shape)
        self.groups.insert(position, group)
        self.order_changed = True
        return group

    def commands(self, table: str) -> Iterator[str]:
        """The nft commands for everything that changed since the last call, in an order that one transaction takes."""
        for group in self.groups:
            if group.fresh:
                yield self._definition(table, group)
            if group.touched:
                yield from self._contents(table, group)
            group.added, group.removed, group.touched, group.fresh = {}, {}, False, False
        if self.order_changed:
            yield f"flush chain inet {table} {self.chain}"
            for group in self.groups:
                yield f"add rule inet {table} {self.chain} {self._use(group)}"
        for group in self.retired:
            if group.shape is None:
                yield f"flush chain inet {table} {group.name}"
            yield f"delete {'chain' if group.shape is None else 'map'} inet {table} {group.name}"
        self.retired.clear()
        self.order_changed = False

    def _definition(self, table: str, group: Group) -> str:
        if group.shape is None:
            return f"add chain inet {table} {group.name}"
        types = " . ".join(kind for _, kind in group.shape.fields(self.family))
        return f"add map inet {table} {group.name} {{ type {types} : verdict; }}"

    def _use(self, group: Group) -> str:
        if group.shape is None:
            return f"jump {group.name}"
        return f"{' . '.join(name for name, _ in group.shape.fields(self.family))} vmap @{group.name}"

    def _contents(self, table: str, group: Group) -> Iterator[str]:
        shape = group.shape
        if shape is None:
            yield f"flush chain inet {table} {group.name}"
            for item in sorted(group.items.values(), key=lambda item: item.order):
                rule = f"{item.box.match(self.family)} {item.verdict} {comment_of(item.policy)}"
                yield f"add rule inet {table} {group.name} {rule}"
            return
        if group.removed:
            keys = ",\n".join(
                f"{box.key(shape, self.family)} : {item.verdict}" for box, item in group.removed.items()
            )
            yield f"delete element inet {table} {group.name} {{\n{keys}\n}}"
        if group.added:
            keys = ",\n".join(
                f"{box.key(shape, self.family)} {comment_of(item.policy)} : {item.verdict}"
                for box, item in group.added.items()
            )
            yield f"add element inet {table} {group.name} {{\n{keys}\n}}"


class Plan:
    """What the kernel holds of the SPD.  ``update`` gives the commands that make it hold another one.

    Policies are in SPD order by (priority, id); ids are unique.  When a transaction built from ``update`` fails,
    the plan no longer describes the kernel: drop it and start from a new one with a whole ruleset.
    """

    def __init__(
        self, table: str, workers: int, lanes: int = 1,
        verdict: Callable[[Policy, Sysctl, int, int], str] = verdict_of,
    ) -> None:  # fmt: skip
        """``verdict(policy, sysctl, workers, lanes)`` says what is done with a policy's packets."""
        self.table, self.workers, self.lanes = table, workers, lanes
        self._verdict = verdict
        self.sockets: SocketPlan | None = None
        """The sockets' part, once the ruleset is there."""
        self.sysctl = Sysctl()
        """The knobs of the last update."""
        self.sides = {
            (direction, family): Side(direction, family)
            for direction in (Direction.IN, Direction.OUT)
            for family in (4, 6)
        }
        self._entries: dict[int, tuple[Policy, str, list[tuple[Group, Item]]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def update(self, policies: Iterable[Policy], sysctl: Sysctl) -> list[str]:
        """Make the plan that of ``policies``; return the nft commands, empty when nothing changes.

        O(n) comparisons to find what changed, O(groups) for each change.  Raises ValueError when two policies have
        one id.
        """
        self.sysctl = Sysctl(sysctl.all())
        wanted: dict[int, tuple[Policy, str]] = {}
        for position, policy in enumerate(policies):
            number = policy.id or -1 - position
            if number in wanted:
                raise ValueError(f"two policies have id {number}: {wanted[number][0].label}, {policy.label}")
            wanted[number] = policy, self._verdict(policy, sysctl, self.workers, self.lanes)
        for number in [number for number, entry in self._entries.items() if wanted.get(number) != entry[:2]]:
            self._remove(number)
        fresh = sorted(wanted.keys() - self._entries.keys(), key=lambda number: _order(wanted[number][0], number))
        rebuild: set[Side] = set()
        for number in fresh:
            policy, verdict = wanted[number]
            side = self.sides[policy.direction, policy.selector.family]
            self._entries[number] = policy, verdict, []
            if side not in rebuild:
                try:
                    self._place(side, number)
                except Rebuild:
                    rebuild.add(side)
        for side in rebuild:
            self._rebuild(side)
        return [command for side in self.sides.values() for command in side.commands(self.table)]

    def where(self, policy: int) -> list[str]:
        """Names of the maps and chains that hold a policy, for ``explain``."""
        return sorted({group.name for group, _ in self._entries[policy][2]}) if policy in self._entries else []

    def _place(self, side: Side, number: int) -> None:
        policy, verdict, places = self._entries[number]
        for item in _items(policy, number, verdict, side.bits):
            places.append((side.place(item), item))

    def _remove(self, number: int) -> None:
        policy, _, places = self._entries.pop(number)
        side = self.sides[policy.direction, policy.selector.family]
        for group, item in places:
            side.take(group, item)

    def _rebuild(self, side: Side) -> None:
        side.clear()
        mine = [
            (_order(entry[0], number), number)
            for number, entry in self._entries.items()
            if self.sides[entry[0].direction, entry[0].selector.family] is side
        ]
        for _, number in sorted(mine):
            self._entries[number][2].clear()
            self._place(side, number)


def _items(policy: Policy, number: int, verdict: str, bits: int) -> Iterator[Item]:
    order = _order(policy, number)
    for box in boxes(policy.selector):
        cut = pieces(box, bits)
        if cut is None:
            yield Item(order, policy, box, box.shape(bits), None, verdict)
            continue
        for piece in cut:
            shape = piece.shape(bits)
            yield Item(order, policy, piece, shape, shape, verdict)


def _order(policy: Policy, number: int) -> tuple[int, int]:
    """SPD order.  Policies without an id (negative numbers: their position) come after those with one."""
    return policy.priority, number if number > 0 else (1 << 62) - number


def comment_of(policy: Policy) -> str:
    """``comment "…"`` naming the policy, of characters that cannot end the string and few enough for the kernel."""
    text = f"policy {policy.id}" + (f" {policy.label}" if policy.label else "")
    return 'comment "' + "".join(letter if letter in _PLAIN else "_" for letter in text)[:_MAX_COMMENT] + '"'
