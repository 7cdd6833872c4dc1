"""The SPD as groups of map entries and rules that keep its order, and the commands that turn one SPD into the next.

For each direction and family there is a list of groups; a packet meets them in order and the first hit decides.  A
group is a hash map of boxes of one shape (disjoint, so order does not matter inside) or a chain of rules in SPD order.
Placing a box means: after every group that holds an overlapping policy before it in the SPD, and before every
group with an overlapping policy after it; where no such place is, what comes after it moves behind it.  So many disjoint
policies are one map, however they are mixed in the SPD, and the kernel's work for a packet grows with the number of
shapes (and of the first few priorities), not of policies.

Adding or removing a policy costs O(groups) look-ups and gives O(1) set commands, but for what has to move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final, NamedTuple

from ipsecq.netfilter import ranks
from ipsecq.netfilter.boxes import Box, Shape, boxes, pieces
from ipsecq.netfilter.socketmaps import SocketPlan
from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import Direction
from ipsecq.policy.model import Policy
from ipsecq.sysctl import Sysctl

_MAX_COMMENT: Final = 100
_MAPS: Final = 4
"""Maps of one shape that are made for a priority each, so that a policy between two priorities finds its place."""
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 ./:_-+,@=[]()#")


class Item(NamedTuple):
    """One box of one policy.  ``shape`` is None when the box must be a rule."""

    order: int
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
    priority: int
    """Of the policy that it was made for; from then on others may be in it, too."""
    items: dict[tuple[int, Box], Item] = field(default_factory=dict)
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
        self.homes: dict[tuple[int, Box], Group] = {}
        """Where each item is."""
        self.retired: list[Group] = []
        self.order_changed = False
        self._serial = 0

    def place(self, item: Item) -> None:
        """Put an item where the SPD's order is kept; what comes after it there and stands before it moves behind it."""
        waiting = [(item.order, 0, item)]
        count = 0
        while waiting:  # in SPD order, so nothing moves twice
            item = heappop(waiting)[2]
            low, high, late = self._bounds(item)
            if late:
                for other in late:
                    self.take(other)
                    count += 1
                    heappush(waiting, (other.order, count, other))
                low, high, _ = self._bounds(item)
            self._put(self._group(item, low, high), item)

    def take(self, item: Item) -> None:
        """Remove an item; an empty group goes."""
        group = self.homes.pop((item.order, item.box))
        group.take(item, self.bits)
        if not group.items:
            self.groups.remove(group)
            self.order_changed = True
            if not group.fresh:
                self.retired.append(group)

    def _bounds(self, item: Item) -> tuple[int, int, list[Item]]:
        """Last position with an overlapping item before this one, first with one after it, and those that stand too early.

        Too early is before the last position, or in it when it is a map: a chain of rules has its own order.
        """
        low, high = -1, len(self.groups)
        later: list[tuple[int, Item]] = []
        for position, group in enumerate(self.groups):
            for other in group.overlapping(item, self.bits):
                if other.order <= item.order:
                    low = position
                else:
                    high = min(high, position)
                    later.append((position, other))
        if high > low:
            return low, high, []
        edge = low if self.groups[low].shape is None else low + 1
        return low, high, [other for position, other in later if position < edge]

    def _group(self, item: Item, low: int, high: int) -> Group:
        """The group between (for a rule: or at) two positions that takes an item, made if there is none."""
        between = self.groups[low + 1 : high]
        if item.shape is not None and low < high:
            alike = [group for group in between if group.shape == item.shape]
            before = [group for group in alike if group.priority <= item.policy.priority]
            if before and before[-1].priority == item.policy.priority:
                return before[-1]
            if alike and sum(group.shape == item.shape for group in self.groups) >= _MAPS:
                return before[-1] if before else alike[0]
            return self._insert(item, low, high, item.shape)
        for group in self.groups[max(low, 0) : high + 1]:
            if group.shape is None:
                return group
        return self._insert(item, low, high, None)

    def _put(self, group: Group, item: Item) -> None:
        group.put(item, self.bits)
        self.homes[item.order, item.box] = group

    def _insert(self, item: Item, low: int, high: int, shape: Shape | None) -> Group:
        """A new group behind ``low`` and before ``high``, and within these bounds by priority."""
        priority = item.policy.priority
        behind = (at for at in range(low + 1, high) if self.groups[at].priority > priority)
        self._serial += 1
        group = Group(f"{self.prefix}_{'rules' if shape is None else 'map'}_{self._serial}", shape, priority)
        self.groups.insert(next(behind, high), group)
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


