"""What workers report, and how much of it is believed."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from ipsecq.daemon.log import LOGGER
from ipsecq.daemon.pool import WorkerHandle
from ipsecq.engine.pmtu import floor
from ipsecq.sa.association import SaKey

if TYPE_CHECKING:
    from ipsecq.daemon.supervisor import Supervisor

log: Final = logging.getLogger(f"{LOGGER}.reports")


class Reports:
    """``take`` hears all that :class:`ipsecq.daemon.pool.WorkerPool` gets from its workers."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def take(self, worker: WorkerHandle, report: dict[str, Any]) -> None:
        """What a worker says.  It reads hostile packets, so nothing in it is taken on trust."""
        supervisor = self._supervisor
        try:
            kind = report["kind"]
            if kind == "path_mtu":
                dst, mtu = bytes.fromhex(report["dst"]), int(report["mtu"])
                mtu = max(mtu, floor(dst, supervisor.authority.sysctl))
                supervisor.pool.broadcast([("path_mtu", dst, mtu)], but=worker.index)
                supervisor.path_mtu.learn(dst, mtu, time.time())
            elif kind == "acquire":
                wanted = (
                    int(report["policy"]), int(report["protocol"]), int(report["mode"]),
                    bytes.fromhex(report["src"]), bytes.fromhex(report["dst"]), int(report["reqid"]),
                )  # fmt: skip
                if supervisor.keys.acquire(*wanted):
                    supervisor.watch.acquire(*wanted)
            elif kind == "expired":
                key = _reported_key(report)
                if key in supervisor.authority.sad:
                    supervisor.expire([supervisor.authority.sad.get(*key)])
            elif kind == "moved":
                key, address, port = _reported_key(report), bytes.fromhex(report["src"]), int(report["sport"])
                if supervisor.keys.moved(key, address, port):
                    supervisor.watch.moved(key, address, port)
                if supervisor.nat.follow(key, address, port):
                    supervisor.spawn(supervisor.publish())
        except (KeyError, TypeError, ValueError, OverflowError):
            log.warning("worker %d said something that makes no sense; ignored", worker.index)


def _reported_key(report: dict[str, Any]) -> SaKey:
    return SaKey(bytes.fromhex(report["dst"]), int(report["protocol"]), int(report["spi"]))
