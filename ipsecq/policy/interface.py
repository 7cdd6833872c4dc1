"""Route-based tunnels: an interface is an SPD of its own with one policy a family, for whatever is routed into it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Selector, Transform

MAX_REQID: Final = 0x0FFFFFFF
"""So that :meth:`Interface.policy` has room for its ids."""

POLICY_ID: Final = 0x20000000
"""Ids of interfaces' policies begin here and end at 0x3fffffff; the SPD counts from 1, sockets have the upper half."""


@dataclass(frozen=True)
class Interface:
    """One ``ipsecN``: its device, the ends of its SAs (packed addresses of one family), and their reqid."""

    name: str
    local: bytes
    remote: bytes
    reqid: int
    mtu: int

    def policy(self, family: int) -> Policy:
        """What holds for packets of IP version ``family`` that are routed into it: all are sealed, by SAs of its reqid."""
        return self._policies[family]

    def policies(self) -> list[Policy]:
        """Those of both families."""
        return list(self._policies.values())

    @cached_property
    def _policies(self) -> dict[int, Policy]:
        transform = Transform(Protocol.ESP, Mode.TUNNEL, self.local, self.remote, Level.UNIQUE, self.reqid)
        made = {}
        for family, octets in ((4, 4), (6, 16)):
            first, last = bytes(octets), b"\xff" * octets
            made[family] = Policy(
                Direction.OUT, Selector(first, last, first, last), Action.IPSEC, (transform,),
                id=POLICY_ID | self.reqid << 1 | (family == 6), label=self.name,
            )  # fmt: skip
        return made

    def owns(self, protocol: int, mode: int, src: bytes, dst: bytes) -> bool:
        """True when an inbound SA with its reqid is its own: ESP in tunnel mode from the far end to ours."""
        return protocol == Protocol.ESP and mode == Mode.TUNNEL and src == self.remote and dst == self.local
