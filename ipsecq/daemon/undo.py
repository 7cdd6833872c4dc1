"""What a reload changed, so that a reload that fails half-way can take back that and nothing else.

Going back to the files as they were last read would not do: SAs and policies have come and gone since, over PF_KEY and
through ``ipsecq setkey``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ipsecq.policy.model import Policy
from ipsecq.sa.association import SaKey, SecurityAssociation


@dataclass(slots=True)
class Undo:
    """Filled by :func:`ipsecq.daemon.takeover.take_over` as it goes, taken back by ``take_back``."""

    sas: dict[SaKey, tuple[SecurityAssociation | None, SecurityAssociation | None]] = field(default_factory=dict)
    """What was there, and what is there now in its place (None: nothing)."""
    before: list[Policy] = field(default_factory=list)
    after: list[Policy] | None = None
    """The SPD before and after; None when it was not reached."""
    knobs: dict[str, int] = field(default_factory=dict)
    """Old values."""

    def policies(self, now: list[Policy]) -> list[Policy]:
        """The SPD to go back to, when it is ``now``: as it was before, but for what others did since."""
        after = {policy.id for policy in self.after or ()}
        there = {policy.id for policy in now}
        before = [policy for policy in self.before if policy.id in there or policy.id not in after]
        return before + [policy for policy in now if policy.id not in after]
