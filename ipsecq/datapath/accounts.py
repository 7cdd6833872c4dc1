"""What the engine's batches cost, and which packets made it raise: the same for queues, rings and devices."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import MutableSequence
from typing import Final

from ipsecq.counters import HISTOGRAM_BASE, HISTOGRAM_BOUNDS, HISTOGRAM_SUM_NS, Counter

log: Final = logging.getLogger(__name__)

LOG_INTERVAL: Final = 10.0
"""Seconds between two log lines about an engine's exception; the counter counts all of them."""

_BOUNDS_NS: Final = [round(bound * 1e9) for bound in HISTOGRAM_BOUNDS]


def account(counters: MutableSequence[int], start: int, count: int) -> None:
    """How long a batch of ``count`` packets took since ``start`` (:func:`time.perf_counter_ns`), and each of them."""
    elapsed = time.perf_counter_ns() - start
    counters[Counter.BATCHES] += 1
    counters[Counter.BUSY_NS] += elapsed
    counters[HISTOGRAM_BASE + bisect_left(_BOUNDS_NS, elapsed // count)] += count
    counters[HISTOGRAM_SUM_NS] += elapsed


class Refusals:
    """Packets that made the engine raise: a bug of ours must not stop the gateway, nor let one of them pass."""

    def __init__(self, counters: MutableSequence[int]) -> None:
        self._counters = counters
        self._next_log = 0.0

    def count(self, counter: Counter, now: float, what: str) -> None:
        """To be called where the exception is handled; ``what`` says which packet, for people."""
        self._counters[counter] += 1
        if now >= self._next_log:
            self._next_log = now + LOG_INTERVAL
            log.exception("%s made the engine fail; it was dropped (%s)", what, counter.name)
