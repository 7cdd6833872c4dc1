"""What the running daemon shows of itself: samples for metrics, and the answer of ``ipsecq status``."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter as Counts
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import ipsecq
from ipsecq.counters import COUNTERS_WORDS, HISTOGRAM_BASE, Counter
from ipsecq.daemon.authority import Authority
from ipsecq.daemon.interfaces import show as show_interface
from ipsecq.daemon.pool import WorkerPool
from ipsecq.daemon.sockets import SocketPolicies
from ipsecq.daemon.tunnels import Tunnels
from ipsecq.datapath.queue import QueueStats, queue_table
from ipsecq.errors import NetfilterError
from ipsecq.metrics import live
from ipsecq.metrics.source import InterfaceSample, OffloadSample, PeerSample, SaSample, Snapshot, TunnelSample, WorkerSample
from ipsecq.netfilter.links import is_local
from ipsecq.netfilter.load import Loader
from ipsecq.numbers import Direction, Mode, Protocol, SaState
from ipsecq.packet.address import text as _text
from ipsecq.policy.model import Policy
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.setkey import printer

SHOWN: Final = 10_000
"""SAs and policies in one status answer, unless more are asked for."""
LOCAL_SECONDS: Final = 10.0
"""How long the kernel's word whether an address is ours is believed."""
KERNEL_COUNTERS: Final = {
    "in_clear_dropped": Counter.IN_POLVIO,
    "in_discard_dropped": Counter.IN_DISCARD,
    "in_default_dropped": Counter.IN_DISCARD,
    "out_discard_dropped": Counter.OUT_DISCARD,
    "out_default_dropped": Counter.OUT_DISCARD,
    "out_unguarded_dropped": Counter.OUT_POLVIO,
    "natt_keepalives": Counter.NATT_KEEPALIVE,
}
"""Counters of our nftables table, and what the same is called when a worker does it."""

OTHER: Final = "other"
"""Stands for the peers beyond the limit."""

T = TypeVar("T")
_PROTOCOL_NAMES: Final = {int(protocol): protocol.name.lower() for protocol in Protocol}
_STATE_NAMES: Final = {int(state): state.name.lower() for state in SaState}
_NO_WORDS: Final = [0] * int(Slot.WINDOW)


@dataclass(slots=True)
class History:
    """What the supervisor counts itself."""

    started: float = field(default_factory=time.time)
    reloads: int = 0
    reload_failures: int = 0
    reloads_done: int = 0
    """Reloads that came to an end, either way."""
    reload_error: str = ""
    """Why the last one was refused."""
    reload_success: bool = True
    reload_time: float = field(default_factory=time.time)
    ruleset_repairs: int = 0


