"""The SPD: policies in order of priority, and a look-up whose time doesn't grow with their number.

A packet gets the policy with the lowest ``priority`` that matches; among equals the one that was added first.
"""

from __future__ import annotations

import errno
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from ipsecq.errors import SpdError
from ipsecq.numbers import IPPROTO_ANY, Direction, Level
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.rules import check, matches
from ipsecq.policy.sockets import SocketPolicy

AUTOMATIC_REQID: Final = 0x4000
"""First reqid that ``unique`` without a number gets; the ones below are the administrator's (KAME)."""
DIRECTION_BITS: Final = 3
"""Low bits of a policy's id that say its direction, as Linux has it: 0 in, 1 out (2 forward, 3 and more: sockets).

setkey(8) and racoon of ipsec-tools look at them.
"""

# (right shift of src, right shift of dst, protocol named?, one source port?, one destination port?)
_Shape = tuple[int, int, bool, bool, bool]
# rank (priority << 64 | order of insertion), policy, "the bucket's key says it all: no comparison needed"
_Entry = tuple[int, Policy, bool]


class _Group:
    """All policies of one shape: a hash table from the masked packet to the few policies that may match."""

    __slots__ = ("buckets", "count", "floor", "named", "shape", "stale")

    def __init__(self, shape: _Shape) -> None:
        self.shape = shape
        self.named = shape[2] or shape[3] or shape[4]
        self.buckets: dict[tuple[int, ...], _Entry | list[_Entry]] = {}
        """The best one first.  One alone, as most are, stands for itself: 100,000 lists take 10 MB."""
        self.count = 0
        self.floor = 1 << 128
        """No policy of the group ranks before this; it may lag behind (lower) after deletions."""
        self.stale = 0
        """Deletions since the floor was true."""


