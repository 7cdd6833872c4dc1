"""What the kernel does with a packet that a policy names: the nft verdict of each policy.

Inbound the verdict is about *clear* packets only (what arrived through IPsec was judged by the engine and comes from
the enc device).  The levels are those of the manual: ``use`` is never enforced, IPComp neither.
"""

from __future__ import annotations

from ipsecq.netfilter.steering import queue_of
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Transform
from ipsecq.sysctl import FamilyKnobs, Sysctl


def effective_level(transform: Transform, knobs: FamilyKnobs) -> int:
    """The level of a transform with ``default`` resolved by the family's ``*_deflev`` knobs (IPComp: use)."""
    if transform.level != Level.DEFAULT:
        return transform.level
    tunnel = transform.mode == Mode.TUNNEL
    if transform.protocol == Protocol.ESP:
        return knobs.esp_net_deflev if tunnel else knobs.esp_trans_deflev
    if transform.protocol == Protocol.AH:
        return knobs.ah_net_deflev if tunnel else knobs.ah_trans_deflev
    return Level.USE


def enforced(policy: Policy, knobs: FamilyKnobs) -> bool:
    """True when an inbound ``ipsec`` policy refuses clear packets: an ESP or AH transform is required."""
    return any(
        transform.protocol != Protocol.IPCOMP and effective_level(transform, knobs) >= Level.REQUIRE
        for transform in policy.transforms
    )


def verdict_of(policy: Policy, sysctl: Sysctl, workers: int, lanes: int = 1) -> str:
    """The nft verdict for a packet that ``policy`` matches first."""
    inbound = policy.direction == Direction.IN
    knobs = sysctl.v4 if policy.selector.family == 4 else sysctl.v6
    if policy.action == Action.DISCARD:
        return "goto in_discard" if inbound else "goto out_discard"
    if policy.action != Action.IPSEC:
        return "accept"
    if inbound:
        if not enforced(policy, knobs):
            return "accept"
        return "goto in_clear_open" if policy.fail_open else "goto in_clear"
    queue = queue_of(policy, workers, lanes)
    where = "spread" if queue is None else str(queue)
    if policy.fail_open:
        return f"goto out_open_{where}"
    # A chain of its own for "use", whose packets may leave in clear by the engine's decision (see sentinel).
    return f"goto out_worker_{where}" if enforced(policy, knobs) else f"goto out_use_{where}"