class Sampler:
    """Reads authority, pool and shared counters; safe to call from the metrics server's threads (it only reads)."""

    def __init__(
        self, authority: Authority, pool: WorkerPool, loader: Loader, history: History, *,
        sa_limit: int, peer_limit: int, bypass: bool,
        interfaces: Callable[[], list[InterfaceSample]] = list,
        offloads: Callable[[Sequence[WorkerSample]], Sequence[OffloadSample]] = lambda workers: (),
        notices: Callable[[], list[str]] = list,
    ) -> None:  # fmt: skip
        self._authority, self._pool, self._loader, self._history = authority, pool, loader, history
        self._sa_limit, self._peer_limit, self._bypass = sa_limit, peer_limit, bypass
        self._tunnels = Tunnels(authority)
        self._kernel: dict[str, tuple[int, int]] = {}
        """Name of a counter of our table → (what went with tables before this one, what it said last)."""
        self._kernel_lock = threading.Lock()
        self.sockets: SocketPolicies | None = None
        """Set when it is there."""
        self._interfaces, self._offloads, self._notices = interfaces, offloads, notices
        self._local: dict[bytes, tuple[float, bool]] = {}

    def snapshot(self, sa_limit: int = -1) -> Snapshot:
        """See :class:`ipsecq.metrics.source.Source`; ``sa_limit`` in the place of the configured one."""
        limit = self._sa_limit if sa_limit < 0 else sa_limit
        sas = _patiently(self._authority.sad.dump)
        policies = self.policies()
        history = self._history
        shown, youngest, states = [], _youngest(sas), Counts[tuple[str, str, str]]()
        for number, sa in enumerate(sas):
            direction = self.direction(sa)
            states[_PROTOCOL_NAMES[sa.protocol], direction, _STATE_NAMES[sa.state]] += 1
            if number < limit:
                shown.append(self._sample(sa, direction, youngest))
        pairs, sockets = self.sockets.counts() if self.sockets is not None else (0, 0)
        tunnels, workers = self.tunnels(), self.workers()
        return Snapshot(
            workers=workers,
            offloads=self._offloads(workers),
            sas=shown,
            sa_states=dict(states),
            peers=self.peers(),
            tunnels=tunnels[: self._peer_limit],
            tunnel_count=len(tunnels),
            interfaces=_patiently(self._interfaces),
            policies={
                "in": sum(policy.direction is Direction.IN for policy in policies),
                "out": sum(policy.direction is Direction.OUT for policy in policies),
            },
            time=time.time(),
            reloads=history.reloads,
            reload_failures=history.reload_failures,
            reload_success=history.reload_success,
            reload_time=history.reload_time,
            started=history.started,
            ruleset_repairs=history.ruleset_repairs,
            fail_open=self.fail_open(policies),
            mechanism=self._loader.mechanism or "",
            devices=sorted(dict(self._loader.guarded).values()),
            kernel=self.kernel(),
            socket_pairs=pairs,
            socket_count=sockets,
        )

    def policies(self) -> list[Policy]:
        """The SPD."""
        return _patiently(self._authority.spd.dump)

    def tunnels(self) -> list[TunnelSample]:
        """All tunnels."""
        return _patiently(lambda: self._tunnels.samples(self.policies()))

    def fail_open(self, policies: Sequence[Policy]) -> int:
        """Number of policies that let packets pass in clear when nobody serves them."""
        return len(policies) if self._bypass else sum(policy.fail_open for policy in policies)

    def counters(self) -> list[int]:
        """All workers' counters, summed, and the kernel's."""
        total = [0] * COUNTERS_WORDS
        for worker in self._pool.workers:
            total = [before + more for before, more in zip(total, worker.counters, strict=True)]
        for counter, packets in self.kernel().items():
            total[counter] += packets
        return total

    def kernel(self) -> dict[int, int]:
        """What our rules dropped or took without a worker, by Counter; never goes back, whatever becomes of our table."""
        # The loop and the threads of /metrics ask: an older answer after a newer one would look like a new table.
        with self._kernel_lock, contextlib.suppress(OSError, NetfilterError):
            for name, (packets, _) in self._loader.counters().items():
                before, last = self._kernel.get(name, (0, 0))
                self._kernel[name] = (before + last if packets < last else before), packets
        found = Counts[int]()
        for name, (before, last) in list(self._kernel.items()):
            if name in KERNEL_COUNTERS:
                found[int(KERNEL_COUNTERS[name])] += before + last
        return dict(found)

    def peers(self) -> list[PeerSample]:
        """Totals by peer and direction, in the order in which they came."""
        found: dict[tuple[str, str], PeerSample] = {}
        for pair in self._authority.ledger.totals():
            if not pair.src:
                name, direction = OTHER, ""
            else:
                direction = self._direction(pair.src, pair.dst)
                name = _text(pair.dst if direction == "out" else pair.src)
            known = found.get((name, direction))
            counts, sas, last_use = pair.counts, pair.sas, pair.last_use
            if known is not None:  # several addresses of ours talk to it
                before = known.packets, known.bytes, known.auth_failures, known.replays, known.drops
                packets, octets, bad, replays, drops = map(sum, zip(counts, before, strict=True))
                counts = packets, octets, bad, replays, drops
                sas, last_use = sas + known.sas, max(last_use, int(known.last_use))
            found[name, direction] = PeerSample(name, direction, *counts, sas, last_use)
        return list(found.values())

    def status(self, *, limit: int = SHOWN, offset: int = 0) -> dict[str, Any]:
        """The answer of the control command ``status``.  No key is in it."""
        sas, policies = self._authority.sad.dump(), self._authority.spd.dump()
        history, total = self._history, self.counters()
        fail_open = ["queue_bypass is on: every policy"] if self._bypass else []
        fail_open += [printer.config_policy(policy) for policy in policies if policy.fail_open]
        workers = self.workers()
        return {
            "version": ipsecq.__version__,
            "uptime": time.time() - history.started,
            "mechanism": self._loader.mechanism or "",
            "devices": sorted(self._loader.guarded.values()),
            "fail_open": fail_open,
            "state": self._notices(),
            "reload": {"success": history.reload_success, "time": history.reload_time, "count": history.reloads},
            "workers": [_show_worker(sample) for sample in workers],
            "offloads": [live.offload(sample) for sample in self._offloads(workers)],
            "interfaces": self.interfaces(),
            "sa_count": len(sas),
            "sas": [self._show_sa(sa) for sa in sas[offset : offset + limit]],
            "policy_count": len(policies),
            "policies": [_show_policy(policy) for policy in policies[offset : offset + limit]],
            "sockets": self.sockets.show() if self.sockets is not None else [],
            "counters": {
                counter.name.lower(): total[counter] for counter in Counter if total[counter] and counter < HISTOGRAM_BASE
            },
        }

    def interfaces(self) -> list[dict[str, Any]]:
        """The route-based tunnels."""
        return [show_interface(sample) for sample in self._interfaces()]

    def workers(self) -> list[WorkerSample]:
        """All workers, with the kernel's figures of their queues."""
        queues, unbound = queue_table(), QueueStats(0, 0, 0, 0)
        samples = []
        for worker in self._pool.workers:
            mine = [queues.get(number, unbound) for number in worker.queues]
            samples.append(
                WorkerSample(
                    worker.index, worker.ready, worker.restarts, worker.counters.tolist(),
                    sum(queue.waiting for queue in mine), sum(queue.dropped for queue in mine),
                    sum(queue.user_dropped for queue in mine), worker.pid, worker.queues[0],
                )
            )  # fmt: skip
        return samples

    def _sample(
        self, sa: SecurityAssociation, direction: str, youngest: dict[tuple[object, ...], float] | None = None
    ) -> SaSample:
        words = self._authority.usage_words(sa)
        shown = words.tolist() if words is not None else _NO_WORDS
        problem = self._authority.problems.get(sa.key, "")
        successor = youngest is not None and youngest.get(_kind(sa), 0.0) > sa.created
        return SaSample(sa, shown, direction, bool(problem), successor, problem)

    def _show_sa(self, sa: SecurityAssociation) -> dict[str, Any]:
        sample = self._sample(sa, self.direction(sa))
        words = sample.words
        return {
            "spi": f"0x{sa.spi:08x}",
            "protocol": Protocol(sa.protocol).name.lower(),
            "mode": Mode(sa.mode).name.lower(),
            "src": _text(sa.src),
            "dst": _text(sa.dst),
            "direction": sample.direction,
            "reqid": sa.reqid,
            "state": SaState(sa.state).name.lower(),
            "encryption": sa.encryption,
            "authentication": sa.authentication,
            "compression": sa.compression,
            "replay_window": sa.replay_window,
            "esn": sa.esn,
            "natt": None if sa.natt is None else [sa.natt.sport, sa.natt.dport],
            "packets": words[Slot.PACKETS],
            "bytes": words[Slot.BYTES],
            "sequence": words[Slot.SEQUENCE],
            "first_use": words[Slot.FIRST_USE],
            "last_use": words[Slot.LAST_USE],
            "icv_failures": words[Slot.BADAUTH],
            "replays": words[Slot.REPLAY],
            "drops": words[Slot.DROPS],
            "created": sa.created,
            "from": sa.label,
            "problem": sample.problem,
        }

    def direction(self, sa: SecurityAssociation) -> str:
        """``in`` or ``out``."""
        return self._direction(sa.src, sa.dst)

    def _direction(self, src: bytes, dst: bytes) -> str:
        """Which end is ours; the kernel is asked about the peer's only when it said no about the other."""
        known = self._local.get(dst)
        if known is not None and known[1] and src not in self._local and time.monotonic() - known[0] < LOCAL_SECONDS:
            return "in"
        return "out" if self.is_local(src) else "in"

    def is_local(self, address: bytes) -> bool:
        """True when ``address`` is ours: asked of the kernel, and remembered for a while."""
        now = time.monotonic()
        known = self._local.get(address)
        if known is not None and now - known[0] < LOCAL_SECONDS:
            return known[1]
        local = is_local(address)
        if len(self._local) > SHOWN:
            self._local.clear()
        self._local[address] = now, local
        return local


