"""Which offloads are in use, and why the others are not: the word of ``ipsecq status`` and of the status page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ipsecq import fastpath
from ipsecq.counters import Counter, Offload
from ipsecq.daemon.options import OffloadConfig
from ipsecq.metrics.source import OffloadSample, WorkerSample

_SWITCH: Final = {
    Offload.GSO: "gso", Offload.COALESCE: "coalesce", Offload.COALESCE_UDP: "coalesce", Offload.UDP_SEGMENT: "udp_segment",
    Offload.COMPILED: "compiled", Offload.RING: "ring",
}  # fmt: skip
_REFUSED: Final = {
    Offload.GSO: "this kernel's queues give out no super-packets (NFQA_CFG_F_GSO): packets come one by one",
    Offload.COALESCE: "the enc device has no virtio header: packets enter one by one",
    Offload.COALESCE_UDP: "this kernel's TUN takes no UDP super-packets (TUN_F_USO, Linux 6.2): datagrams enter one by one",
    Offload.UDP_SEGMENT: "this kernel has no UDP_SEGMENT (Linux 4.18): datagrams leave one by one",
    Offload.COMPILED: "the compiled code is not here: packets go through the interpreter",
    Offload.RING: "there are no packet rings: ESP comes by the queues",
}


def samples(
    config: OffloadConfig, workers: Sequence[WorkerSample], *, udp_problem: str = "", ring_problem: str = "",
) -> tuple[OffloadSample, ...]:  # fmt: skip
    """Every offload, as the workers that are up have it.

    ``udp_problem`` and ``ring_problem``: what the kernel said when sockets for bursts, and rings, were opened.
    """
    found = []
    running = [worker for worker in workers if worker.up]
    for offload in Offload:
        users = tuple(worker.index for worker in running if worker.counters[Counter.OFFLOADS] & offload)
        switch = _SWITCH[offload]
        why = ""
        if not getattr(config, switch):
            why = f"switched off: [offload] {switch} = false"
        elif offload is Offload.RING and not config.compiled:
            why = "rings are for the compiled code, and [offload] compiled = false"
        elif not running:
            why = "no worker is up"
        elif len(users) < len(running):
            why = _REFUSED[offload]
            if offload is Offload.UDP_SEGMENT and udp_problem:
                why += f" ({udp_problem})"
            if offload is Offload.RING and ring_problem:
                why += f" ({ring_problem})"
            if offload in (Offload.COMPILED, Offload.RING) and fastpath.missing:
                why += f" ({fastpath.missing})"
        found.append(OffloadSample(str(offload.name).lower(), users, bool(running) and len(users) == len(running), why))
    return tuple(found)