class _Table:
    """The policies of one direction and family.

    Tuple space search (Srinivasan, Suri and Varghese, 1999).  Policies are grouped by shape: source prefix length,
    destination prefix length, and which of protocol and ports are single values.  Within a group one hash access
    finds the candidates.  Groups are visited in the order of their best rank, and the search ends where no later group
    can hold a better policy.  A look-up costs O(S) for S distinct shapes (1 to 3 in the common configurations, whatever
    the number of policies) plus the candidates that share a bucket: policies that differ only in a port range, or in an
    address range within the same enclosing prefix.  Ranges that are no prefixes are the uncommon shape: their enclosing
    prefixes are rounded to lengths that are multiples of 4, so that they add at most 81 shapes for IPv4 (14 for 100,000
    unaligned ranges of neighbouring addresses).  Adding and deleting cost O(S + bucket).
    """

    __slots__ = ("bits", "by_shape", "groups")

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.by_shape: dict[_Shape, _Group] = {}
        self.groups: list[_Group] = []

    def lookup(
        self, src: bytes, dst: bytes, protocol: int, sport: int, dport: int, fragment: bool
    ) -> Policy | None:
        s = int.from_bytes(src, "big")
        d = int.from_bytes(dst, "big")
        best: Policy | None = None
        best_rank = 1 << 128
        for group in self.groups:
            if group.floor >= best_rank:
                break
            src_shift, dst_shift, by_protocol, by_sport, by_dport = group.shape
            if group.named:
                if fragment and (by_sport or by_dport):
                    continue
                bucket = group.buckets.get((
                    s >> src_shift, d >> dst_shift,
                    protocol if by_protocol else -1, sport if by_sport else -1, dport if by_dport else -1,
                ))  # fmt: skip
            else:
                bucket = group.buckets.get((s >> src_shift, d >> dst_shift))
            if bucket is None:
                continue
            for rank, policy, exact in bucket if isinstance(bucket, list) else (bucket,):
                if rank >= best_rank:
                    break
                if exact or matches(policy.selector, src, dst, protocol, sport, dport, fragment):
                    best, best_rank = policy, rank
                    break
        return best

    def add(self, rank: int, policy: Policy) -> _Entry:
        shape, key, exact = self._place(policy.selector)
        group = self.by_shape.get(shape)
        if group is None:
            group = self.by_shape[shape] = _Group(shape)
            self.groups.append(group)
        entry = (rank, policy, exact)
        bucket = group.buckets.get(key)
        if bucket is None:
            group.buckets[key] = entry
        elif isinstance(bucket, list):
            insort(bucket, entry, key=_rank)
        else:
            group.buckets[key] = sorted((bucket, entry), key=_rank)
        group.count += 1
        if rank < group.floor:
            group.floor = rank
            self.groups.sort(key=_floor)
        return entry

    def remove(self, rank: int, policy: Policy) -> None:
        shape, key, _ = self._place(policy.selector)
        group = self.by_shape[shape]
        bucket = group.buckets[key]
        if isinstance(bucket, list):
            left = [entry for entry in bucket if entry[0] != rank]
            group.buckets[key] = left if len(left) > 1 else left[0]
        else:
            del group.buckets[key]
        group.count -= 1
        if not group.count:
            del self.by_shape[shape]
            self.groups.remove(group)
        elif rank == group.floor or group.stale:
            # The floor only prunes, and a low one is safe: look for the true one once in a while, so that deleting
            # many policies stays linear.
            group.stale += 1
            if group.stale * 4 >= group.count:
                group.stale = 0
                group.floor = min(
                    bucket[0][0] if isinstance(bucket, list) else bucket[0] for bucket in group.buckets.values()
                )
                self.groups.sort(key=_floor)

    def _place(self, selector: Selector) -> tuple[_Shape, tuple[int, ...], bool]:
        """Return the selector's group, its bucket there, and whether the bucket alone decides."""
        src_first, src_last = int.from_bytes(selector.src_first, "big"), int.from_bytes(selector.src_last, "big")
        dst_first, dst_last = int.from_bytes(selector.dst_first, "big"), int.from_bytes(selector.dst_last, "big")
        src_shift = _shift(src_first, src_last)
        dst_shift = _shift(dst_first, dst_last)
        by_protocol = selector.protocol != IPPROTO_ANY
        by_sport = selector.sport_first == selector.sport_last
        by_dport = selector.dport_first == selector.dport_last
        exact = (
            src_last - src_first == (1 << src_shift) - 1
            and dst_last - dst_first == (1 << dst_shift) - 1
            and (by_sport or (selector.sport_first, selector.sport_last) == (0, 65535))
            and (by_dport or (selector.dport_first, selector.dport_last) == (0, 65535))
            # Without a protocol, ports mean protocols that have some.
            and (by_protocol or not selector.has_ports)
        )
        shape = (src_shift, dst_shift, by_protocol, by_sport, by_dport)
        key: tuple[int, ...] = (src_first >> src_shift, dst_first >> dst_shift)
        if by_protocol or by_sport or by_dport:
            key = (
                *key,
                selector.protocol if by_protocol else -1,
                selector.sport_first if by_sport else -1,
                selector.dport_first if by_dport else -1,
            )
        return shape, key, exact


