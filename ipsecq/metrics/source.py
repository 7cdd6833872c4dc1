"""What the collectors need from a running daemon, as plain data: metrics stay below the daemon that fills this in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ipsecq.counters import COUNTERS_WORDS
from ipsecq.sa.association import SecurityAssociation


@dataclass(slots=True, frozen=True)
class WorkerSample:
    """One worker at one moment.  ``counters`` are its COUNTERS_WORDS words; queue figures are the kernel's."""

    index: int
    up: bool
    restarts: int
    counters: Sequence[int]
    queue_length: int = 0
    queue_full_drops: int = 0
    """Packets that the kernel dropped because the queue was full."""
    socket_full_drops: int = 0
    """Packets that the kernel dropped because the socket buffer was full."""


@dataclass(slots=True, frozen=True)
class SaSample:
    """One SA and the header words of its slot (:class:`ipsecq.sa.association.Slot`); ``direction`` is in, out or ""."""

    sa: SecurityAssociation
    words: Sequence[int]
    direction: str = ""
    refused: bool = False


@dataclass(slots=True, frozen=True)
class Snapshot:
    """Everything that one scrape shows."""

    workers: Sequence[WorkerSample] = ()
    sas: Sequence[SaSample] = ()
    """The first ``sa_limit`` of them."""
    sa_count: int = 0
    policies: dict[str, int] = field(default_factory=dict)
    """Number of policies by direction."""
    reloads: int = 0
    reload_failures: int = 0
    reload_success: bool = True
    reload_time: float = 0.0
    """Unix time of the last reload that succeeded, or of the start."""
    started: float = 0.0
    ruleset_repairs: int = 0
    fail_open: int = 0
    """Policies (or, with queue_bypass, all) that let packets pass in clear when nobody serves them."""
    mechanism: str = ""

    def counters(self) -> list[int]:
        """The workers' words, summed."""
        total = [0] * COUNTERS_WORDS
        for worker in self.workers:
            total = [before + more for before, more in zip(total, worker.counters, strict=True)]
        return total


class Source(Protocol):
    """Who answers scrapes."""

    def snapshot(self) -> Snapshot:
        """Called from the scraper's thread, at any time."""
