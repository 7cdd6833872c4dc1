"""Which policy a packet gets, in a time that doesn't grow with their number."""

from __future__ import annotations

from bisect import insort

from ipsecq.numbers import IPPROTO_ANY
from ipsecq.policy.model import Policy, Selector
from ipsecq.policy.rules import matches

# (right shift of src, right shift of dst, protocol named?, one source port?, one destination port?)
_Shape = tuple[int, int, bool, bool, bool]
Entry = tuple[int, Policy, bool]
"""Rank (priority << 64 | order of insertion), policy, and whether the bucket's key says it all: no comparison needed."""


class _Group:
    """All policies of one shape: a hash table from the masked packet to the few policies that may match."""

    __slots__ = ("buckets", "count", "floor", "named", "shape", "stale")

    def __init__(self, shape: _Shape) -> None:
        self.shape = shape
        self.named = shape[2] or shape[3] or shape[4]
        self.buckets: dict[tuple[int, ...], Entry | list[Entry]] = {}
        """The best one first.  One alone, as most are, stands for itself: 100,000 lists take 10 MB."""
        self.count = 0
        self.floor = 1 << 128
        """No policy of the group ranks before this; it may lag behind (lower) after deletions."""
        self.stale = 0
        """Deletions since the floor was true."""


class Table:
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
        """See :meth:`ipsecq.policy.spd.Spd.lookup`."""
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

    def add(self, rank: int, policy: Policy) -> Entry:
        """Add a policy; return its entry."""
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
            insort(bucket, entry, key=rank_of)
        else:
            group.buckets[key] = sorted((bucket, entry), key=rank_of)
        group.count += 1
        if rank < group.floor:
            group.floor = rank
            self.groups.sort(key=_floor)
        return entry

    def remove(self, rank: int, policy: Policy) -> None:
        """Remove a policy that is there with this rank."""
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


def rank_of(entry: tuple[int, *tuple[object, ...]]) -> int:
    """What entries are sorted by."""
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
