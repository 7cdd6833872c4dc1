"""What the running daemon shows of itself: samples for metrics, and the answer of ``ipsecq status``."""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Final

import ipsecq
from ipsecq.counters import COUNTERS_WORDS, HISTOGRAM_BASE, Counter
from ipsecq.daemon.authority import Authority
from ipsecq.daemon.pool import WorkerPool
from ipsecq.datapath.queue import QueueStats, queue_table
from ipsecq.metrics.source import SaSample, Snapshot, WorkerSample
from ipsecq.netfilter.load import Loader
from ipsecq.numbers import Direction, Mode, Protocol, SaState
from ipsecq.policy.model import Policy
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.setkey import printer

SHOWN: Final = 10_000
"""SAs and policies in one status answer, unless more are asked for."""


@dataclass(slots=True)
class History:
    """What the supervisor counts itself."""

    started: float = field(default_factory=time.time)
    reloads: int = 0
    reload_failures: int = 0
    reload_success: bool = True
    reload_time: float = field(default_factory=time.time)
    ruleset_repairs: int = 0


class Sampler:
    """Reads authority, pool and shared counters; safe to call from the metrics server's threads (it only reads)."""

    def __init__(
        self, authority: Authority, pool: WorkerPool, loader: Loader, history: History, *, sa_limit: int, bypass: bool
    ) -> None:
        self._authority, self._pool, self._loader, self._history = authority, pool, loader, history
        self._sa_limit, self._bypass = sa_limit, bypass
        self._local: dict[bytes, tuple[float, bool]] = {}

    def snapshot(self) -> Snapshot:
        """See :class:`ipsecq.metrics.source.Source`."""
        sas = self._sas()
        policies = self._authority.spd.dump()
        history = self._history
        return Snapshot(
            workers=self._workers(),
            sas=[self._sample(sa) for sa in sas[: self._sa_limit]],
            sa_count=len(sas),
            policies={
                "in": sum(policy.direction is Direction.IN for policy in policies),
                "out": sum(policy.direction is Direction.OUT for policy in policies),
            },
            reloads=history.reloads,
            reload_failures=history.reload_failures,
            reload_success=history.reload_success,
            reload_time=history.reload_time,
            started=history.started,
            ruleset_repairs=history.ruleset_repairs,
            fail_open=len(policies) if self._bypass else sum(policy.fail_open for policy in policies),
            mechanism=self._loader.mechanism or "",
        )

    def counters(self) -> list[int]:
        """All workers' counters, summed."""
        total = [0] * COUNTERS_WORDS
        for worker in self._pool.workers:
            total = [before + more for before, more in zip(total, worker.counters, strict=True)]
        return total

    def status(self, *, limit: int = SHOWN, offset: int = 0) -> dict[str, Any]:
        """The answer of the control command ``status``.  No key is in it."""
        snapshot = self.snapshot()
        sas, policies = self._authority.sad.dump(), self._authority.spd.dump()
        total = self.counters()
        fail_open = ["queue_bypass is on: every policy"] if self._bypass else []
        fail_open += [printer.config_policy(policy) for policy in policies if policy.fail_open]
        return {
            "version": ipsecq.__version__,
            "uptime": time.time() - snapshot.started,
            "mechanism": snapshot.mechanism,
            "devices": sorted(self._loader.guarded.values()),
            "fail_open": fail_open,
            "reload": {"success": snapshot.reload_success, "time": snapshot.reload_time, "count": snapshot.reloads},
            "workers": [
                {
                    "index": sample.index,
                    "pid": handle.pid,
                    "up": sample.up,
                    "restarts": sample.restarts,
                    "queue": handle.queue,
                    "queue_length": sample.queue_length,
                    "kernel_drops": sample.queue_full_drops + sample.socket_full_drops,
                    "packets_in": sample.counters[Counter.IN_PACKETS],
                    "packets_out": sample.counters[Counter.OUT_PACKETS],
                    "busy_seconds": sample.counters[Counter.BUSY_NS] / 1e9,
                }
                for sample, handle in zip(snapshot.workers, self._pool.workers, strict=True)
            ],
            "sa_count": len(sas),
            "sas": [self._show_sa(sa) for sa in sas[offset : offset + limit]],
            "policy_count": len(policies),
            "policies": [_show_policy(policy) for policy in policies[offset : offset + limit]],
            "counters": {
                counter.name.lower(): total[counter] for counter in Counter if total[counter] and counter < HISTOGRAM_BASE
            },
        }

    def _sas(self) -> list[SecurityAssociation]:
        """All SAs, asked from another thread than the one that adds and deletes them."""
        while True:
            try:
                return self._authority.sad.dump()
            except RuntimeError:  # the dictionary changed meanwhile
                continue

    def _workers(self) -> list[WorkerSample]:
        queues = queue_table()
        samples = []
        for worker in self._pool.workers:
            queue = queues.get(worker.queue, QueueStats(0, 0, 0, 0))
            samples.append(
                WorkerSample(
                    worker.index, worker.ready, worker.restarts, worker.counters.tolist(), queue.waiting, queue.dropped,
                    queue.user_dropped,
                )
            )  # fmt: skip
        return samples

    def _sample(self, sa: SecurityAssociation) -> SaSample:
        words = self._authority.usage_words(sa)
        shown = words.tolist() if words is not None else [0] * int(Slot.WINDOW)
        return SaSample(sa, shown, "out" if self.is_local(sa.src) else "in", sa.key in self._authority.problems)

    def _show_sa(self, sa: SecurityAssociation) -> dict[str, Any]:
        sample = self._sample(sa)
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
            "problem": self._authority.problems.get(sa.key, ""),
        }

    def is_local(self, address: bytes) -> bool:
        """True when ``address`` is ours: asked of the kernel, and remembered for a while."""
        now = time.monotonic()
        known = self._local.get(address)
        if known is not None and now - known[0] < 10.0:
            return known[1]
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        local = False
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe, contextlib.suppress(OSError):
            probe.bind((_text(address), 0))
            local = True
        if len(self._local) > SHOWN:
            self._local.clear()
        self._local[address] = now, local
        return local


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


def _text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
