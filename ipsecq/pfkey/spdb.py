"""The messages about policies: X_SPDADD, UPDATE, SETIDX, DELETE, DELETE2, GET, FLUSH, DUMP, EXPIRE, ACQUIRE."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ipsecq.errors import SpdError
from ipsecq.numbers import Action, Direction, Protocol
from ipsecq.pfkey import algorithms, saconvert, spconvert
from ipsecq.pfkey.acquire import Acquires
from ipsecq.pfkey.constants import DIR_FWD, Dialect, MessageType
from ipsecq.pfkey.database import SecurityDatabase
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.forward import SHADOW_ID, ForwardPolicies
from ipsecq.pfkey.hub import Client, Hub, Maker
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.policyext import PolicyExt
from ipsecq.pfkey.xextensions import Sa2
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.setpolicy import priority_to_wire


@dataclass(slots=True)
class PolicyHandlers:
    """Handlers by message type; each takes (client, message), raises PfkeyError and the databases' errors."""

    database: SecurityDatabase
    hub: Hub
    acquires: Acquires
    forward: ForwardPolicies
    clock: Callable[[], float]
    allow_legacy: bool

    # -- requests --------------------------------------------------------------------------------------

    def add(self, client: Client, message: Message) -> None:
        """X_SPDADD and X_SPDSETIDX: a new policy, EEXIST when direction and selector are taken."""
        self._add(client, message, exclusive=True)

    def update(self, client: Client, message: Message) -> None:
        """X_SPDUPDATE: a policy in the place of the one with the same direction and selector, if any."""
        self._add(client, message, exclusive=False)

    def _add(self, client: Client, message: Message, *, exclusive: bool) -> None:
        policy = spconvert.to_policy(message, client.dialect, self.clock())
        direction = spconvert.need_policy(message).direction
        if direction == DIR_FWD:
            stored = self.forward.add(policy, exclusive=exclusive)
        else:
            replaces = direction != Direction.OUT and self.forward.inbound_added(policy)
            if exclusive and not replaces:
                stored = self.database.add_policy(policy)
            else:
                stored = self.database.update_policy(policy)
            self.forward.inbound_owned(stored)
        kind = MessageType.X_SPDADD if exclusive else MessageType.X_SPDUPDATE
        priority = spconvert.need_policy(message).priority
        self.hub.broadcast(_describe(stored, kind, message.seq, message.pid, priority))

    def delete(self, client: Client, message: Message) -> None:
        """X_SPDDELETE: the policy with this direction and selector."""
        selector = spconvert.to_selector(message)
        direction = spconvert.need_direction(spconvert.need_policy(message), client.dialect)
        if direction == DIR_FWD:
            gone = self.forward.delete(selector)
        else:
            found = self.database.find_policy(Direction(direction), selector)
            if found is None:
                raise PfkeyError("no policy with this direction and selector", errno.ENOENT)
            gone = self._delete(found)
        self.hub.broadcast(_describe(gone, MessageType.X_SPDDELETE, message.seq, message.pid))

    def delete_by_id(self, client: Client, message: Message) -> None:
        """X_SPDDELETE2: the policy with this id."""
        number = spconvert.need_policy(message).id
        if number & SHADOW_ID:
            gone = self.forward.delete(self.forward.get(number).selector)
        else:
            gone = self._delete(self._get(number))
        self.hub.broadcast(_describe(gone, MessageType.X_SPDDELETE2, message.seq, message.pid))

    def _delete(self, policy: Policy) -> Policy:
        if policy.direction is Direction.IN:
            self.forward.delete_inbound(policy)
        else:
            self.database.delete_policy(policy.id)
        return policy

    def get(self, client: Client, message: Message) -> None:
        """X_SPDGET: the policy with this id, to the one who asked."""
        policy = self._get(spconvert.need_policy(message).id)
        self.hub.unicast(client, _describe(policy, MessageType.X_SPDGET, message.seq, message.pid))

    def _get(self, number: int) -> Policy:
        return self.forward.get(number) if number & SHADOW_ID else self.database.get_policy(number)

    def flush(self, client: Client, message: Message) -> None:
        """X_SPDFLUSH: all policies; an empty SPD is no error."""
        gone = self.database.flush_policies()
        self.forward.flush()
        reply = Message(MessageType.X_SPDFLUSH, seq=message.seq, pid=message.pid)
        self.hub.unicast(client, lambda _: replace(reply, satype=message.satype))
        if gone:
            self.hub.broadcast(lambda _: replace(reply))

    def dump(self, client: Client, message: Message) -> tuple[int, Iterator[Maker]]:
        """X_SPDDUMP: (how many, their messages), of the SPD as it is now; FWD shadows for Linux clients only."""
        chosen = list(self.database.policies())
        # A FreeBSD client has no word for FWD: it sees the IN policies that enforce them.
        if client.dialect is Dialect.LINUX:
            chosen = [policy for policy in chosen if not self.forward.is_held(policy)] + self.forward.dump()
        pid, count = message.pid, len(chosen)
        return count, (
            _describe(policy, MessageType.X_SPDDUMP, count - index, pid) for index, policy in enumerate(chosen, start=1)
        )

    # -- the same for whoever isn't a PF_KEY client -----------------------------------------------------

    def put(self, policy: Policy, *, exclusive: bool) -> Policy:
        """Add or, unless ``exclusive``, replace; SpdError EEXIST."""
        if exclusive and not (policy.direction is Direction.IN and self.forward.inbound_added(policy)):
            stored = self.database.add_policy(policy)
        else:
            stored = self.database.update_policy(policy)
        self.forward.inbound_owned(stored)
        kind = MessageType.X_SPDADD if exclusive else MessageType.X_SPDUPDATE
        self.hub.broadcast(_describe(stored, kind, 0, 0))
        return stored

    def remove(self, direction: Direction, selector: Selector) -> Policy:
        """Remove; SpdError ENOENT."""
        found = self.database.find_policy(direction, selector)
        if found is None:
            raise SpdError("no policy with this direction and selector", errno.ENOENT)
        self._delete(found)
        self.hub.broadcast(_describe(found, MessageType.X_SPDDELETE, 0, 0))
        return found

    def clear(self) -> None:
        """Remove all policies."""
        if self.database.flush_policies():
            self.hub.broadcast(lambda _: Message(MessageType.X_SPDFLUSH))
        self.forward.flush()

    # -- events ----------------------------------------------------------------------------------------

    def expired(self, policy: Policy) -> None:
        """X_SPDEXPIRE: the lifetime of a policy is over and it has gone."""
        shadow = self.forward.expired(policy) if policy.direction is Direction.IN else None
        for gone in (policy, shadow):
            if gone is not None:
                self.hub.broadcast(_describe(gone, MessageType.X_SPDEXPIRE, 0, 0))

    def acquire(self, policy: Policy, transform: Transform, src: bytes, dst: bytes) -> bool:
        """SADB_ACQUIRE: ask key management for an SA from ``src`` to ``dst`` for this transform of this policy.

        False when nobody registered for the protocol, or the same question is under way.
        """
        satype = saconvert.SATYPE_OF[transform.protocol]
        if not self.hub.anyone_registered(satype):
            return False
        asked = self.acquires.ask(int(transform.protocol), src, dst, transform.reqid, self.clock())
        if asked is None:
            return False

        def make(dialect: Dialect) -> Message:
            made = Message(
                MessageType.ACQUIRE, satype, seq=asked.seq,
                src=saconvert.host(src, dialect), dst=saconvert.host(dst, dialect),
                policy=PolicyExt(
                    int(Action.IPSEC), int(policy.direction), policy.id, priority_to_wire(policy.priority)
                ),
                proposal=algorithms.proposal(Protocol(transform.protocol), dialect, self.allow_legacy),
            )  # fmt: skip
            if dialect is Dialect.FREEBSD:
                made.sa2 = Sa2(int(transform.mode), transform.reqid)
            return made

        self.hub.to_registered(make, satype)
        return True


def _describe(policy: Policy, kind: MessageType, seq: int, pid: int, priority: int | None = None) -> Maker:
    """``priority``: the request's own number, of the two that mean the default.  setkey(8) looks whether it comes back."""

    def make(dialect: Dialect) -> Message:
        direction = DIR_FWD if policy.id & SHADOW_ID and dialect is Dialect.LINUX else None
        made = spconvert.from_policy(policy, direction=direction)
        made.type, made.seq, made.pid = kind, seq, pid
        if priority is not None and made.policy is not None:
            made.policy.priority = priority
        return made

    return make
