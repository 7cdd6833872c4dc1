"""Where in our ruleset a packet's fate is decided: the chains that it passes, in order, for ``ipsecq explain``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from ipsecq.netfilter.plan import Plan
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.verdicts import verdict_of
from ipsecq.numbers import IPPROTO_ICMPV6, Direction
from ipsecq.policy.model import Policy
from ipsecq.sysctl import Sysctl

NEIGHBOUR_DISCOVERY: Final = frozenset({130, 131, 132, 133, 134, 135, 136, 137, 143})
"""ICMPv6 types that our chains let pass (on the link only) before any policy."""


def chains(
    policies: Iterable[Policy], policy: Policy | None, direction: Direction, family: int, settings: NetfilterSettings,
    sysctl: Sysctl, places: Callable[[int], list[str]] | None = None,
) -> list[str]:
    """The hook, the chains and maps, and the verdict for a clear packet that ``policy`` decides about.

    ``policies`` is the whole SPD in its order: which map or chain holds a policy depends on its neighbours.  Costs what
    compiling the ruleset costs, unless ``places`` (:meth:`ipsecq.netfilter.load.Loader.where`) knows.
    """
    hook, side = ("prerouting", "in") if direction is Direction.IN else ("postrouting", "out")
    if policy is None:
        knobs = sysctl.v4 if family == 4 else sysctl.v6
        verdict = "accept" if knobs.def_policy else "drop"
        return [hook, f"policy_{side}_ipv{family}: no rule matches", f"default_{side}", verdict]
    if places is None:
        plan = Plan(settings.table, settings.workers, settings.lanes)
        plan.update(policies, sysctl)
        places = plan.where
    found = places(policy.id) or ["no rule: no packet can match it"]
    verdict = verdict_of(policy, sysctl, settings.workers, settings.lanes)
    return [hook, f"policy_{side}_ipv{family}", " and ".join(found), verdict]


def exempt(settings: NetfilterSettings, protocol: int, icmp_type: int) -> bool:
    """True for what our rules accept before any policy: IPv6 neighbour discovery, unless it is configured away."""
    return settings.neighbour_discovery and protocol == IPPROTO_ICMPV6 and icmp_type in NEIGHBOUR_DISCOVERY
