"""The Prometheus collector: shared counters to metric families, at the moment of the scrape.

Labels are small: an SA is (spi, protocol, dst), as RFC 4301 names it; everything else about it is in
``ipsecq_sa_info``, to be joined on those three.  Counters never go back while the daemon runs: a restarted worker goes
on with its predecessor's, and peers keep what their former SAs counted.  ``docs/metrics.md`` is made from what stands
here (``make docs``).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from typing import Final

from cryptography.hazmat.backends.openssl import backend
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ipsecq import __version__
from ipsecq.counters import HISTOGRAM_BASE, HISTOGRAM_BOUNDS, HISTOGRAM_SUM_NS, Counter, Offload
from ipsecq.metrics.associations import families
from ipsecq.metrics.reasons import DROPS
from ipsecq.metrics.source import InterfaceSample, PeerSample, Snapshot, Source, TunnelSample, WorkerSample

EVENTS: Final = {
    Counter.OUT_PASSED: ("passed", "outbound packets that no policy protects"),
    Counter.OUT_BUNDLESA: ("bundled", "outbound packets that took more than one SA"),
    Counter.OUT_TOOBIG_SENT: ("toobig_sent", "senders told that a packet does not fit the tunnel"),
    Counter.OUT_ACQUIRE: ("acquire", "SAs that key management was asked for"),
    Counter.OUT_FRAGMENTED: ("fragmented", "packets sent in fragments"),
    Counter.IN_DELIVERED: ("delivered", "decapsulated packets given to the stack"),
    Counter.IN_PMTU_LEARNED: ("pmtu_learned", "path MTUs learned from ICMP"),
    Counter.IN_PMTU_REFUSED: ("pmtu_refused", "ICMP errors about packets that were never sent, not believed"),
    Counter.NATT_KEEPALIVE: ("natt_keepalive", "NAT keepalives that came"),
    Counter.NATT_REBOUND: ("natt_rebound", "peers seen behind another port or address of their NAT"),
    Counter.ESP_TUNNEL: ("esp_tunnel", "packets that left in an ESP tunnel"),
    Counter.AH_TUNNEL: ("ah_tunnel", "packets that left in an AH tunnel"),
    Counter.ESP_DUMMY: ("esp_dummy", "dummy packets that came (RFC 4303 section 2.6)"),
    Counter.IPCOMP_THRESHOLD: ("ipcomp_below_threshold", "packets too short to be compressed"),
    Counter.IPCOMP_UNCOMPR: ("ipcomp_uncompressible", "packets that compression would not make shorter"),
    Counter.SUPER_PACKETS: ("super_packets", "TCP super-packets taken whole"),
    Counter.FAST_PACKETS: ("fast_path", "packets and segments that the compiled fast path took, either way"),
    Counter.COALESCED: ("coalesced", "decapsulated segments that entered as a part of another packet"),
}
"""Value of the label ``event`` and its meaning."""

_PROTOCOL_COUNTERS: Final = (
    ("esp", Counter.ESP_INPUT, Counter.ESP_OUTPUT, Counter.ESP_IBYTES, Counter.ESP_OBYTES),
    ("ah", Counter.AH_INPUT, Counter.AH_OUTPUT, Counter.AH_IBYTES, Counter.AH_OBYTES),
    ("ipcomp", Counter.IPCOMP_INPUT, Counter.IPCOMP_OUTPUT, Counter.IPCOMP_IBYTES, Counter.IPCOMP_OBYTES),
)


class IpsecqCollector(Collector):
    """Register it with a ``CollectorRegistry``; ``source.snapshot()`` is asked at each scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        """All families."""
        snapshot = self._source.snapshot()
        yield from gateway_families(snapshot)
        yield from families(snapshot)

    def describe(self) -> Iterable[Metric]:
        """Nothing: registration must not need a running daemon."""
        return ()


def gateway_families(snapshot: Snapshot) -> Iterator[Metric]:
    """All families but those with a series an SA."""
    total = snapshot.counters()
    yield from _daemon(snapshot)
    yield from _traffic(total)
    yield from _workers(snapshot.workers)
    yield from _peers(snapshot.peers)
    yield from _tunnels(snapshot.tunnels)
    yield from _interfaces(snapshot.interfaces)
    sas = GaugeMetricFamily(
        "ipsecq_sas", "SAs in the SAD, whether or not they have series.", labels=["protocol", "direction", "state"]
    )
    for identity, count in snapshot.sa_states.items():
        sas.add_metric(list(identity), count)
    yield sas
    yield GaugeMetricFamily(
        "ipsecq_sas_without_series", "SAs beyond metrics.sa_limit: they count in the series of their peers alone.",
        value=snapshot.sa_count - len(snapshot.sas),
    )  # fmt: skip


