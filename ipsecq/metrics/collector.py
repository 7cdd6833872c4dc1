"""The Prometheus collector: shared counters to metric families, at the moment of the scrape.

Labels are small: an SA is (spi, protocol, dst), as RFC 4301 names it; everything else about it is in
``ipsecq_sa_info``, to be joined on those three.  Counters never go back while the daemon runs; a restarted worker goes
on with its predecessor's.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ipsecq import __version__
from ipsecq.counters import (
    FIRST_DROP,
    HISTOGRAM_BASE,
    HISTOGRAM_BOUNDS,
    HISTOGRAM_SUM_NS,
    Counter,
)
from ipsecq.metrics.source import SaSample, Snapshot, Source, WorkerSample
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.sa.association import Slot

LAST_DROP: Final = 127

DROPS: Final = tuple(counter for counter in Counter if FIRST_DROP <= counter <= LAST_DROP)
"""Every reason for which a packet is dropped."""

_EVENTS: Final = {
    Counter.OUT_PASSED: "passed",
    Counter.OUT_TOOBIG_SENT: "toobig_sent",
    Counter.OUT_ACQUIRE: "acquire",
    Counter.OUT_FRAGMENTED: "fragmented",
    Counter.IN_DELIVERED: "delivered",
    Counter.IN_PMTU_LEARNED: "pmtu_learned",
    Counter.IN_PMTU_REFUSED: "pmtu_refused",
    Counter.NATT_KEEPALIVE: "natt_keepalive",
    Counter.NATT_REBOUND: "natt_rebound",
    Counter.ESP_DUMMY: "esp_dummy",
    Counter.IPCOMP_THRESHOLD: "ipcomp_below_threshold",
    Counter.IPCOMP_UNCOMPR: "ipcomp_uncompressible",
}

_PROTOCOL_COUNTERS: Final = (
    ("esp", Counter.ESP_INPUT, Counter.ESP_OUTPUT, Counter.ESP_IBYTES, Counter.ESP_OBYTES),
    ("ah", Counter.AH_INPUT, Counter.AH_OUTPUT, Counter.AH_IBYTES, Counter.AH_OBYTES),
    ("ipcomp", Counter.IPCOMP_INPUT, Counter.IPCOMP_OUTPUT, Counter.IPCOMP_IBYTES, Counter.IPCOMP_OBYTES),
)

_SA_ID: Final = ("spi", "protocol", "dst")


class IpsecqCollector(Collector):
    """Register it with a ``CollectorRegistry``; ``source.snapshot()`` is asked at each scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        """All families."""
        snapshot = self._source.snapshot()
        total = snapshot.counters()
        yield from _daemon(snapshot)
        yield from _traffic(total)
        yield from _workers(snapshot.workers)
        yield from _associations(snapshot)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registration must not need a running daemon."""
        return ()


def _daemon(snapshot: Snapshot) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "ipsecq_build",
        "Version of ipsecq and of what runs it.",
        value={"version": __version__, "python": platform.python_version(), "mechanism": snapshot.mechanism},
    )
    yield GaugeMetricFamily(
        "ipsecq_start_time_seconds", "Unix time at which the daemon started.", value=snapshot.started
    )
    yield CounterMetricFamily("ipsecq_reloads", "Reloads that were asked for.", value=snapshot.reloads)
    yield CounterMetricFamily("ipsecq_reload_failures", "Reloads that changed nothing.", value=snapshot.reload_failures)
    yield GaugeMetricFamily(
        "ipsecq_reload_last_success", "1: the files are in force as they were last read.", value=snapshot.reload_success
    )
    yield GaugeMetricFamily(
        "ipsecq_reload_last_success_timestamp_seconds",
        "Unix time at which the files in force were read.",
        value=snapshot.reload_time,
    )
    yield CounterMetricFamily(
        "ipsecq_ruleset_repairs", "Times that our nftables tables were gone and loaded again.",
        value=snapshot.ruleset_repairs,
    )  # fmt: skip
    yield GaugeMetricFamily(
        "ipsecq_fail_open_policies", "Policies that let packets pass in clear when nobody serves them.",
        value=snapshot.fail_open,
    )  # fmt: skip
    policies = GaugeMetricFamily("ipsecq_policies", "Policies in the SPD.", labels=["direction"])
    for direction in ("in", "out"):
        policies.add_metric([direction], snapshot.policies.get(direction, 0))
    yield policies


def _traffic(total: list[int]) -> Iterator[Metric]:
    packets = CounterMetricFamily("ipsecq_packets", "Packets that workers looked at.", labels=["direction"])
    octets = CounterMetricFamily("ipsecq_bytes", "Bytes of the packets that workers looked at.", labels=["direction"])
    for direction, packet_counter, byte_counter in (
        ("in", Counter.IN_PACKETS, Counter.IN_BYTES),
        ("out", Counter.OUT_PACKETS, Counter.OUT_BYTES),
    ):
        packets.add_metric([direction], total[packet_counter])
        octets.add_metric([direction], total[byte_counter])
    yield packets
    yield octets
    packets = CounterMetricFamily(
        "ipsecq_protocol_packets", "Packets that a protocol processed.", labels=["protocol", "direction"]
    )
    octets = CounterMetricFamily(
        "ipsecq_protocol_bytes", "Bytes that a protocol processed.", labels=["protocol", "direction"]
    )
    for protocol, *counters in _PROTOCOL_COUNTERS:
        for direction, packet_counter, byte_counter in (
            ("in", counters[0], counters[2]),
            ("out", counters[1], counters[3]),
        ):
            packets.add_metric([protocol, direction], total[packet_counter])
            octets.add_metric([protocol, direction], total[byte_counter])
    yield packets
    yield octets
    drops = CounterMetricFamily("ipsecq_drops", "Packets dropped, by reason.", labels=["reason"])
    for counter in DROPS:
        drops.add_metric([counter.name.lower()], total[counter])
    yield drops
    events = CounterMetricFamily("ipsecq_events", "What happened to packets without dropping them.", labels=["event"])
    for counter, name in _EVENTS.items():
        events.add_metric([name], total[counter])
    yield events
    flows = CounterMetricFamily("ipsecq_flow_cache_lookups", "Flow cache look-ups.", labels=["result"])
    flows.add_metric(["hit"], total[Counter.FLOW_HIT])
    flows.add_metric(["miss"], total[Counter.FLOW_MISS])
    yield flows
    buckets, running = [], 0
    for index, bound in enumerate((*HISTOGRAM_BOUNDS, float("inf"))):
        running += total[HISTOGRAM_BASE + index]
        buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
    yield HistogramMetricFamily(
        "ipsecq_packet_seconds",
        "Time that a packet took in a worker, as the mean of its batch.",
        buckets=buckets,
        sum_value=total[HISTOGRAM_SUM_NS] / 1e9,
    )


def _workers(workers: Iterable[WorkerSample]) -> Iterator[Metric]:
    up = GaugeMetricFamily("ipsecq_worker_up", "1: the worker serves its queue.", labels=["worker"])
    restarts = CounterMetricFamily("ipsecq_worker_restarts", "Times that the worker was replaced.", labels=["worker"])
    busy = CounterMetricFamily("ipsecq_worker_busy_seconds", "Time spent on batches of packets.", labels=["worker"])
    batches = CounterMetricFamily("ipsecq_worker_batches", "Batches of packets read.", labels=["worker"])
    beats = CounterMetricFamily("ipsecq_worker_heartbeats", "Rounds of the worker's loop.", labels=["worker"])
    length = GaugeMetricFamily("ipsecq_queue_length", "Packets that wait in the kernel's queue.", labels=["worker"])
    dropped = CounterMetricFamily(
        "ipsecq_queue_dropped", "Packets that the kernel dropped before a worker saw them.", labels=["worker", "kind"]
    )
    for worker in workers:
        name = [str(worker.index)]
        up.add_metric(name, worker.up)
        restarts.add_metric(name, worker.restarts)
        busy.add_metric(name, worker.counters[Counter.BUSY_NS] / 1e9)
        batches.add_metric(name, worker.counters[Counter.BATCHES])
        beats.add_metric(name, worker.counters[Counter.HEARTBEAT])
        length.add_metric(name, worker.queue_length)
        dropped.add_metric([*name, "queue_full"], worker.queue_full_drops)
        dropped.add_metric([*name, "socket_full"], worker.socket_full_drops)
    yield from (up, restarts, busy, batches, beats, length, dropped)


def _associations(snapshot: Snapshot) -> Iterator[Metric]:
    yield GaugeMetricFamily("ipsecq_sas", "SAs in the SAD, whether or not they have series.", value=snapshot.sa_count)
    info = InfoMetricFamily(
        "ipsecq_sa",
        "One SA: join on spi, protocol and dst.",
        labels=_SA_ID,
    )
    counted = {
        name: CounterMetricFamily(f"ipsecq_sa_{name}", help_text, labels=_SA_ID)
        for name, help_text in (
            ("packets", "Packets that the SA protected or opened."),
            ("bytes", "Bytes that the SA protected or opened."),
            ("auth_failures", "Packets whose ICV was wrong."),
            ("replays", "Packets that were replayed or too old."),
            ("drops", "Other drops on account of the SA."),
        )
    }
    slots = dict(zip(counted, (Slot.PACKETS, Slot.BYTES, Slot.BADAUTH, Slot.REPLAY, Slot.DROPS), strict=True))
    used = GaugeMetricFamily(
        "ipsecq_sa_sequence_used_ratio", "Share of the SA's sequence numbers that is used up.", labels=_SA_ID
    )
    last_use = GaugeMetricFamily(
        "ipsecq_sa_last_use_timestamp_seconds", "Unix time of the last packet, 0 before it.", labels=_SA_ID
    )
    state = GaugeMetricFamily("ipsecq_sa_state", "0 larval, 1 mature, 2 dying, 3 dead.", labels=_SA_ID)
    refused = GaugeMetricFamily(
        "ipsecq_sa_refused", "1: the SA must not send, what it sent before is not known.", labels=_SA_ID
    )
    for sample in snapshot.sas:
        identity = _identity(sample)
        info.add_metric(identity, _information(sample))
        for name, family in counted.items():
            family.add_metric(identity, sample.words[slots[name]])
        limit = (1 << 64) if sample.sa.esn else (1 << 32)
        used.add_metric(identity, sample.words[Slot.SEQUENCE] / limit)
        last_use.add_metric(identity, sample.words[Slot.LAST_USE])
        judged = sample.words[Slot.STATE] or sample.sa.state
        state.add_metric(identity, max(judged, SaState(sample.sa.state)))
        refused.add_metric(identity, sample.refused)
    yield info
    yield from counted.values()
    yield from (used, last_use, state, refused)


def _identity(sample: SaSample) -> list[str]:
    return [f"0x{sample.sa.spi:08x}", Protocol(sample.sa.protocol).name.lower(), _address(sample.sa.dst)]


def _information(sample: SaSample) -> dict[str, str]:
    sa = sample.sa
    return {
        "src": _address(sa.src),
        "mode": Mode(sa.mode).name.lower(),
        "reqid": str(sa.reqid),
        "direction": sample.direction,
        "encryption": sa.encryption or "",
        "authentication": sa.authentication or "",
        "compression": sa.compression or "",
    }


def _address(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