def _kind(sa: SecurityAssociation) -> tuple[object, ...]:
    """SAs of one kind replace each other."""
    return sa.protocol, sa.mode, sa.src, sa.dst, sa.reqid


def _youngest(sas: Iterable[SecurityAssociation]) -> dict[tuple[object, ...], float]:
    """By kind: when the youngest one that may be used was made."""
    found: dict[tuple[object, ...], float] = {}
    for sa in sas:
        if sa.state is SaState.MATURE:
            kind = _kind(sa)
            found[kind] = max(found.get(kind, 0.0), sa.created)
    return found


def _patiently(read: Callable[[], T]) -> T:
    """What ``read`` returns; again, when the event loop changed a dictionary under it."""
    while True:
        try:
            return read()
        except RuntimeError:
            continue


def _show_worker(sample: WorkerSample) -> dict[str, Any]:
    return {
        "index": sample.index,
        "pid": sample.pid,
        "up": sample.up,
        "restarts": sample.restarts,
        "queue": sample.queue,
        "queue_length": sample.queue_length,
        "kernel_drops": sum(sample.lost.values()),
        "packets_in": sample.counters[Counter.IN_PACKETS],
        "packets_out": sample.counters[Counter.OUT_PACKETS],
        "busy_seconds": sample.counters[Counter.BUSY_NS] / 1e9,
    }


def _show_policy(policy: Policy) -> dict[str, Any]:
    return {
        "id": policy.id,
        "direction": policy.direction.name.lower(),
        "action": policy.action.name.lower(),
        "priority": policy.priority,
        "policy": printer.config_policy(policy),
        "fail_open": policy.fail_open,
        "from": policy.label,
    }
