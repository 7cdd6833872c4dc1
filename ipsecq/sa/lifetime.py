"""Lifetimes of an SA: when it gets old (soft limit: DYING) and when it must not be used any more (hard limit: DEAD).

RFC 2367 section 3.1.3 and RFC 4301 section 4.4.2.1.  All four limits count: allocations (packets), bytes, seconds from
creation, seconds from first use.  On top of them, an SA with 32-bit sequence numbers gets old at 80 % of the
number space, as in FreeBSD, so that key management replaces it before it stops.
"""

from __future__ import annotations

from typing import Final

from ipsecq.numbers import Protocol, SaState
from ipsecq.sa.association import Lifetime, SecurityAssociation, Slot
from ipsecq.sa.sequence import LIMIT_32

SOFT_SEQUENCE: Final = LIMIT_32 * 80 // 100
"""A 32-bit sequence number beyond which the SA is DYING."""

_PACKETS: Final = int(Slot.PACKETS)
_BYTES: Final = int(Slot.BYTES)
_FIRST_USE: Final = int(Slot.FIRST_USE)
_SEQUENCE: Final = int(Slot.SEQUENCE)
_STATE: Final = int(Slot.STATE)


def judge(sa: SecurityAssociation, words: memoryview, now: float) -> SaState:
    """Return the state that ``sa`` should have at ``now`` (Unix seconds), by its slot in ``words`` (format ``Q``).

    Nothing is changed.  LARVAL and DEAD stay as they are, and an SA never gets younger, nor younger than the worker
    that met a limit says (``Slot.STATE``: a packet that would pass the byte limit is not counted).  A handful of
    comparisons: meant to be called once a batch, not once a packet.
    """
    state = sa.state
    if state is SaState.LARVAL or state is SaState.DEAD:
        return state
    base = sa.slot
    seen = words[base + _STATE]
    if seen == SaState.DEAD:
        return SaState.DEAD
    packets, octets, first_use = words[base + _PACKETS], words[base + _BYTES], words[base + _FIRST_USE]
    if _reached(sa.hard, sa.created, packets, octets, first_use, now):
        return SaState.DEAD
    sequence = words[base + _SEQUENCE]
    numbered = not sa.esn and sa.protocol is not Protocol.IPCOMP
    if (
        state is SaState.DYING
        or seen == SaState.DYING
        or _reached(sa.soft, sa.created, packets, octets, first_use, now)
        or (numbered and sequence > SOFT_SEQUENCE)
    ):
        return SaState.DYING
    return SaState.MATURE


def _reached(limit: Lifetime, created: float, packets: int, octets: int, first_use: int, now: float) -> bool:
    return bool(
        (limit.bytes and octets >= limit.bytes)
        or (limit.allocations and packets >= limit.allocations)
        or (limit.addtime and now - created >= limit.addtime)
        or (limit.usetime and first_use and now - first_use >= limit.usetime)
    )