@dataclass(slots=True)
class Entry:
    """A policy as the kernel has it; ``order`` grows with its place in the SPD."""

    policy: Policy
    verdict: str
    order: int
    items: list[Item] = field(default_factory=list)


class Plan:
    """What the kernel holds of the SPD.  ``update`` gives the commands that make it hold another one.

    When a transaction built from ``update`` fails, the plan no longer describes the kernel: drop it and start from a
    new one with a whole ruleset.
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
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def update(self, policies: Iterable[Policy], sysctl: Sysctl) -> list[str]:
        """Make the plan that of ``policies``, in their order (:meth:`ipsecq.policy.spd.Spd.dump`); return the nft commands.

        No commands when nothing changes.  O(n) to find what changed (an identity test for most), O(groups) for each
        change.  Raises ValueError when two policies have one id.
        """
        settled = self.sysctl.all() == sysctl.all()  # then a verdict is what it was
        self.sysctl = Sysctl(sysctl.all())
        wanted: dict[int, Policy] = {}
        fresh: dict[int, str] = {}
        for position, policy in enumerate(policies):
            number = policy.id or -1 - position
            if number in wanted:
                raise ValueError(f"two policies have id {number}: {wanted[number].label}, {policy.label}")
            wanted[number] = policy
            entry = self._entries.get(number)
            if entry is not None and entry.policy is policy and settled:
                continue
            verdict = self._verdict(policy, sysctl, self.workers, self.lanes)
            if entry is None or entry.policy != policy or entry.verdict != verdict:
                fresh[number] = verdict
            else:
                entry.policy = policy
        for number in [number for number in self._entries if number not in wanted or number in fresh]:
            self._remove(number)
        kept = {number: self._entries[number].order for number in wanted if number not in fresh}
        for number in ranks.out_of_order(kept):
            fresh[number] = self._remove(number).verdict
            del kept[number]
        try:
            places = ranks.numbers(wanted, kept) if fresh else {}
        except ranks.NoRoom:
            fresh |= {number: self._remove(number).verdict for number in kept}
            places = ranks.numbers(wanted, {})
        for number, order in places.items():
            self._add(Entry(wanted[number], fresh[number], order), number)
        return [command for side in self.sides.values() for command in side.commands(self.table)]

    def where(self, policy: int) -> list[str]:
        """Names of the maps and chains that hold a policy, for ``explain``."""
        entry = self._entries.get(policy)
        if entry is None:
            return []
        homes = self._side(entry.policy).homes
        return sorted({homes[item.order, item.box].name for item in entry.items})

    def _side(self, policy: Policy) -> Side:
        return self.sides[policy.direction, policy.selector.family]

    def _add(self, entry: Entry, number: int) -> None:
        self._entries[number] = entry
        side = self._side(entry.policy)
        entry.items.extend(_items(entry, side.bits))
        for item in entry.items:
            side.place(item)

    def _remove(self, number: int) -> Entry:
        entry = self._entries.pop(number)
        side = self._side(entry.policy)
        for item in entry.items:
            side.take(item)
        return entry


def _items(entry: Entry, bits: int) -> Iterator[Item]:
    policy, verdict, order = entry.policy, entry.verdict, entry.order
    for box in boxes(policy.selector):
        cut = pieces(box, bits)
        if cut is None:
            yield Item(order, policy, box, box.shape(bits), None, verdict)
            continue
        for piece in cut:
            shape = piece.shape(bits)
            yield Item(order, policy, piece, shape, shape, verdict)


def comment_of(policy: Policy) -> str:
    """``comment "…"`` naming the policy, of characters that cannot end the string and few enough for the kernel."""
    text = f"policy {policy.id}" + (f" {policy.label}" if policy.label else "")
    return 'comment "' + "".join(letter if letter in _PLAIN else "_" for letter in text)[:_MAX_COMMENT] + '"'
