"""Sentences about policies of direction *fwd*, Linux's word for packets that are forwarded, as ipsec-tools writes them.

``in`` means these packets, too, here as on BSD, so of a pair with one selector one policy is left.  A *fwd* policy
alone stands for ``in``, as it does for PF_KEY clients (:mod:`ipsecq.pfkey.forward`): what was written is in force.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from ipsecq.errors import ConfigError
from ipsecq.numbers import Action, Direction, Level
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.setkey import commands as c

_STRICTER: Final = {Level.USE: 1, Level.REQUIRE: 2, Level.UNIQUE: 3}
"""Default isn't here: how strict that is, knobs say."""


def covers(
    inbound: tuple[Action | None, tuple[Transform, ...]], forward: tuple[Action | None, tuple[Transform, ...]]
) -> bool:
    """Does the *in* policy ask for at least what the *fwd* policy does?  (action, transforms) of each."""
    return (
        inbound[0] is forward[0]
        and len(inbound[1]) == len(forward[1])
        and all(map(_covers, inbound[1], forward[1]))
    )


def _covers(inbound: Transform, forward: Transform) -> bool:
    strict = inbound.level is forward.level or (
        inbound.level in _STRICTER and _STRICTER[inbound.level] > _STRICTER.get(forward.level, 3)
    )
    return (
        strict
        and forward.reqid in (0, inbound.reqid)
        and (inbound.protocol, inbound.mode, inbound.src, inbound.dst)
        == (forward.protocol, forward.mode, forward.src, forward.dst)
    )


@dataclass(slots=True)
class _Group:
    """Sentences of one kind about one selector: none between them has undone what another did."""

    deletes: bool
    inbound: Policy | None = None
    has_inbound: bool = False
    forward: list[int] = field(default_factory=list)


def resolve(commands: Iterable[c.Command], file: str) -> list[c.Command]:
    """The commands without direction *fwd*.  ConfigError where a *fwd* policy asks for more than its *in* policy."""
    result = list(commands)
    if not any(_is_forward(command) for command in result):
        return result
    groups = _groups(result)
    for group in groups:
        for at in group.forward:
            command = result[at]
            if group.inbound is not None and isinstance(command, c.SpdAdd | c.SpdUpdate):
                here, there = group.inbound, command.policy
                if not covers((here.action, here.transforms), (there.action, there.transforms)):
                    raise ConfigError(
                        "this fwd policy says something else than the in policy with its selector: here in covers "
                        "forwarded packets too, so say the same in both",
                        file=file, line=command.line, column=command.column,
                    )  # fmt: skip
    dropped = {at for group in groups if group.has_inbound for at in group.forward}
    return [command for at, command in enumerate(result) if at not in dropped]


def _is_forward(command: c.Command) -> bool:
    return isinstance(command, c.SpdAdd | c.SpdUpdate | c.SpdDelete) and command.forward


def _groups(commands: list[c.Command]) -> list[_Group]:
    found: list[_Group] = []
    latest: dict[Selector, _Group] = {}
    for at, command in enumerate(commands):
        if isinstance(command, c.SpdFlush):
            latest.clear()
        if not isinstance(command, c.SpdAdd | c.SpdUpdate | c.SpdDelete):
            continue
        policy = None if isinstance(command, c.SpdDelete) else command.policy
        direction, selector = (
            (command.direction, command.selector)
            if isinstance(command, c.SpdDelete)
            else (command.policy.direction, command.policy.selector)
        )
        if direction is not Direction.IN:
            continue
        group = latest.get(selector)
        if group is None or group.deletes is not (policy is None):
            group = latest[selector] = _Group(policy is None)
            found.append(group)
        if command.forward:
            group.forward.append(at)
        else:
            group.inbound, group.has_inbound = policy, True
    return found
