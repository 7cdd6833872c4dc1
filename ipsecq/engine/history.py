"""What was really done to an inbound packet, held against what its policy wants (ipsec(4): check_policy_history)."""

from __future__ import annotations

from typing import NamedTuple

from ipsecq.counters import Counter
from ipsecq.numbers import Action, Mode
from ipsecq.policy.levels import enforced_inbound
from ipsecq.policy.model import Policy, Transform
from ipsecq.sysctl import FamilyKnobs


class Applied(NamedTuple):
    """One entry of a packet's history: an SA that opened it, and in which mode that was."""

    protocol: int
    """:class:`ipsecq.numbers.Protocol` as a plain number: histories are hashed for each packet."""
    mode: int
    src: bytes
    dst: bytes
    reqid: int
    spi: int


History = tuple[Applied, ...]
"""Outermost first, in the order in which the packet was opened."""


def check(policy: Policy | None, history: History, knobs: FamilyKnobs, src: bytes, dst: bytes) -> int:
    """0 when a packet with this history may enter under ``policy``, else the Counter of the drop.

    ``policy`` is what the inbound SPD says about the innermost packet (None: nothing, and ``def_policy`` decides), and
    ``knobs`` are those of that packet's family, ``src`` and ``dst`` its addresses.  A policy's transforms are written
    innermost first, a history is outermost first.

    * Without ``check_policy_history``, every required protocol must have been applied (``unique``: by an SA with that
      reqid), wherever in the packet: so AH around a tunnel counts, as the manual's BUGS section wishes.
    * With it, each required transform must have an entry of the same protocol, mode, reqid and SA addresses, in order.
      A transform without ends means those of what it protects: the packet's own, or the tunnel's inside it.
    """
    if policy is None:
        return 0 if knobs.def_policy else int(Counter.IN_DISCARD)
    if policy.action is Action.DISCARD:
        return int(Counter.IN_DISCARD)
    if policy.action is not Action.IPSEC:
        return 0
    strict = knobs.check_policy_history != 0
    at = 0
    for transform, near, far in reversed(with_ends(policy, src, dst)):
        if not enforced_inbound(transform, knobs):
            continue
        found = -1
        for index in range(at if strict else 0, len(history)):
            entry = history[index]
            if entry.protocol != transform.protocol or (transform.reqid and entry.reqid != transform.reqid):
                continue
            if strict and (
                (transform.mode is not Mode.ANY and entry.mode != transform.mode)
                or entry.src != near
                or entry.dst != far
            ):
                continue
            found = index
            break
        if found < 0:
            return int(Counter.IN_HISTORY if strict and history else Counter.IN_POLVIO)
        at = found + 1
    return 0


def with_ends(policy: Policy, src: bytes, dst: bytes) -> list[tuple[Transform, bytes, bytes]]:
    """The transforms of ``policy``, innermost first, each with the ends of its SA for a packet ``src`` to ``dst``."""
    found = []
    for transform in policy.transforms:
        near, far = transform.src or src, transform.dst or dst
        found.append((transform, near, far))
        if transform.mode is Mode.TUNNEL:
            src, dst = near, far
    return found
