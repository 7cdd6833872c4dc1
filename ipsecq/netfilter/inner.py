"""The table for decapsulated packets: the operator's rules, called for each family by the knob ``filtertunnel``.

It is a table of its own, ``inet <table>_inner``, so that a reload replaces the operator's chains, sets and counters in one
transaction without a rule of ours in between.  Its hook is prerouting at -175: behind connection tracking (-200), so
``ct state`` works, before mangle (-150), NAT and routing.  Only what arrives from the enc device is looked at, and all of
that was authenticated and agrees with its inbound policy.

With ``reqid_mark`` the packet's mark tells the SA: the policies are in this table a second time, and the one that a
packet was checked against sets the bits of the mark to its reqid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from ipsecq.errors import NetfilterError
from ipsecq.netfilter.plan import Plan
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import Action, Direction
from ipsecq.policy.model import Policy
from ipsecq.sysctl import FamilyKnobs, Sysctl

PRIORITY: Final = -175
_SIDES: Final = ("policy_in_ipv4", "policy_in_ipv6", "policy_out_ipv4", "policy_out_ipv6")


def reqid_of(policy: Policy) -> int:
    """The reqid of the innermost SA that has one; 0 where the policy asks for none."""
    return next((transform.reqid for transform in policy.transforms if transform.reqid), 0)


def included(settings: NetfilterSettings) -> list[str]:
    """The operator's files in the order of their names; nft reads them, so it names file and line of a mistake."""
    return [f'  include "{file}"' for file in inner_files(settings)]


def inner_files(settings: NetfilterSettings) -> list[str]:
    """The operator's files in the order of their names.  NetfilterError for a FIFO or the like: nft would wait for it."""
    found = sorted(Path(settings.inner_dir).glob("*.nft")) if settings.inner_dir else []
    for path in found:
        if path.exists() and not path.is_file():
            raise NetfilterError(f"{path}: expected a regular file")
    return list(map(str, found))


class InnerTable:
    """What the kernel holds of the inner table; :meth:`whole` begins anew, :meth:`update` goes on."""

    def __init__(self, settings: NetfilterSettings) -> None:
        self.settings = settings
        self.name = f"{settings.table}_inner"
        self._plan: Plan | None = None
        self._reqids: set[int] = set()

    def whole(self, policies: Iterable[Policy], sysctl: Sysctl, rules: Iterable[str]) -> str:
        """The table as nft text that replaces the old one in one transaction.

        ``rules`` are the operator's: the contents of files, or :func:`included`.
        """
        name, device = self.name, self.settings.enc_device
        lines = [f"add table inet {name}", f"delete table inet {name}", f"table inet {name} {{"]
        lines += ["  chain inner { }", "  chain call { }"]
        if self.settings.reqid_mark:
            lines += [f"  chain {side} {{ }}" for side in _SIDES]
        lines += rules
        lines.append("  chain prerouting {")
        lines.append(f"    type filter hook prerouting priority {PRIORITY}; policy accept;")
        lines.append(f'    iifname != "{device}" accept')
        if self.settings.reqid_mark:
            # What another policy set before, or a rule of somebody else, is not this packet's SA.
            lines.append(f"    meta mark set {self._marked(0)}")
            lines.append("    meta nfproto ipv4 jump policy_in_ipv4")
            lines.append("    meta nfproto ipv6 jump policy_in_ipv6")
        lines += ["    jump call", "  }", "}"]
        self._plan, self._reqids = None, set()
        if self.settings.reqid_mark:
            self._plan = Plan(name, 1, verdict=lambda policy, *_: self._verdict(policy))
        return "\n".join([*lines, *self._commands(policies, sysctl)]) + "\n"

    def update(self, policies: Iterable[Policy], sysctl: Sysctl) -> list[str]:
        """Commands for what changed of policies and knobs.

        When the transaction that they are part of fails, this object no longer describes the kernel.
        """
        return list(self._commands(policies, sysctl))

    def _commands(self, policies: Iterable[Policy], sysctl: Sysctl) -> Iterator[str]:
        name = self.name
        if self._plan is not None:
            inbound = [policy for policy in policies if policy.direction is Direction.IN]
            fresh = {reqid for policy in inbound if (reqid := self._fitting(policy))} - self._reqids
            for reqid in sorted(fresh):
                yield f"add chain inet {name} reqid_{reqid}"
                yield f"add rule inet {name} reqid_{reqid} meta mark set {self._marked(reqid)}"
            self._reqids |= fresh
            yield from self._plan.update(inbound, sysctl)
        yield f"flush chain inet {name} call"
        families: tuple[tuple[str, FamilyKnobs], ...] = (("ipv4", sysctl.v4), ("ipv6", sysctl.v6))
        for family, knobs in families:
            if knobs.filtertunnel and sysctl.enc.in_filter_mask:
                yield f"add rule inet {name} call meta nfproto {family} jump inner"

    def _verdict(self, policy: Policy) -> str:
        reqid = self._fitting(policy)
        return f"goto reqid_{reqid}" if reqid else "return"

    def _fitting(self, policy: Policy) -> int:
        """The reqid, 0 where the mark has too few bits for it: a wrong SA would be worse than none."""
        if policy.action is not Action.IPSEC:
            return 0
        reqid, mask = reqid_of(policy), self.settings.reqid_mark
        return reqid if reqid <= mask // (mask & -mask) else 0

    def _marked(self, reqid: int) -> str:
        mask = self.settings.reqid_mark
        rest = f"meta mark & {0xFFFFFFFF ^ mask:#010x}"
        return f"{rest} | {reqid * (mask & -mask):#010x}" if reqid else rest