def _daemon(snapshot: Snapshot) -> Iterator[Metric]:
    yield InfoMetricFamily(
        "ipsecq_build",
        "Version of ipsecq and of what runs it; mechanism is how packets are queued.",
        value={
            "version": __version__,
            "python": platform.python_version(),
            "openssl": backend.openssl_version_text(),
            "kernel": os.uname().release,
            "mechanism": snapshot.mechanism,
        },
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
    yield GaugeMetricFamily(
        "ipsecq_socket_policies", "Different pairs of policies, in and out, that sockets have.", value=snapshot.socket_pairs
    )
    yield GaugeMetricFamily(
        "ipsecq_sockets_with_policy", "Open sockets that asked for a policy of their own.", value=snapshot.socket_count
    )
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
        "ipsecq_protocol_bytes", "Bytes that a protocol processed, its headers not counted.",
        labels=["protocol", "direction"],
    )  # fmt: skip
    for protocol, *counters in _PROTOCOL_COUNTERS:
        for direction, packet_counter, byte_counter in (
            ("in", counters[0], counters[2]),
            ("out", counters[1], counters[3]),
        ):
            packets.add_metric([protocol, direction], total[packet_counter])
            octets.add_metric([protocol, direction], total[byte_counter])
    yield packets
    yield octets
    drops = CounterMetricFamily("ipsecq_drops", "Packets dropped, by reason (below).", labels=["reason"])
    for counter in DROPS:
        drops.add_metric([counter.name.lower()], total[counter])
    yield drops
    events = CounterMetricFamily(
        "ipsecq_events", "What happened to packets without dropping them (below).", labels=["event"]
    )
    for counter, (name, _) in EVENTS.items():
        events.add_metric([name], total[counter])
    yield events
    flows = CounterMetricFamily("ipsecq_flow_cache_lookups", "Flow cache look-ups.", labels=["result"])
    flows.add_metric(["hit"], total[Counter.FLOW_HIT])
    flows.add_metric(["miss"], total[Counter.FLOW_MISS])
    yield flows


def _workers(workers: Iterable[WorkerSample]) -> Iterator[Metric]:
    up = GaugeMetricFamily("ipsecq_worker_up", "1: the worker serves its queue.", labels=["worker"])
    restarts = CounterMetricFamily("ipsecq_worker_restarts", "Times that the worker was replaced.", labels=["worker"])
    busy = CounterMetricFamily(
        "ipsecq_worker_busy_seconds", "Time spent on batches of packets: its rate is the worker's utilisation.",
        labels=["worker"],
    )  # fmt: skip
    batches = CounterMetricFamily("ipsecq_worker_batches", "Batches of packets read.", labels=["worker"])
    packets = CounterMetricFamily(
        "ipsecq_worker_packets", "Packets that the worker looked at.", labels=["worker", "direction"]
    )
    beats = CounterMetricFamily("ipsecq_worker_heartbeats", "Rounds of the worker's loop.", labels=["worker"])
    length = GaugeMetricFamily("ipsecq_queue_length", "Packets that wait in the kernel's queues.", labels=["worker"])
    dropped = CounterMetricFamily(
        "ipsecq_queue_dropped",
        "Packets lost between kernel and worker: queue_full, socket_full and ring_full, dropped by the kernel; truncated, "
        "cut off and dropped by the worker.",
        labels=["worker", "kind"],
    )
    errors = CounterMetricFamily(
        "ipsecq_queue_errors", "Netlink errors, most of them verdicts for packets that the kernel had dropped.",
        labels=["worker"],
    )  # fmt: skip
    offloads = GaugeMetricFamily(
        "ipsecq_offload_active",
        "1: in use. gso: TCP super-packets come whole; coalesce: decapsulated segments are put together; "
        "coalesce_udp: decapsulated datagrams, too; udp_segment: ESP in UDP leaves in bursts; "
        "compiled: packets of known flows go through compiled code; ring: whole ESP datagrams come by packet rings.",
        labels=["worker", "offload"],
    )
    latency = HistogramMetricFamily(
        "ipsecq_packet_seconds", "Time that a packet took in a worker, as the mean of its batch.", labels=["worker"]
    )
    for worker in workers:
        name, counters = [str(worker.index)], worker.counters
        up.add_metric(name, worker.up)
        restarts.add_metric(name, worker.restarts)
        busy.add_metric(name, counters[Counter.BUSY_NS] / 1e9)
        batches.add_metric(name, counters[Counter.BATCHES])
        packets.add_metric([*name, "in"], counters[Counter.IN_PACKETS])
        packets.add_metric([*name, "out"], counters[Counter.OUT_PACKETS])
        beats.add_metric(name, counters[Counter.HEARTBEAT])
        length.add_metric(name, worker.queue_length)
        for kind, count in worker.lost.items():
            dropped.add_metric([*name, kind], count)
        errors.add_metric(name, counters[Counter.QUEUE_ERRORS] + counters[Counter.ENOBUFS])
        for offload in Offload:
            offloads.add_metric([*name, str(offload.name).lower()], bool(counters[Counter.OFFLOADS] & offload))
        buckets, running = [], 0
        for index, bound in enumerate((*HISTOGRAM_BOUNDS, float("inf"))):
            running += counters[HISTOGRAM_BASE + index]
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(running)))
        latency.add_metric(name, buckets, counters[HISTOGRAM_SUM_NS] / 1e9)
    yield from (up, restarts, busy, batches, packets, beats, length, dropped, errors, offloads, latency)


