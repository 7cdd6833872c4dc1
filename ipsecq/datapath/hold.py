"""Packets that wait for an SA: a few for each ACQUIRE, for a short while.

RFC 4301 section 4.4.1 leaves open what becomes of a packet whose SA does not exist yet; keeping the first few saves a
TCP connection its first retransmission (a second).  Everything is bounded, so a flood costs no memory.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

MAX_PER_KEY: Final = 4
MAX_TOTAL: Final = 256
MAX_OCTETS: Final = 4 << 20
TIMEOUT: Final = 30.0
"""Seconds: as long as a larval SA lives."""


class Holder:
    """Keeps copies of packets by key.  The newest are kept, as ARP queues do: an old SYN has been repeated since.

    ``waiting`` is the number of packets held, ``dropped`` of those that had to go.
    """

    def __init__(
        self,
        max_packets_per_key: int = MAX_PER_KEY,
        max_total: int = MAX_TOTAL,
        timeout: float = TIMEOUT,
        max_octets: int = MAX_OCTETS,
    ) -> None:
        self._per_key, self._total, self._timeout = max_packets_per_key, max_total, timeout
        self._max_octets = max_octets
        self._octets = 0
        self.waiting = 0
        self.dropped = 0
        # Insertion order is the order of first packets, so the oldest key comes first.
        self._packets: dict[Hashable, list[tuple[float, bytes, int]]] = {}

    def hold(self, key: Hashable, packet: bytes, now: float, mark: int = 0) -> int:
        """Keep a packet, with its socket's mark; returns how many others, or itself, were dropped for want of room."""
        before = self.dropped
        if self._per_key <= 0 or self._total <= 0 or len(packet) > self._max_octets:
            self.dropped += 1
            return 1
        kept = self._packets.setdefault(key, [])
        kept.append((now, packet, mark))
        self.waiting += 1
        self._octets += len(packet)
        if len(kept) > self._per_key:
            self._drop_first(key)
        while self.waiting > self._total or self._octets > self._max_octets:
            self._drop_first(next(iter(self._packets)))
        return self.dropped - before

    def held(self) -> list[Hashable]:
        """What packets wait for, oldest first."""
        return list(self._packets)

    def release(self, key: Hashable) -> list[bytes]:
        """Give back the packets of a key, oldest first, and forget them."""
        kept = self._packets.pop(key, [])
        self.waiting -= len(kept)
        self._octets -= sum(len(packet) for _, packet, _ in kept)
        return [packet for _, packet, _ in kept]

    def release_all(self) -> list[tuple[float, bytes, int]]:
        """Give back every packet as (time of its arrival, packet, mark), in the order of arrival, and forget them."""
        packets = [entry for kept in self._packets.values() for entry in kept]
        packets.sort(key=lambda entry: entry[0])
        self._packets.clear()
        self.waiting = self._octets = 0
        return packets

    def expire(self, now: float) -> int:
        """Drop packets older than the timeout; returns how many."""
        before = self.dropped
        for key in list(self._packets):
            while (kept := self._packets.get(key)) and now - kept[0][0] >= self._timeout:
                self._drop_first(key)
        return self.dropped - before

    def _drop_first(self, key: Hashable) -> None:
        kept = self._packets[key]
        self._octets -= len(kept.pop(0)[1])
        self.waiting -= 1
        self.dropped += 1
        if not kept:
            del self._packets[key]
