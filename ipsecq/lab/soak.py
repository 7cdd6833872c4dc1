"""``make soak``: half load for an hour, and nothing may grow: memory, descriptors, latency.

What is compared are medians of the first and the last quarter of the run, after a warm-up; everything is one number for
each process, sampled every ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from ipsecq.lab.gateway import Gateway, Tunnel
from ipsecq.lab.load import Datagrams, Transfers
from ipsecq.lab.netns import Lab, LabError, Namespace, wait_for
from ipsecq.lab.overload import resident
from ipsecq.lab.topology import build
from ipsecq.lab.traffic import ping, tcp

WARM_UP: Final = 20.0
PROBE_OCTETS: Final = 60_000_000
MEMORY_GROWTH: Final = 1.05
MEMORY_SLACK_MIB: Final = 2.0
LATENCY_GROWTH: Final = 1.5
LATENCY_SLACK_MS: Final = 0.5


@dataclass
class Series:
    """One quantity over time."""

    values: list[float] = field(default_factory=list)

    @property
    def ends(self) -> tuple[float, float]:
        """Medians of the first and of the last quarter."""
        part = max(1, len(self.values) // 4)
        return median(self.values[:part]), median(self.values[-part:])


@dataclass
class Report:
    """The figures; ``problems`` is empty when nothing grew."""

    seconds: float
    capacity: float = 0.0
    """Gbit/s of one TCP flow as fast as it goes."""
    moved: float = 0.0
    """Gigabytes that TCP carried in the run."""
    datagrams: tuple[int, int] = (0, 0)
    """Received, sent."""
    memory: dict[str, Series] = field(default_factory=dict)
    descriptors: dict[str, Series] = field(default_factory=dict)
    latency: Series = field(default_factory=Series)
    """Median round trips of a few pings, milliseconds."""
    failures: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What grew."""
        found = list(self.failures)
        for name, series in self.memory.items():
            begin, end = series.ends
            if end > begin * MEMORY_GROWTH + MEMORY_SLACK_MIB:
                found.append(f"memory of {name}: {begin:.1f} -> {end:.1f} MiB")
        for name, series in self.descriptors.items():
            begin, end = series.ends
            if end > begin:
                found.append(f"descriptors of {name}: {begin:.0f} -> {end:.0f}")
        begin, end = self.latency.ends
        if end > begin * LATENCY_GROWTH + LATENCY_SLACK_MS:
            found.append(f"round trip: {begin:.2f} -> {end:.2f} ms")
        return found

    def text(self) -> str:
        """For people."""
        rows = [
            f"{self.seconds:.0f} s at half of {self.capacity:.2f} Gbit/s: {self.moved:.1f} GB by TCP, "
            f"{self.datagrams[0]} of {self.datagrams[1]} datagrams",
            "round trip: {:.2f} -> {:.2f} ms".format(*self.latency.ends),
        ]
        for name, series in self.memory.items():
            ends, open_files = series.ends, self.descriptors[name].ends
            rows.append(
                f"{name}: memory {ends[0]:.1f} -> {ends[1]:.1f} MiB, descriptors {open_files[0]:.0f} -> {open_files[1]:.0f}"
            )
        return "\n".join(rows + [f"PROBLEM: {problem}" for problem in self.problems])


class Soak:
    """Two gateways, TCP at half of what they can, datagrams both ways, ping."""

    def __init__(self, lab: Lab, seconds: float, every: float = 10.0) -> None:
        self.report = Report(seconds)
        self._every = every
        self.network = build(lab)
        tunnel = Tunnel(self.network)
        self.gateways = [Gateway(site.gateway, tunnel.setkey(site)) for site in self.network.sites]

    def run(self) -> Report:
        """Measure the capacity, warm up, sample."""
        report, (one, two) = self.report, self.network.sites
        for gateway in self.gateways:
            gateway.start()
        wait_for(lambda: ping(one.host, two.host4, count=1), "the tunnel")
        probe = max((tcp(one.host, two.host, two.host4, PROBE_OCTETS) for _ in range(3)), key=lambda each: each.gigabits)
        report.capacity = probe.gigabits
        pace = int(probe.octets / probe.seconds / 2)
        with contextlib.ExitStack() as stack:
            load = stack.enter_context(
                Transfers(one.host, two.host, two.host4, 6100, octets=max(pace * 5, 1_000_000), pace=pace)
            )
            flows = [
                stack.enter_context(Datagrams(near.host, far.host, far.host6, 6000, 50))
                for near, far in ((one, two), (two, one))
            ]
            time.sleep(min(WARM_UP, report.seconds))
            processes = self._processes()
            end = time.monotonic() + report.seconds
            while time.monotonic() < end:
                self._sample(processes, one.host, two.host4)
                time.sleep(max(0.0, min(self._every, end - time.monotonic())))
            if self._processes() != processes:
                report.failures.append("a worker was replaced")
        report.moved = load.octets / 1e9
        report.datagrams = sum(flow.received for flow in flows), sum(flow.sent for flow in flows)
        report.failures += load.failures
        if load.damaged or any(flow.twice or flow.foreign for flow in flows):
            report.failures.append("not everything arrived as it was sent")
        for gateway in self.gateways:
            gateway.stop()
        return report

    def _processes(self) -> dict[str, int]:
        return {
            f"{gateway.space.role} {name}": pid
            for gateway in self.gateways
            for name, pid in (
                ("daemon", gateway.pid), *((f"worker {number}", pid) for number, pid in enumerate(gateway.workers())),
            )
        }  # fmt: skip

    def _sample(self, processes: dict[str, int], space: Namespace, address: str) -> None:
        report = self.report
        for name, pid in processes.items():
            report.memory.setdefault(name, Series()).values.append(resident(pid))
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            report.descriptors.setdefault(name, Series()).values.append(descriptors)
        # /metrics and status are part of a gateway's day.
        for gateway in self.gateways:
            gateway.metrics_text()
        report.latency.values.append(median(round_trips(space, address)))


def round_trips(space: Namespace, address: str, count: int = 20) -> Sequence[float]:
    """Milliseconds of each answered ping; LabError when there is none."""
    done = space.run("ping", "-n", "-c", str(count), "-i", "0.02", "-W", "1", address, check=False)
    times = [float(text) for text in re.findall(r"time=([\d.]+)", done.stdout)]
    if not times:
        raise LabError(f"no answer to ping:\n{done.stdout}")
    return times


def main() -> int:
    """Command line of ``python -m ipsecq.lab.soak``."""
    parser = argparse.ArgumentParser(description="half load for a long time; nothing may grow")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (default 3600)")
    options = parser.parse_args()
    with Lab() as lab:
        report = Soak(lab, options.seconds).run()
    print(report.text())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
