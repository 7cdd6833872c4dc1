"""Tables without a daemon: for the pcap tool, fuzzers, benchmarks and tests.

Slots and counters are ordinary memory, sequence numbers come from the slot itself.  Nothing is kept on disk, so these
tables must never send with keys that a gateway uses.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from ipsecq.counters import COUNTERS_WORDS
from ipsecq.engine.tables import Random, Tables
from ipsecq.numbers import NATT_PORT
from ipsecq.policy.model import Policy
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation, Slot, slot_words
from ipsecq.sa.sad import Sad
from ipsecq.sysctl import Sysctl

LEASE = 64
"""Sequence numbers in one lease."""


def build(
    associations: Iterable[SecurityAssociation],
    policies: Iterable[Policy],
    random: Random,
    sysctl: Sysctl | None = None,
    *,
    unauthenticated: bool = False,
) -> Tables:
    """Tables that hold these SAs (their ``slot`` is assigned here) and policies.

    ``unauthenticated`` opens ESP whose authentication key is missing.  ESP in UDP is taken on every port that an SA names.
    """
    sas = list(associations)
    size = 0
    for sa in sas:
        sa.slot = size
        size += slot_words(sa.replay_window)
    words = memoryview(array("Q", bytes(8 * max(size, 1))))
    for sa in sas:
        words[sa.slot + Slot.LEASED] = 1
    counters = memoryview(array("Q", bytes(8 * COUNTERS_WORDS)))

    def lease(slot: int, limit: int) -> tuple[int, int]:
        first = words[slot + Slot.LEASED]
        end = min(first + LEASE, limit + 1)
        if first >= end:
            return 0, 0
        words[slot + Slot.LEASED] = min(end, (1 << 64) - 1)
        return first, end

    ports = frozenset((NATT_PORT, *(sa.natt.dport for sa in sas if sa.natt is not None)))
    return Tables(
        Sad(sas), Spd(policies), sysctl or Sysctl(), words, counters, lease, random, natt_ports=ports,
        unauthenticated=unauthenticated,
    )  # fmt: skip
