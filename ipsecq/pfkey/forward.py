"""Linux's policies of direction FWD.

Linux checks packets that it delivers against *in* policies and packets that it forwards against *fwd* policies; BSD's
*in* means both, and so does ours.  IKE daemons on Linux therefore add the same policy twice.  A FWD policy is kept here
as a *shadow* of the IN policy with the same selector.  Where that one doesn't exist, or goes, while the shadow stays,
an IN policy is held in its place: a policy that a client believes to be in force is in force.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from typing import Final

from ipsecq.numbers import Direction
from ipsecq.pfkey.database import SecurityDatabase
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.policy.model import Policy, Selector

SHADOW_ID: Final = 0x80000000
"""Ids of shadows have this bit, ids of the SPD don't.

The low three bits say the direction, as in ids of Linux's xfrm policies: IKE daemons read it there.
"""
_SLOT_FORWARD: Final = 2
"""XFRM_POLICY_FWD; in is 0, out is 1, and from 3 on they are policies of sockets."""


@dataclass(slots=True)
class ForwardPolicies:
    """The shadows by selector, and which IN policies exist for their sake only."""

    database: SecurityDatabase
    _shadows: dict[Selector, Policy] = field(default_factory=dict)
    _by_id: dict[int, Selector] = field(default_factory=dict)
    _held: set[int] = field(default_factory=set)
    """Ids of the IN policies that no client added as such."""
    _last_id: int = 0

    def add(self, policy: Policy, *, exclusive: bool) -> Policy:
        """Add a shadow (``policy`` has direction IN); EEXIST when it is there and ``exclusive``."""
        old = self._shadows.get(policy.selector)
        if old is not None and exclusive:
            raise PfkeyError("a fwd policy with this selector exists: use SPDUPDATE", errno.EEXIST)
        inbound = self.database.find_policy(Direction.IN, policy.selector)
        if inbound is None or inbound.id in self._held:
            self._held.add(self.database.update_policy(policy).id)
        if old is None:
            self._last_id += 1
        shadow = replace(policy, id=old.id if old is not None else SHADOW_ID | self._last_id * 8 + _SLOT_FORWARD)
        self._shadows[policy.selector] = shadow
        self._by_id[shadow.id] = policy.selector
        return shadow

    def inbound_added(self, policy: Policy) -> bool:
        """A client adds ``policy``, direction IN, itself: True when one held here was in its place (no EEXIST then)."""
        held = self.database.find_policy(Direction.IN, policy.selector)
        return held is not None and held.id in self._held

    def inbound_owned(self, policy: Policy) -> None:
        """The IN policy, as stored, is a client's now."""
        self._held.discard(policy.id)

    def delete_inbound(self, policy: Policy) -> None:
        """A client deletes an IN policy: it goes, unless a shadow still needs it.  ENOENT when it isn't a client's."""
        if policy.id in self._held:
            raise PfkeyError("no in policy with this selector, only a fwd policy", errno.ENOENT)
        shadow = self._shadows.get(policy.selector)
        if shadow is None:
            self.database.delete_policy(policy.id)
        else:
            self._held.add(self.database.update_policy(replace(shadow, id=0)).id)

    def delete(self, selector: Selector) -> Policy:
        """Remove the shadow, and the IN policy that was there for its sake; ENOENT when there is none."""
        shadow = self._shadows.get(selector)
        if shadow is None:
            raise PfkeyError("no fwd policy with this selector", errno.ENOENT)
        inbound = self.database.find_policy(Direction.IN, selector)
        if inbound is not None and inbound.id in self._held:
            self.database.delete_policy(inbound.id)
            self._held.discard(inbound.id)
        del self._shadows[selector], self._by_id[shadow.id]
        return shadow

    def get(self, number: int) -> Policy:
        """The shadow with this id; ENOENT."""
        selector = self._by_id.get(number)
        if selector is None:
            raise PfkeyError(f"no policy with id {number:#x}", errno.ENOENT)
        return self._shadows[selector]

    def is_held(self, policy: Policy) -> bool:
        """Is this IN policy one that no client added as such?  Dumps leave it out: they have its shadow."""
        return policy.id in self._held

    def dump(self) -> list[Policy]:
        """All shadows."""
        return list(self._shadows.values())

    def flush(self) -> None:
        """Forget all: the SPD has been flushed."""
        self._shadows.clear()
        self._by_id.clear()
        self._held.clear()

    def expired(self, policy: Policy) -> Policy | None:
        """An IN policy's lifetime is over and it has gone: return the shadow that goes with it.

        A shadow without a lifetime stays, and holds an IN policy again.
        """
        self._held.discard(policy.id)
        shadow = self._shadows.get(policy.selector)
        if shadow is None:
            return None
        if not shadow.lifetime:
            self._held.add(self.database.update_policy(replace(shadow, id=0)).id)
            return None
        del self._shadows[policy.selector], self._by_id[shadow.id]
        return shadow
