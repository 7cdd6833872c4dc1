"""The whole examination, in the order in which an administrator reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ipsecq.doctor import firewall, interfaces, machine, routes, rules, running
from ipsecq.doctor.finding import Finding, Grade
from ipsecq.errors import IpsecqError
from ipsecq.netfilter.capabilities import detect
from ipsecq.netfilter.links import is_local
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.policy.model import Policy
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse


def examine(
    settings: NetfilterSettings | None = None,
    policies: Sequence[Policy] = (),
    sas: Iterable[SecurityAssociation] = (),
    status: dict[str, Any] | None = None,
    knobs: Mapping[str, int] | None = None,
    *,
    probe: bool = False,
) -> list[Finding]:
    """Look at everything.

    ``status`` and ``knobs`` are the running daemon's, None without one; ``probe``: ping the peers.
    """
    settings = settings or NetfilterSettings()
    capabilities = detect()
    if status is not None:
        policies = live_policies(status) or policies
    findings = machine.examine(settings, policies, capabilities)
    findings += rules.examine(sas, policies, is_local)
    if capabilities.nft and capabilities.net_admin:
        try:
            findings += firewall.examine(firewall.listing(), settings, policies)
        except IpsecqError as error:
            findings.append(Finding(Grade.WARN, "ruleset", f"nft cannot list the ruleset: {error}"))
    guarded = None if status is None else status["devices"]
    findings += routes.examine(settings, policies, guarded=guarded, probe=probe)
    if status is not None:
        findings += interfaces.examine(status.get("interfaces", []), policies, is_local)
        findings += running.examine(status, policies, knobs or {})
    return findings


def live_policies(status: dict[str, Any]) -> list[Policy]:
    """The SPD of the running daemon, IKE's policies included, from its answer."""
    text = "\n".join(policy["policy"] for policy in status["policies"])
    return apply(parse(text, "status"), Sad(), Spd(), now=0.0).spd.dump()
