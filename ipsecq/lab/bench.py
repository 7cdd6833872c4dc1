"""``make bench``: throughput from LAN to LAN through ipsecq and through other ways, in alternating runs.

For each path, in a fresh network each time: the idle round trip (ping), one iperf3 TCP flow, and small UDP datagrams
sent as fast as one process can, counted by the receiving host's kernel; then nine tenths of what came through, for the loss.
Medians over the rounds, and ratios: numbers of one machine say little, ratios of one run say something.

Two more tables: what many SAs and policies take in memory, and what a second worker adds where ciphers are the load.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Final

from ipsecq.lab import bench_memory, bench_report, bench_workers
from ipsecq.lab.bench_memory import Memory
from ipsecq.lab.bench_report import Samples, table
from ipsecq.lab.bench_workers import Scaling
from ipsecq.lab.netns import LabError, stop, wait_for
from ipsecq.lab.paths import Path as Way
from ipsecq.lab.paths import all_paths
from ipsecq.lab.sink import Sink
from ipsecq.lab.topology import Network

UDP_OCTETS: Final = 64
UDP_PORT: Final = 5003
MEMORY: Final = "memory"
"""Rows that are no paths: :mod:`ipsecq.lab.bench_memory`,"""
WORKERS: Final = "workers"
""":mod:`ipsecq.lab.bench_workers`."""


def round_trip(network: Network) -> float:
    """Median idle round trip in milliseconds."""
    done = network.one.host.run("ping", "-n", "-c", "30", "-i", "0.01", "-W", "1", network.two.host4)
    times = [float(text) for text in re.findall(r"time=([\d.]+)", done.stdout)]
    if not times:
        raise LabError(f"no answer to ping:\n{done.stdout}")
    return median(times)


def tcp_gigabits(network: Network, seconds: float) -> float:
    """One iperf3 flow from host A to host B; Gbit/s received after a second of warm-up."""
    server = network.two.host.popen("iperf3", "-s", "-1", "-B", network.two.host4)
    try:
        wait_for(lambda: ":5201" in network.two.host.run("ss", "-ltn").stdout, "the iperf3 server")
        done = network.one.host.run(
            "iperf3", "-c", network.two.host4, "-t", str(seconds), "-O", "1", "-J", check=False, timeout=seconds + 30
        )
        report = json.loads(done.stdout)
        if "error" in report:
            raise LabError(f"iperf3: {report['error']}")
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
    finally:
        stop(server)


def udp_kpps(network: Network, seconds: float) -> tuple[float, float]:
    """(delivered, offered) datagrams in thousands a second, as fast as one process can send them."""
    return udp_run(network, seconds)[:2]


def udp_run(network: Network, seconds: float, rate: float = 0.0) -> tuple[float, float, float]:
    """(delivered, offered) datagrams in thousands a second, and the share lost.  The receiver's kernel counts.

    ``rate``: datagrams a second that are offered; 0: as many as one process can send.
    """
    with Sink(network.two.host, network.two.host4, UDP_PORT) as sink:
        started = time.monotonic()
        done = network.one.host.run(
            sys.executable, "-m", "ipsecq.lab.blast", network.two.host4, str(UDP_PORT), str(seconds), str(UDP_OCTETS),
            str(rate), timeout=seconds + 30,
        )  # fmt: skip
        sent = int(done.stdout)
        # Datagrams still in queues arrive late; the time that they take counts.
        count, elapsed = sink.arrived(), time.monotonic() - started
        while (more := _arrived_after(sink, 0.2)) - count > sent * 0.001:
            count, elapsed = more, time.monotonic() - started
    lost = 1 - more / sent if sent else 0.0
    return more / max(seconds, elapsed - 0.1) / 1e3, sent / seconds / 1e3, max(lost, 0.0)


def _arrived_after(sink: Sink, seconds: float) -> int:
    time.sleep(seconds)
    return sink.arrived()


def measure(path: Way, seconds: float, samples: Samples) -> None:
    """One round on one path."""
    try:
        with path.up() as network:
            samples.rtt.append(round_trip(network))
            samples.tcp.append(tcp_gigabits(network, seconds))
            delivered, offered = udp_kpps(network, seconds)
            _, _, lost = udp_run(network, seconds, 900 * delivered)
            samples.loss.append(lost)
            samples.udp.append(delivered)
            samples.offered.append(offered)
    except (LabError, KeyError, json.JSONDecodeError) as error:
        samples.failures.append(str(error))


def main() -> int:
    """Command line of ``python -m ipsecq.lab.bench``."""
    parser = argparse.ArgumentParser(description="throughput of the demo topology over several paths")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each path (default 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="workers of each ipsecq gateway")
    parser.add_argument(
        "--only", default="", help="comma-separated beginnings of path names, e.g. plain,ipsecq; memory, workers"
    )
    parser.add_argument("--json", default="", metavar="FILE", help="write all samples here")
    parser.add_argument("--write", default="", metavar="FILE", help="write a page (and FILE's .svg), as docs/benchmarks.md")
    options = parser.parse_args()
    wanted = tuple(options.only.split(",")) if options.only else ("",)
    paths = [path for path in all_paths(options.workers) if path.name.startswith(wanted)]
    results: dict[str, Samples] = {}
    versions: dict[str, str] = {}
    print(f"Linux {platform.release()}, {os.cpu_count()} cores, {options.rounds} rounds of {options.seconds:g} s")
    for path in list(paths):
        if why := path.missing():
            print(f"  left out: {path.name}: {why}")
            paths.remove(path)
        else:
            versions[path.name] = path.version()
            print(f"  {path.name}: {versions[path.name]}")
            results[path.name] = Samples()
    for number in range(options.rounds):
        for path in paths:
            print(f"\rround {number + 1}: {path.name:30}", end="", file=sys.stderr, flush=True)
            measure(path, options.seconds, results[path.name])
    print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    if results:
        print(table(results))
    failures: list[str] = []
    memory = _memory(options.workers, failures) if MEMORY.startswith(wanted) else None
    scalings = _scalings(options.rounds, options.seconds, failures) if WORKERS.startswith(wanted) else []
    for failure in failures:
        print(failure, file=sys.stderr)
    for name, samples in results.items():
        for failure in samples.failures:
            print(f"{name}: {failure}", file=sys.stderr)
    if options.json:
        write(options.json, results, memory, scalings)
    if options.write:
        bench_report.write(
            Path(options.write), results, versions, rounds=options.rounds, seconds=options.seconds, memory=memory,
            scalings=scalings,
        )  # fmt: skip
    return 1 if failures or any(samples.failures for samples in results.values()) else 0


def _memory(workers: int, failures: list[str]) -> Memory | None:
    """The row ``memory``."""
    try:
        memory = bench_memory.measure(workers=workers)
    except LabError as error:
        failures.append(f"{MEMORY}: {error}")
        return None
    print(f"\n{memory.sas} SAs, {memory.policies} policies, {memory.received} of {memory.sent} datagrams arrived")
    print(bench_report.memory_table(memory))
    return memory


def _scalings(rounds: int, seconds: float, failures: list[str]) -> list[Scaling]:
    """The rows ``workers``."""
    found = []
    for suite in bench_workers.SUITES:
        try:
            found.append(bench_workers.measure(suite, rounds=rounds, seconds=seconds))
        except LabError as error:
            failures.append(f"{WORKERS}: {suite.name}: {error}")
    print("\n" + bench_report.workers_table(found))
    return found


def write(name: str, results: dict[str, Samples], memory: Memory | None, scalings: Sequence[Scaling]) -> None:
    """All samples as JSON."""
    document: dict[str, Any] = {
        "kernel": platform.release(), "cores": os.cpu_count(),
        "paths": {path: vars(samples) for path, samples in results.items()},
        MEMORY: asdict(memory) if memory is not None else None,
        WORKERS: [asdict(scaling) for scaling in scalings],
    }  # fmt: skip
    with open(name, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