def _peers(peers: Iterable[PeerSample]) -> Iterator[Metric]:
    labels = ["peer", "direction"]
    counted = {
        name: CounterMetricFamily(f"ipsecq_peer_{name}", help_text, labels=labels)
        for name, help_text in (
            ("packets", "Packets of all SAs with the peer, former ones included."),
            ("bytes", "Bytes of all SAs with the peer, former ones included."),
            ("auth_failures", "Packets with the peer's SPIs whose ICV was wrong."),
            ("replays", "Packets of the peer that were replayed or too old."),
            ("drops", "Other drops on account of SAs with the peer."),
        )
    }
    sas = GaugeMetricFamily("ipsecq_peer_sas", "SAs with the peer.", labels=labels)
    last_use = GaugeMetricFamily(
        "ipsecq_peer_last_use_timestamp_seconds",
        "Unix time of the last packet to or from the peer, 0 before it.",
        labels=labels,
    )
    for peer in peers:
        identity = [peer.peer, peer.direction]
        for name, family in counted.items():
            family.add_metric(identity, getattr(peer, name))
        sas.add_metric(identity, peer.sas)
        last_use.add_metric(identity, peer.last_use)
    yield from counted.values()
    yield from (sas, last_use)


def _tunnels(tunnels: Iterable[TunnelSample]) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "ipsecq_tunnel_up",
        "1: every SA that policies require between these ends is there, both ways, and may be used.",
        labels=["local", "peer"],
    )
    for tunnel in tunnels:
        up.add_metric([tunnel.local, tunnel.peer], tunnel.up)
    yield up


def _interfaces(interfaces: Iterable[InterfaceSample]) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        "ipsecq_interface_up", "1: the device of the route-based tunnel is up.", labels=["interface"]
    )
    ready = GaugeMetricFamily(
        "ipsecq_interface_ready", "1: SAs of the route-based tunnel are there, both ways.", labels=["interface"]
    )
    names = ("packets", "bytes", "drops")
    counted = [
        CounterMetricFamily(f"ipsecq_interface_{name}", help_text, labels=["interface", "direction"])
        for name, help_text in zip(
            names,
            (
                "Packets by the device's own counters; a super-packet counts as one.",
                "Bytes by the device's own counters.",
                "Packets that the device had no room for, or no reader.",
            ),
            strict=True,
        )
    ]
    for each in interfaces:
        up.add_metric([each.name], each.up)
        ready.add_metric([each.name], not each.problem)
        for direction, numbers in (("in", each.received), ("out", each.sent)):
            for family, number in zip(counted, numbers, strict=True):
                family.add_metric([each.name, direction], number)
    yield from (up, ready, *counted)
