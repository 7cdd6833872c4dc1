"""What the PF_KEY server asks of whoever owns SAD and SPD: in the gateway the daemon, in tests the databases alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol as Interface

from ipsecq.numbers import Direction
from ipsecq.policy.model import Policy, Selector
from ipsecq.sa.association import SaKey, SecurityAssociation


@dataclass(slots=True, frozen=True)
class Usage:
    """What an SA has done so far: packets, octets, first use (Unix seconds, 0: none), last sequence number."""

    packets: int = 0
    octets: int = 0
    first_use: int = 0
    sequence: int = 0


class SecurityDatabase(Interface):
    """SAD and SPD with the errors of PF_KEY.

    SadError, SpdError and AlgorithmError may be raised by every change, and then nothing has changed.  When a change
    returns, later messages see it; whether workers have it is the business of ``barrier`` of
    :class:`ipsecq.pfkey.socket_server.PfkeySocketServer`, which holds replies back until they have.
    """

    def find_sa(self, key: SaKey) -> SecurityAssociation | None:
        """The SA in whatever state, larval ones included."""
        ...

    def add_sa(self, sa: SecurityAssociation, *, negotiated: bool = False) -> None:
        """Add; SadError EEXIST when (destination, protocol, SPI) is taken, by a larval SA too.

        ``negotiated``: a key management daemon asks for it, so its keys are fresh; an operator's may be old.
        """
        ...

    def update_sa(self, sa: SecurityAssociation, *, negotiated: bool = False) -> None:
        """Put ``sa`` in the place of the one with the same key (larval or in use); SadError ESRCH without one."""
        ...

    def delete_sa(self, key: SaKey) -> SecurityAssociation:
        """Remove and return; SadError ESRCH when there is none."""
        ...

    def flush_sas(self, protocol: int | None) -> Sequence[SecurityAssociation]:
        """Remove all SAs (of one protocol); return them."""
        ...

    def sas(self, protocol: int | None) -> Sequence[SecurityAssociation]:
        """All SAs (of one protocol): a snapshot that later changes don't disturb."""
        ...

    def usage(self, sa: SecurityAssociation) -> Usage:
        """Counters of an SA, also of one that has just been removed."""
        ...

    def add_policy(self, policy: Policy) -> Policy:
        """Add and return as stored, with its id; SpdError EEXIST for the same direction and selector."""
        ...

    def update_policy(self, policy: Policy) -> Policy:
        """Replace the policy with the same direction and selector, or add; return as stored."""
        ...

    def delete_policy(self, policy_id: int) -> Policy:
        """Remove and return; SpdError ENOENT."""
        ...

    def find_policy(self, direction: Direction, selector: Selector) -> Policy | None:
        """The policy with exactly this direction and selector."""
        ...

    def get_policy(self, policy_id: int) -> Policy:
        """By id; SpdError ENOENT."""
        ...

    def flush_policies(self) -> Sequence[Policy]:
        """Remove all policies; return them."""
        ...

    def policies(self) -> Sequence[Policy]:
        """All policies: a snapshot."""
        ...

    def acquire_failed(self, protocol: int, src: bytes, dst: bytes, reqid: int) -> None:
        """Key management gave up: the packets that wait for an SA of this kind can be dropped."""
        ...
