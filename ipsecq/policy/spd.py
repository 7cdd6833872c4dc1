"""The SPD: policies in order of priority; :mod:`ipsecq.policy.lookup` finds them.

A packet gets the policy with the lowest ``priority`` that matches; among equals the one that was added first.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

from ipsecq.errors import SpdError
from ipsecq.numbers import Direction, Level
from ipsecq.policy.lookup import Entry, Table, rank_of
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.rules import check
from ipsecq.policy.sockets import SocketPolicy

AUTOMATIC_REQID: Final = 0x4000
"""First reqid that ``unique`` without a number gets; the ones below are the administrator's (KAME)."""
DIRECTION_BITS: Final = 3
"""Low bits of a policy's id that say its direction, as Linux has it: 0 in, 1 out (2 forward, 3 and more: sockets).

setkey(8) and racoon of ipsec-tools look at them.
"""


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
        self._by_id: dict[int, Entry] = {}
        self._by_selector: dict[Direction, dict[Selector, int]] = {direction: {} for direction in Direction}
        # Indexed by direction * 2 + (1 for IPv6): a list access in place of hashing an enumeration.
        self._tables = [Table(128 if index & 1 else 32) for index in range(6)]

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
        Cost: see :class:`ipsecq.policy.lookup.Table`; it doesn't depend on the number of policies for the common shapes.
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
            sides: dict[Direction, list[Entry]] = {direction: [] for direction in Direction}
            for entry in self._by_id.values():
                sides[entry[1].direction].append(entry)
            listed = [policy for side in sides.values() for _, policy, _ in sorted(side, key=rank_of)]
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
        for rank, policy, _ in sorted(self._by_id.values(), key=rank_of):
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
