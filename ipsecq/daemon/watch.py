"""What is worth an event: changes of SAs and policies as they happen, the rest by looking once a second.

Looking costs something only while somebody reads.
"""

from __future__ import annotations

import time
from typing import Any, Final

import ipsecq
from ipsecq.daemon.events import EventBus
from ipsecq.daemon.pool import WorkerPool
from ipsecq.daemon.sampling import History, Sampler
from ipsecq.metrics.live import KERNEL_DROPS, lost
from ipsecq.metrics.reasons import DROPS, reason
from ipsecq.metrics.source import TunnelSample, WorkerSample
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.packet.address import text as address
from ipsecq.policy.model import Policy
from ipsecq.sa.association import SaKey, SecurityAssociation
from ipsecq.setkey import printer

INTERVAL: Final = 1.0
"""Seconds between two looks: drops of one reason are one event in it, however many they are."""


class Watch:
    """Publishes; all methods belong to the supervisor's event loop."""

    def __init__(self, sampler: Sampler, pool: WorkerPool, history: History) -> None:
        self.bus = EventBus(self._hello)
        self._sampler, self._pool, self._history = sampler, pool, history
        self._next = 0.0
        self._seen: _Seen | None = None

    def _hello(self) -> dict[str, Any]:
        if not self.bus.readers:
            self._seen = self._look()
        return {
            "version": ipsecq.__version__,
            "workers": len(self._pool.workers),
            "fail_open_policies": self._sampler.fail_open(self._sampler.policies()),
            "tunnels_down": [f"{each.local} {each.peer}" for each in self._sampler.tunnels() if not each.up],
        }

    # -- as it happens -----------------------------------------------------------------------------------------------

    def changed(self, what: str, item: SecurityAssociation | Policy) -> None:
        """:attr:`ipsecq.daemon.authority.Authority.observer`."""
        if not self.bus.readers:
            return
        if isinstance(item, Policy):
            self.bus.publish(what, id=item.id, policy=printer.config_policy(item), fail_open=item.fail_open)
            return
        what, _, limit = what.partition(":")
        more = {"limit": limit} if limit else {}
        self.bus.publish(
            what, **more, spi=f"0x{item.spi:08x}", protocol=Protocol(item.protocol).name.lower(),
            mode=Mode(item.mode).name.lower(), src=address(item.src), dst=address(item.dst),
            direction=self._sampler.direction(item), reqid=item.reqid, state=SaState(item.state).name.lower(),
            **{"from": item.label},
        )  # fmt: skip

    def acquire(self, policy: int, protocol: int, mode: int, src: bytes, dst: bytes, reqid: int) -> None:
        """A packet waits for an SA."""
        self.bus.publish_limited(
            "acquire", protocol=Protocol(protocol).name.lower(), mode=Mode(mode).name.lower(), src=address(src),
            dst=address(dst), reqid=reqid, policy=policy,
        )  # fmt: skip

    def moved(self, key: SaKey, source: bytes, port: int) -> None:
        """The NAT in front of a peer has changed."""
        self.bus.publish_limited(
            "peer_moved", spi=f"0x{key.spi:08x}", protocol=Protocol(key.protocol).name.lower(), dst=address(key.dst),
            src=address(source), port=port,
        )  # fmt: skip

    # -- by looking --------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """To be called often."""
        now = time.monotonic()
        if now < self._next or not self.bus.readers:
            return
        self._next = now + INTERVAL
        before, self._seen = self._seen, self._look()
        if before is not None:
            self._workers(before, self._seen)
            self._drops(before, self._seen)
            self._gateway(before, self._seen)

    def _look(self) -> _Seen:
        return _Seen(self._sampler, self._history)

    def _workers(self, before: _Seen, now: _Seen) -> None:
        fail_open = now.fail_open > 0
        for was, worker, handle in zip(before.workers, now.workers, self._pool.workers, strict=True):
            if worker.restarts != was.restarts:
                self.bus.publish(
                    "worker_restart", worker=worker.index, ended=handle.ended, restarts=worker.restarts,
                    passed_in_clear=fail_open,
                )  # fmt: skip
            if worker.up != was.up:
                self.bus.publish("worker_up" if worker.up else "worker_down", worker=worker.index, pid=worker.pid)

    def _drops(self, before: _Seen, now: _Seen) -> None:
        for counter in DROPS:
            if count := now.counters[counter] - before.counters[counter]:
                self.bus.publish("drops", reason=counter.name.lower(), count=count, meaning=reason(counter))
        for kind, count in now.kernel.items():
            if count > before.kernel[kind]:
                self.bus.publish("drops", reason=kind, count=count - before.kernel[kind], meaning=KERNEL_DROPS[kind])

    def _gateway(self, before: _Seen, now: _Seen) -> None:
        if now.reloads != before.reloads:
            error = self._history.reload_error
            self.bus.publish("reload", success=not error, **({"error": error} if error else {}))
        if now.repairs != before.repairs:
            self.bus.publish("ruleset_repaired", count=now.repairs)
        if now.fail_open != before.fail_open:
            self.bus.publish("fail_open", policies=now.fail_open)
        for ends, tunnel in now.tunnels.items():
            was = before.tunnels.get(ends)
            if (was is None and not tunnel.up) or (was is not None and was.up != tunnel.up):
                missing = {} if tunnel.up else {"missing": tunnel.missing}
                self.bus.publish("tunnel_up" if tunnel.up else "tunnel_down", local=ends[0], peer=ends[1], **missing)


class _Seen:
    """What one look saw."""

    def __init__(self, sampler: Sampler, history: History) -> None:
        self.workers: list[WorkerSample] = sampler.workers()
        self.counters = sampler.counters()
        self.kernel = lost(self.workers)
        self.reloads, self.repairs = history.reloads_done, history.ruleset_repairs
        self.fail_open = sampler.fail_open(sampler.policies())
        self.tunnels: dict[tuple[str, str], TunnelSample] = {
            (tunnel.local, tunnel.peer): tunnel for tunnel in sampler.tunnels()
        }