class Spd:
    """All policies of a gateway.  ``generation`` grows with every change; a flow cache compares it.

    A fragment other than the first has no ports (and no ICMP type): ``fragment=True`` matches only selectors without
    ports.  Where the whole datagram is put together before the look-up, as the gateway's hooks do, this never arises.
    """

    __slots__ = (
        "_by_id", "_by_selector", "_dumped", "_next_id", "_next_order", "_next_reqid", "_tables", "generation",
        "inbound_sockets", "sockets",
    )  # fmt: skip

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self.generation = 0
        self.sockets: dict[int, SocketPolicy] = {}
        """Policies of sockets by mark, changed with :meth:`put_socket`; they are outside of all that follows."""
        self.inbound_sockets = False
        """One of them has an inbound rule."""
        self._dumped: tuple[int, list[Policy]] | None = None
        """What :meth:`dump` found, and the generation in which it did."""
        self._next_id = 1
        """Without its low bits."""
        self._next_order = 0
        self._next_reqid = AUTOMATIC_REQID
        self._clear()
        for policy in policies:
            self.add(policy)

    def _clear(self) -> None:
        self._by_id: dict[int, _Entry] = {}
        self._by_selector: dict[Direction, dict[Selector, int]] = {direction: {} for direction in Direction}
        # Indexed by direction * 2 + (1 for IPv6): a list access in place of hashing an enumeration.
        self._tables = [_Table(128 if index & 1 else 32) for index in range(6)]

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Policy]:
        return iter(self.dump())

    # -- what the packet path asks ---------------------------------------------------------------------

    def lookup(
        self,
        direction: int,
        src: bytes,
        dst: bytes,
        protocol: int,
        sport: int = 0,
        dport: int = 0,
        fragment: bool = False,
    ) -> Policy | None:
        """Return the policy for a packet, or None when no policy names it (``def_policy`` then decides).

        Addresses are packed, ports in host order; for ICMP and ICMPv6 ``sport`` is the type and ``dport`` the code.
        Cost: see :class:`_Table`; it doesn't depend on the number of policies for the common shapes.
        """
        return self._tables[direction * 2 + (len(src) == 16)].lookup(src, dst, protocol, sport, dport, fragment)

    def lookup_socket(
        self, mark: int, direction: int, src: bytes, dst: bytes, protocol: int, sport: int, dport: int, fragment: bool
    ) -> Policy | None:
        """The same for a packet of a socket with this mark: its own policy before the SPD's, or behind it.

        A mark that was never given out is somebody else's: the SPD decides.
        """
        found = self.sockets.get(mark)
        rule = found.rule(direction) if found is not None else None
        if found is not None and rule is not None and rule.privileged:
            return found.policy(direction, 4 if len(src) == 4 else 6)
        policy = self.lookup(direction, src, dst, protocol, sport, dport, fragment)
        if policy is None and found is not None and rule is not None:
            return found.policy(direction, 4 if len(src) == 4 else 6)
        return policy

    def put_socket(self, policy: SocketPolicy) -> None:
        """Add or replace the policies of a mark."""
        self.sockets[policy.mark] = policy
        self._sockets_changed()

    def drop_socket(self, mark: int) -> None:
        """Forget a mark, if it is known."""
        self.sockets.pop(mark, None)
        self._sockets_changed()

    def _sockets_changed(self) -> None:
        self.inbound_sockets = any(each.inbound is not None for each in self.sockets.values())
        self.generation += 1

    # -- what key management asks ----------------------------------------------------------------------

    def get(self, policy_id: int) -> Policy:
        """Return the policy with this id; SpdError ENOENT when there is none."""
        found = self._by_id.get(policy_id)
        if found is None:
            raise SpdError(f"no policy with id {policy_id}", errno.ENOENT)
        return found[1]

    def find(self, direction: int, selector: Selector) -> Policy | None:
        """Return the policy with exactly this direction and selector, or None."""
        policy_id = self._by_selector[Direction(direction)].get(selector)
        return None if policy_id is None else self._by_id[policy_id][1]

    def add(self, policy: Policy) -> Policy:
        """Add a policy and return it as stored: with its id, and with a reqid where ``unique`` named none.

        An id that is not 0 and not taken is kept.  SpdError EEXIST when direction and selector are there already;
        EINVAL when the policy makes no sense.
        """
        check(policy)
        if policy.selector in self._by_selector[policy.direction]:
            raise SpdError("a policy with this direction and selector exists: use spdupdate", errno.EEXIST)
        self._next_order += 1
        return self._insert(policy, self._next_order)

    def update(self, policy: Policy) -> Policy:
        """Put ``policy`` in the place of the one with the same direction and selector, or add it; return it as stored.

        The id stays; so does the place among policies of equal priority, when the priority does.
        """
        check(policy)
        policy_id = self._by_selector[policy.direction].get(policy.selector)
        if policy_id is None:
            return self.add(policy)
        rank, old, _ = self._by_id[policy_id]
        order = rank & 0xFFFFFFFFFFFFFFFF
        if old.priority != policy.priority:
            self._next_order += 1
            order = self._next_order
        self._remove(old)
        return self._insert(replace(policy, id=policy_id), order)

    def delete(self, direction: int, selector: Selector) -> Policy:
        """Remove the policy with exactly this direction and selector; return it.  SpdError ENOENT without one."""
        policy = self.find(direction, selector)
        if policy is None:
            raise SpdError("no policy with this direction and selector", errno.ENOENT)
        self._remove(policy)
        return policy

    def delete_id(self, policy_id: int) -> Policy:
        """Remove the policy with this id; return it.  SpdError ENOENT when there is none."""
        policy = self.get(policy_id)
        self._remove(policy)
        return policy

    def flush(self) -> list[Policy]:
        """Remove every policy; return them."""
        gone = self.dump()
        self._clear()
        self.generation += 1
        return gone

    def dump(self) -> list[Policy]:
        """Return the policies in the order in which they are looked at: inbound, outbound; by priority, then age."""
        if self._dumped is None or self._dumped[0] != self.generation:
            sides: dict[Direction, list[_Entry]] = {direction: [] for direction in Direction}
            for entry in self._by_id.values():
                sides[entry[1].direction].append(entry)
            listed = [policy for side in sides.values() for _, policy, _ in sorted(side, key=_rank)]
            self._dumped = self.generation, listed
        return self._dumped[1].copy()

    def expired(self, now: float) -> list[Policy]:
        """Remove and return the policies whose lifetime is over at ``now`` (Unix seconds)."""
        gone = [
            policy for _, policy, _ in self._by_id.values()
            if policy.lifetime and now - policy.created >= policy.lifetime
        ]
        for policy in gone:
            self._remove(policy)
        return gone

    def replace_all(self, policies: Iterable[Policy]) -> None:
        """Replace the whole content at once; on SpdError nothing has changed.

        A policy without an id keeps the id of the policy with the same direction and selector, if there was one.
        """
        fresh = Spd()
        fresh._next_id, fresh._next_reqid = self._next_id, self._next_reqid
        for policy in policies:
            kept = self.find(policy.direction, policy.selector) if not policy.id else None
            fresh.add(replace(policy, id=kept.id) if kept is not None else policy)
        self._by_id, self._by_selector, self._tables = fresh._by_id, fresh._by_selector, fresh._tables
        self._next_id, self._next_order, self._next_reqid = fresh._next_id, fresh._next_order, fresh._next_reqid
        self.generation += 1

    def copy(self) -> Spd:
        """Return an SPD with the same policies, ids and order, for changes made as a whole or not at all."""
        other = Spd()
        for rank, policy, _ in sorted(self._by_id.values(), key=_rank):
            other._insert(policy, rank & 0xFFFFFFFFFFFFFFFF)
        other._next_id, other._next_order, other._next_reqid = self._next_id, self._next_order, self._next_reqid
        other.generation = self.generation
        other.sockets, other.inbound_sockets = dict(self.sockets), self.inbound_sockets
        return other

    # -- indexes ---------------------------------------------------------------------------------------

    def _insert(self, policy: Policy, order: int) -> Policy:
        changes: dict[str, object] = {}
        if not policy.id or policy.id in self._by_id:
            changes["id"] = self._next_id << DIRECTION_BITS | (policy.direction is Direction.OUT)
        if any(transform.level is Level.UNIQUE and not transform.reqid for transform in policy.transforms):
            changes["transforms"] = tuple(self._with_reqid(transform) for transform in policy.transforms)
        if changes:
            policy = replace(policy, **changes)  # type: ignore[arg-type]
        self._next_id = max(self._next_id, (policy.id >> DIRECTION_BITS) + 1)
        rank = policy.priority << 64 | order
        self._by_selector[policy.direction][policy.selector] = policy.id
        table = self._tables[policy.direction * 2 + (policy.selector.family == 6)]
        self._by_id[policy.id] = table.add(rank, policy)
        self.generation += 1
        return policy

    def _with_reqid(self, transform: Transform) -> Transform:
        if transform.level is not Level.UNIQUE or transform.reqid:
            return transform
        reqid = self._next_reqid
        self._next_reqid += 1
        return replace(transform, reqid=reqid)

    def _remove(self, policy: Policy) -> None:
        rank, stored, _ = self._by_id.pop(policy.id)
        del self._by_selector[stored.direction][stored.selector]
        self._tables[stored.direction * 2 + (stored.selector.family == 6)].remove(rank, stored)
        self.generation += 1


def _rank(entry: tuple[int, *tuple[object, ...]]) -> int:
    return entry[0]


def _floor(group: _Group) -> int:
    return group.floor


def _shift(first: int, last: int) -> int:
    """Return how many low bits to ignore so that one number stands for the whole range.

    For a prefix these are its host bits.  For another range they are those of the smallest prefix that holds it, and up
    to three more: fewer distinct shapes cost less than the few more candidates in a bucket.
    """
    host = (first ^ last).bit_length()
    return host if last - first == (1 << host) - 1 else (host + 3) & ~3
