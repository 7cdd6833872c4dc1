"""A snapshot as JSON-ready data, for the status page and for ``ipsecq top``: counters as they are, rates are the reader's.

No key is in it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Final

from ipsecq import __version__
from ipsecq.counters import Counter, Offload
from ipsecq.metrics.associations import expiry, hard_share, state
from ipsecq.metrics.reasons import DROPS, reason
from ipsecq.metrics.source import OffloadSample, PeerSample, SaSample, Snapshot, WorkerSample
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.packet.address import text as address
from ipsecq.sa.association import Slot

KERNEL_DROPS: Final = {
    "queue_full": "the kernel's queue was full: the worker is too slow for this traffic",
    "socket_full": "the worker's socket buffer was full",
    "ring_full": "a packet ring was full: the worker is too slow for this traffic",
    "truncated": "cut off on the way to the worker",
}
"""Packets that no worker saw whole, in words."""


_PACKETS, _BYTES, _LAST_USE = int(Slot.PACKETS), int(Slot.BYTES), int(Slot.LAST_USE)
_BAD, _REPLAYS, _DROPS = int(Slot.BADAUTH), int(Slot.REPLAY), int(Slot.DROPS)


def lost(workers: Sequence[WorkerSample]) -> dict[str, int]:
    """Packets that no worker saw whole, by kind."""
    return {kind: sum(worker.lost[kind] for worker in workers) for kind in KERNEL_DROPS}


def data(snapshot: Snapshot) -> dict[str, Any]:
    """Everything that the snapshot holds, in short names."""
    total = snapshot.counters()
    drops = [(counter.name.lower(), total[counter], reason(counter)) for counter in DROPS if total[counter]]
    drops += [(kind, count, KERNEL_DROPS[kind]) for kind, count in lost(snapshot.workers).items() if count]
    return {
        "time": snapshot.time,
        "version": __version__,
        "host": socket.gethostname(),
        "started": snapshot.started,
        "mechanism": snapshot.mechanism,
        "devices": list(snapshot.devices),
        "fail_open": snapshot.fail_open,
        "reload": {"success": bool(snapshot.reload_success), "time": snapshot.reload_time},
        "policies": dict(snapshot.policies),
        "sa_count": snapshot.sa_count,
        "tunnel_count": snapshot.tunnel_count,
        "packets": {"in": total[Counter.IN_PACKETS], "out": total[Counter.OUT_PACKETS]},
        "bytes": {"in": total[Counter.IN_BYTES], "out": total[Counter.OUT_BYTES]},
        "drops": [{"reason": name, "count": count, "meaning": meaning} for name, count, meaning in drops],
        "workers": [_worker(worker) for worker in snapshot.workers],
        "offloads": [offload(each) for each in snapshot.offloads],
        "tunnels": [
            {
                "local": tunnel.local, "peer": tunnel.peer, "up": tunnel.up, "missing": tunnel.missing,
                "networks": [list(pair) for pair in tunnel.networks], "fail_open": tunnel.fail_open,
            }
            for tunnel in snapshot.tunnels
        ],
        "peers": [_peer(peer) for peer in snapshot.peers],
        "sas": [_sa(sample, snapshot.time) for sample in snapshot.sas],
    }  # fmt: skip


def offload(sample: OffloadSample) -> dict[str, Any]:
    """An offload, as the status page and ``ipsecq status --json`` show it."""
    return {"name": sample.name, "active": sample.active, "workers": list(sample.workers), "why": sample.why}


def _worker(worker: WorkerSample) -> dict[str, Any]:
    counters = worker.counters
    return {
        "index": worker.index,
        "pid": worker.pid,
        "up": worker.up,
        "restarts": worker.restarts,
        "busy": counters[Counter.BUSY_NS] / 1e9,
        "in": counters[Counter.IN_PACKETS],
        "out": counters[Counter.OUT_PACKETS],
        "waiting": worker.queue_length,
        "lost": sum(worker.lost.values()),
        "offloads": [str(each.name).lower() for each in Offload if counters[Counter.OFFLOADS] & each],
    }


def _peer(peer: PeerSample) -> dict[str, Any]:
    return {
        "peer": peer.peer, "direction": peer.direction, "packets": peer.packets, "bytes": peer.bytes,
        "bad": peer.auth_failures, "replays": peer.replays, "drops": peer.drops, "sas": peer.sas,
        "last_use": peer.last_use,
    }  # fmt: skip


def _sa(sample: SaSample, now: float) -> dict[str, Any]:
    sa, words = sample.sa, sample.words
    return {
        "spi": f"0x{sa.spi:08x}",
        "protocol": Protocol(sa.protocol).name.lower(),
        "mode": Mode(sa.mode).name.lower(),
        "src": address(sa.src),
        "dst": address(sa.dst),
        "direction": sample.direction,
        "state": SaState(state(sample, now)).name.lower(),
        "algorithms": " ".join(filter(None, (sa.encryption, sa.authentication, sa.compression))),
        "packets": words[_PACKETS],
        "bytes": words[_BYTES],
        "bad": words[_BAD],
        "replays": words[_REPLAYS],
        "drops": words[_DROPS],
        "last_use": words[_LAST_USE],
        "expires": expiry(sa.hard, sample),
        "used": hard_share(sample, now),
        "successor": sample.successor,
        "problem": sample.problem,
    }
