"""What the collectors need from a running daemon, as plain data: metrics stay below the daemon that fills this in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ipsecq.counters import COUNTERS_WORDS, Counter
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
    pid: int = 0
    queue: int = 0
    """Number of its first NFQUEUE.  It has more (lanes, and one for super-packets), whose figures are added."""

    @property
    def lost(self) -> dict[str, int]:
        """Packets that it did not see whole, by kind: what each means is in :data:`ipsecq.metrics.live.KERNEL_DROPS`."""
        return {
            "queue_full": self.queue_full_drops,
            "socket_full": self.socket_full_drops,
            "ring_full": self.counters[Counter.RING_DROPPED],
            "truncated": self.counters[Counter.QUEUE_TRUNCATED],
        }


@dataclass(slots=True, frozen=True)
class SaSample:
    """One SA and the header words of its slot (:class:`ipsecq.sa.association.Slot`); ``direction`` is in, out or ""."""

    sa: SecurityAssociation
    words: Sequence[int]
    direction: str = ""
    refused: bool = False
    successor: bool = False
    """A younger SA of the same kind (protocol, mode, ends, reqid) is there to take over."""
    problem: str = ""
    """Why it refuses to send, for people."""


@dataclass(slots=True, frozen=True)
class PeerSample:
    """One peer and direction: the sums over all its SAs, those that are gone included.  Counters never go back."""

    peer: str
    """Its address; ``other`` for all beyond the limit."""
    direction: str
    packets: int
    bytes: int
    auth_failures: int
    replays: int
    drops: int
    sas: int
    """SAs that count for it now."""
    last_use: float
    """Unix time, 0 before the first packet."""


@dataclass(slots=True, frozen=True)
class TunnelSample:
    """A pair of tunnel ends that policies name."""

    local: str
    peer: str
    up: bool
    """Every SA that the policies require is there, in both directions, and may be used."""
    missing: str = ""
    """What is not there, for people."""
    networks: tuple[tuple[str, str], ...] = ()
    """(behind us, behind the peer), by the outbound policies' selectors."""
    fail_open: bool = False


@dataclass(slots=True, frozen=True)
class InterfaceSample:
    """A route-based tunnel."""

    name: str
    local: str
    remote: str
    reqid: int
    mtu: int
    up: bool
    problem: str = ""
    """Which of its SAs is missing, for people."""
    received: tuple[int, int, int] = (0, 0, 0)
    """Packets, octets and drops by the device's own counters; a super-packet is one."""
    sent: tuple[int, int, int] = (0, 0, 0)


@dataclass(slots=True, frozen=True)
class OffloadSample:
    """What makes packets cheaper, where the kernel grants it (:class:`ipsecq.counters.Offload`)."""

    name: str
    workers: tuple[int, ...]
    """Those that have it in use."""
    active: bool
    """All workers that are up have."""
    why: str = ""
    """Why not, for people."""


@dataclass(slots=True, frozen=True)
class Snapshot:
    """Everything that one scrape shows."""

    workers: Sequence[WorkerSample] = ()
    sas: Sequence[SaSample] = ()
    """The first ``sa_limit`` of them."""
    sa_states: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """Number of SAs by (protocol, direction, state), all of them."""
    peers: Sequence[PeerSample] = ()
    tunnels: Sequence[TunnelSample] = ()
    tunnel_count: int = 0
    """All of them; ``tunnels`` are the first ``peer_limit``."""
    policies: dict[str, int] = field(default_factory=dict)
    """Number of policies by direction."""
    time: float = 0.0
    """Unix time at which the snapshot was taken."""
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
    devices: Sequence[str] = ()
    """Devices with an egress chain of ours."""
    kernel: dict[int, int] = field(default_factory=dict)
    """What the kernel's rules dropped or took without a worker, by :class:`ipsecq.counters.Counter`."""
    socket_pairs: int = 0
    """Different pairs of policies that sockets have."""
    socket_count: int = 0
    """Sockets that asked for one and live."""
    interfaces: Sequence[InterfaceSample] = ()
    offloads: Sequence[OffloadSample] = ()

    @property
    def sa_count(self) -> int:
        """SAs in the SAD."""
        return sum(self.sa_states.values())

    def counters(self) -> list[int]:
        """The workers' words, summed, and the kernel's counts."""
        total = [0] * COUNTERS_WORDS
        for worker in self.workers:
            total = [before + more for before, more in zip(total, worker.counters, strict=True)]
        for counter, packets in self.kernel.items():
            total[counter] += packets
        return total


class Source(Protocol):
    """Who answers scrapes."""

    def snapshot(self) -> Snapshot:
        """Called from the scraper's thread, at any time."""
