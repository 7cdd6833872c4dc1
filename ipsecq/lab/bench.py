"""``make bench``: throughput from LAN to LAN through ipsecq and through other ways, in alternating runs.

For each path, in a fresh network each time: the idle round trip (ping), one iperf3 TCP flow, and small UDP datagrams
sent as fast as one process can, counted by the receiving host's kernel.  Medians over the rounds, and ratios: numbers
of one machine say little, ratios of one run say something.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from ipsecq.lab.netns import LabError, Namespace, stop, wait_for
from ipsecq.lab.paths import Path, all_paths
from ipsecq.lab.topology import Network

UDP_OCTETS: Final = 64
UDP_PORT: Final = 5003


@dataclass
class Samples:
    """What was measured on one path."""

    tcp: list[float] = field(default_factory=list)
    """Gbit/s received."""
    udp: list[float] = field(default_factory=list)
    """Thousands of datagrams delivered a second."""
    offered: list[float] = field(default_factory=list)
    """Thousands of datagrams sent a second."""
    rtt: list[float] = field(default_factory=list)
    """Idle round trip, milliseconds."""
    failures: list[str] = field(default_factory=list)


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
    """(delivered, offered) datagrams in thousands a second.  The receiver's kernel counts, no program reads."""
    with network.two.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind((network.two.host4, UDP_PORT))
        before = arrived(network.two.host)
        started = time.monotonic()
        done = network.one.host.run(
            sys.executable, "-m", "ipsecq.lab.blast", network.two.host4, str(UDP_PORT), str(seconds), str(UDP_OCTETS),
            timeout=seconds + 30,
        )  # fmt: skip
        sent = int(done.stdout)
        # Datagrams still in queues arrive late; the time that they take counts.
        count, elapsed = arrived(network.two.host), time.monotonic() - started
        while (more := _arrived_after(network.two.host, 0.2)) - count > sent * 0.001:
            count, elapsed = more, time.monotonic() - started
    return (count - before) / max(seconds, elapsed - 0.1) / 1e3, sent / seconds / 1e3


def arrived(space: Namespace) -> int:
    """UDP datagrams that reached a socket of this namespace, read or not."""
    lines = [line.split() for line in space.run("cat", "/proc/net/snmp").stdout.splitlines() if line.startswith("Udp:")]
    counters = dict(zip(lines[0], lines[1], strict=True))
    # A socket that nobody reads queues datagrams until its buffer is full, then each one is a RcvbufError.
    return int(counters["InDatagrams"]) + int(counters["RcvbufErrors"])


def _arrived_after(space: Namespace, seconds: float) -> int:
    time.sleep(seconds)
    return arrived(space)


def measure(path: Path, seconds: float, samples: Samples) -> None:
    """One round on one path."""
    try:
        with path.up() as network:
            samples.rtt.append(round_trip(network))
            samples.tcp.append(tcp_gigabits(network, seconds))
            delivered, offered = udp_kpps(network, seconds)
            samples.udp.append(delivered)
            samples.offered.append(offered)
    except (LabError, KeyError, json.JSONDecodeError) as error:
        samples.failures.append(str(error))


def table(results: dict[str, Samples], reference: str = "ipsecq") -> str:
    """The report: medians, and each path's throughput as a multiple of the reference."""
    rows = [f"{'path':27}{'TCP Gbit/s':>12}{'x':>9}{'UDP kpps':>12}{'x':>9}{'of offered':>12}{'RTT ms':>9}"]
    base = results.get(reference, Samples())
    for name, samples in results.items():
        if not samples.udp:
            rows.append(f"{name:27}  failed: {(samples.failures or ['?'])[-1].splitlines()[0]}")
            continue
        cells = f"{name:27}{median(samples.tcp):12.3f}{_ratio(samples.tcp, base.tcp):>9}"
        cells += f"{median(samples.udp):12.1f}{_ratio(samples.udp, base.udp):>9}"
        rows.append(cells + f"{median(samples.offered):12.0f}{median(samples.rtt):9.3f}")
    return "\n".join(rows)


def _ratio(values: list[float], base: list[float]) -> str:
    return f"{median(values) / median(base):.3g}" if base else "-"


def main() -> int:
    """Command line of ``python -m ipsecq.lab.bench``."""
    parser = argparse.ArgumentParser(description="throughput of the demo topology over several paths")
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each path (default 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="workers of each ipsecq gateway")
    parser.add_argument("--only", default="", help="comma-separated beginnings of path names, e.g. plain,ipsecq")
    parser.add_argument("--json", default="", metavar="FILE", help="write all samples here")
    options = parser.parse_args()
    wanted = tuple(options.only.split(",")) if options.only else ("",)
    paths = [path for path in all_paths(options.workers) if path.name.startswith(wanted)]
    results: dict[str, Samples] = {}
    print(f"Linux {platform.release()}, {os.cpu_count()} cores, {options.rounds} rounds of {options.seconds:g} s")
    for path in list(paths):
        if why := path.missing():
            print(f"  left out: {path.name}: {why}")
            paths.remove(path)
        else:
            print(f"  {path.name}: {path.version()}")
            results[path.name] = Samples()
    for number in range(options.rounds):
        for path in paths:
            print(f"\rround {number + 1}: {path.name:30}", end="", file=sys.stderr, flush=True)
            measure(path, options.seconds, results[path.name])
    print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    print(table(results))
    print("x: the multiple of ipsecq's throughput in this run; all traffic is IPv4, LAN MTU 1400.")
    for name, samples in results.items():
        for failure in samples.failures:
            print(f"{name}: {failure}", file=sys.stderr)
    if options.json:
        write(options.json, results)
    return 1 if any(samples.failures for samples in results.values()) else 0


def write(name: str, results: dict[str, Samples]) -> None:
    """All samples as JSON."""
    document: dict[str, Any] = {path: vars(samples) for path, samples in results.items()}
    with open(name, "w", encoding="utf-8") as file:
        json.dump({"kernel": platform.release(), "cores": os.cpu_count(), "paths": document}, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
