"""What one packet changes in its SA's slot, and the limits that it meets there (RFC 2367 section 3.1.3)."""

from __future__ import annotations

from typing import Final

from ipsecq.engine.emit import Emissions, Expired
from ipsecq.numbers import SaState
from ipsecq.sa.association import SecurityAssociation, Slot

_PACKETS: Final = int(Slot.PACKETS)
_BYTES: Final = int(Slot.BYTES)
_FIRST_USE: Final = int(Slot.FIRST_USE)
_LAST_USE: Final = int(Slot.LAST_USE)
_STATE: Final = int(Slot.STATE)
_NEVER: Final = float("inf")


class Account:
    """The lifetimes and counts of one SA, exact to the packet: the worker that serves the SA is the only writer.

    ``charge`` is called before a packet is sent (after it was authenticated, inbound), with its protected octets.
    """

    __slots__ = (
        "_base", "_hard_bytes", "_hard_packets", "_hard_time", "_hard_use", "_sa", "_soft_bytes", "_soft_packets", "_words",
    )  # fmt: skip

    def __init__(self, sa: SecurityAssociation, words: memoryview) -> None:
        self._sa = sa
        self._words = words
        self._base = sa.slot
        self._hard_packets = sa.hard.allocations or _NEVER
        self._hard_bytes = sa.hard.bytes or _NEVER
        self._hard_time = sa.created + sa.hard.addtime if sa.hard.addtime else _NEVER
        self._hard_use = sa.hard.usetime or _NEVER
        self._soft_packets = sa.soft.allocations or _NEVER
        self._soft_bytes = sa.soft.bytes or _NEVER

    def limits(self) -> tuple[float, float, float, float, float, float]:
        """Hard packets, octets; soft packets, octets; end in Unix seconds; seconds from the first use.  May be infinite."""
        return (
            self._hard_packets, self._hard_bytes, self._soft_packets, self._soft_bytes, self._hard_time, self._hard_use,
        )  # fmt: skip

    def allows(self, octets: int, count: int, now: float) -> bool:
        """Whether no hard limit stands in the way of ``count`` packets of together ``octets``; nothing is changed."""
        words, base = self._words, self._base
        first = words[base + _FIRST_USE]
        return (
            words[base + _PACKETS] + count <= self._hard_packets
            and words[base + _BYTES] + octets <= self._hard_bytes
            and now < self._hard_time
            and (not first or now - first < self._hard_use)
        )

    def charge(self, octets: int, now: float, emit: Emissions, count: int = 1) -> bool:
        """Count ``count`` packets of together ``octets``.  False: the SA is past a hard limit and must not carry them."""
        words, base = self._words, self._base
        packets = words[base + _PACKETS] + count
        total = words[base + _BYTES] + octets
        first = words[base + _FIRST_USE]
        if not first:
            first = words[base + _FIRST_USE] = int(now)
        if (
            packets > self._hard_packets
            or total > self._hard_bytes
            or now >= self._hard_time
            or now - first >= self._hard_use
        ):
            if words[base + _STATE] != SaState.DEAD:
                words[base + _STATE] = int(SaState.DEAD)
                sa = self._sa
                emit.events.append(Expired(sa.dst, int(sa.protocol), sa.spi, True))
            return False
        words[base + _PACKETS] = packets
        words[base + _BYTES] = total
        words[base + _LAST_USE] = int(now)
        if total >= self._soft_bytes or packets >= self._soft_packets:
            self._soft_bytes = self._soft_packets = _NEVER
            if words[base + _STATE] < SaState.DYING:
                words[base + _STATE] = int(SaState.DYING)
                sa = self._sa
                emit.events.append(Expired(sa.dst, int(sa.protocol), sa.spi, False))
        return True
