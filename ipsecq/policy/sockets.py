"""Policies of single sockets: what ``setsockopt(IP_IPSEC_POLICY)`` sets, and how a packet finds it.

A socket carries the *mark* of its policy in a bit field of SO_MARK.  All sockets with the same pair of policies, in and
out, share one mark, so what a packet costs and what the kernel's rules hold grows with the number of different pairs,
not of sockets.

Precedence is the manual's system's: a privileged socket's policy goes before the SPD; one that was set without
privilege counts where the SPD has none, so it can add protection but never take any away; nor does it take the place of
one that was set with privilege.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from ipsecq.errors import SpdError
from ipsecq.numbers import IPPROTO_ANY, Action, Direction, Level, Mode
from ipsecq.policy.model import Policy, Selector
from ipsecq.policy.rules import check
from ipsecq.policy.setpolicy import PolicySpec
from ipsecq.policy.setpolicy import format as format_policy

FIRST_ID: Final = 0x80000000
"""Policies of sockets have ids from here on, so that no policy of the SPD is taken for one."""
FIRST_REQID: Final = 0x40000000
"""Reqids that ``unique`` without a number gets for a socket, away from those that the SPD gives."""


@dataclass(slots=True, frozen=True)
class SocketRule:
    """One direction.  ``entrust`` is no rule at all (None in its place): the SPD decides."""

    spec: PolicySpec
    privileged: bool = False

    @property
    def text(self) -> str:
        """The string of ipsec_set_policy(3)."""
        return format_policy(self.spec)


@dataclass(slots=True, frozen=True)
class SocketPolicy:
    """A pair of rules and the mark that stands for it."""

    mark: int
    """The value of the bit field, in its place in SO_MARK; never 0."""
    inbound: SocketRule | None = None
    outbound: SocketRule | None = None
    number: int = 1
    """Counts the pairs; the ids of its four policies are made of it."""
    _policies: tuple[Policy | None, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        found: list[Policy | None] = []
        for direction, rule in ((Direction.IN, self.inbound), (Direction.OUT, self.outbound)):
            for family in (4, 6):
                at = FIRST_ID + self.number * 4 + len(found)
                found.append(None if rule is None else _policy(direction, rule.spec, family, at))
        object.__setattr__(self, "_policies", tuple(found))

    def rule(self, direction: int) -> SocketRule | None:
        """The rule of one direction, or None (entrust)."""
        return self.inbound if direction == Direction.IN else self.outbound

    def policy(self, direction: int, family: int) -> Policy | None:
        """The rule as a policy for packets of IP version 4 or 6, or None (entrust)."""
        return self._policies[(direction == Direction.OUT) * 2 + (family == 6)]

    def policies(self) -> Iterator[Policy]:
        """All of them."""
        return (policy for policy in self._policies if policy is not None)


def gone(mark: int, number: int) -> SocketPolicy:
    """What stands for a mark that nobody has any more: packets that still carry it are dropped."""
    return SocketPolicy(mark, None, SocketRule(PolicySpec(Direction.OUT, Action.DISCARD), privileged=True), number)


def rule_of(spec: PolicySpec, *, privileged: bool) -> SocketRule | None:
    """The rule that a caller's policy makes, None for ``entrust``.

    SpdError with the errno of the manual's system: EINVAL when it makes no sense, EACCES when it asks for privilege:
    ``bypass`` and ``none`` take packets out of the system's policies.
    """
    action = spec.action
    if action is None:
        raise SpdError("a socket's policy needs an action: discard, none, entrust, bypass or ipsec")
    if action is Action.ENTRUST:
        return None
    if action in (Action.BYPASS, Action.NONE) and not privileged:
        raise SpdError(f"{action.name.lower()} needs privilege: root or CAP_NET_ADMIN", errno.EACCES)
    if spec.priority:
        # A socket has one policy each way: nothing to be before or after.
        spec = replace(spec, priority=0)
    check_spec(spec)
    return SocketRule(spec, privileged)


def check_change(present: SocketRule | None, rule: SocketRule | None, *, privileged: bool) -> bool:
    """Whether ``rule`` (None: ``entrust``) makes a difference to a socket that has ``present`` in its direction.

    SpdError (EACCES) when it does, ``present`` was set with privilege and this caller has none: whoever is handed a
    socket keeps the policy that it came with.  Asking for the very same policy is nobody's change.
    """
    if present is None or not present.privileged or privileged:
        return present != rule
    if rule is not None and rule.spec == present.spec:
        return False
    raise SpdError("the present policy was set with privilege, so changing it needs root or CAP_NET_ADMIN", errno.EACCES)


def check_spec(spec: PolicySpec) -> None:
    """SpdError (EINVAL) when the transforms make no sense."""
    if spec.action is not Action.BYPASS:
        check(Policy(spec.direction, _EVERYTHING[4], spec.action or Action.DISCARD, spec.transforms))


def wants_reqid(spec: PolicySpec) -> bool:
    """True when a transform is ``unique`` without a number: no other socket may share its SAs."""
    return any(transform.level is Level.UNIQUE and not transform.reqid for transform in spec.transforms)


def with_reqids(spec: PolicySpec, reqid: int) -> PolicySpec:
    """``unique`` without a number gets numbers from ``reqid`` on, one a transform."""
    return replace(
        spec,
        transforms=tuple(
            replace(transform, reqid=reqid + at)
            if transform.level is Level.UNIQUE and not transform.reqid
            else transform
            for at, transform in enumerate(spec.transforms)
        ),
    )


_EVERYTHING: Final = {
    family: Selector(bytes(size), b"\xff" * size, bytes(size), b"\xff" * size, IPPROTO_ANY)
    for family, size in ((4, 4), (6, 16))
}


def _policy(direction: Direction, spec: PolicySpec, family: int, number: int) -> Policy:
    action = spec.action if spec.action is not None else Action.ENTRUST
    if _fits(spec, family):
        return Policy(direction, _EVERYTHING[family], action, spec.transforms, id=number, label="socket")
    # An IPv4 packet of an IPv6 socket whose policy names IPv6 ends: nothing can protect it as it is written.
    return Policy(direction, _EVERYTHING[family], Action.DISCARD, id=number, label="socket")


def _fits(spec: PolicySpec, family: int) -> bool:
    """False when a transform without a tunnel names ends of another family than the packet has there."""
    size = 4 if family == 4 else 16
    for transform in spec.transforms:
        ends = len(transform.src) if transform.src is not None else size
        if transform.mode is Mode.TUNNEL:
            size = ends
        elif ends != size:
            return False
    return True


class MarkField:
    """The bits of SO_MARK that hold a socket's policy; they need not be neighbours.

    Numbers fill the field from its highest bit down: with the default field the first 63 use the top six bits of the
    mark alone, where nobody else's marks are.
    """

    __slots__ = ("_bits", "mask")

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self._bits = [1 << at for at in range(31, -1, -1) if mask >> at & 1]

    @property
    def largest(self) -> int:
        """The largest number."""
        return (1 << len(self._bits)) - 1

    def mark(self, number: int) -> int:
        """The mark of a number, from 1 to :attr:`largest`."""
        return sum(bit for at, bit in enumerate(self._bits) if number >> at & 1)
