"""The benchmark's results as ``docs/benchmarks.md`` and a plot (SVG)."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final
from xml.sax.saxutils import escape

from ipsecq.lab.bench_memory import Memory
from ipsecq.lab.bench_workers import OCTETS, SAS, Scaling

REFERENCE: Final = "ipsecq"


@dataclass
class Samples:
    """What was measured on one path."""

    tcp: list[float] = field(default_factory=list)
    """Gbit/s received."""
    udp: list[float] = field(default_factory=list)
    """Thousands of datagrams delivered a second."""
    offered: list[float] = field(default_factory=list)
    """Thousands of datagrams sent a second."""
    loss: list[float] = field(default_factory=list)
    """Share lost when 0.9 of ``udp`` is offered."""
    rtt: list[float] = field(default_factory=list)
    """Idle round trip, milliseconds."""
    failures: list[str] = field(default_factory=list)


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the greatest where they differ."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(results: Mapping[str, Samples]) -> str:
    """Markdown: medians with their spread, and each path's throughput as a multiple of wireguard-go's, if it was there."""
    base = results.get("wireguard-go")
    lines = [
        "| path | TCP Gbit/s | of wireguard-go's | UDP kpps | of wireguard-go's | of offered | lost at 0.9 | idle RTT ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, samples in results.items():
        if not samples.udp:
            lines.append(f"| {name} | failed: {(samples.failures or ['?'])[-1].splitlines()[0]} | | | | | | |")
            continue
        ratios = ["", ""]
        if base is not None and base.udp:
            ratios = [f"{median(samples.tcp) / median(base.tcp):.2f}", f"{median(samples.udp) / median(base.udp):.2f}"]
        lines.append(
            f"| {name} | {spread(samples.tcp, 3)} | {ratios[0]} | {spread(samples.udp, 1)} | {ratios[1]} "
            f"| {median(samples.offered):.0f} | {100 * median(samples.loss):.2f} % | {spread(samples.rtt, 3)} |"
        )
    return "\n".join(lines)


def memory_table(memory: Memory) -> str:
    """Markdown: each process of the gateway with many SAs and policies."""
    lines = ["| process | RSS MB | PSS MB | its own MB |", "|---|---|---|---|"]
    lines += [f"| {each.name} | {each.rss:.1f} | {each.pss:.1f} | {each.private:.1f} |" for each in memory.processes]
    return "\n".join(lines)


def workers_table(scalings: Sequence[Scaling]) -> str:
    """Markdown: one worker against two, for each suite of algorithms."""
    lines = [
        "| algorithms | one worker kpps | two workers kpps | ratio | µs a packet, one | two |",
        "|---|---|---|---|---|---|",
    ]
    for each in scalings:
        one, two = ([run.kpps for run in runs] for runs in (each.one, each.two))
        costs = " | ".join(f"{median(run.cost for run in runs):.1f}" for runs in (each.one, each.two))
        lines.append(f"| {each.suite} | {spread(one, 1)} | {spread(two, 1)} | {each.ratio:.2f} | {costs} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, kernel."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    name, load = names[0] if names else platform.machine(), os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, Linux {platform.release()}, load {load:.1f}"


def plot(results: Mapping[str, Samples]) -> str:
    """Bars of TCP and UDP throughput, each as a share of the longest but plain forwarding's."""
    shown = {name: samples for name, samples in results.items() if samples.udp and not name.startswith("plain")}
    bars: list[str] = []
    at = 20
    for title, unit, values in (
        ("TCP, one flow", "Gbit/s", {name: median(samples.tcp) for name, samples in shown.items()}),
        ("UDP, small datagrams", "kpps", {name: median(samples.udp) for name, samples in shown.items()}),
    ):
        longest = max(values.values(), default=1.0) or 1.0
        bars.append(f'<text x="10" y="{at}" font-weight="bold">{title}, {unit}</text>')
        for name, value in values.items():
            at += 24
            colour = "#27629d" if name.startswith(REFERENCE) else "#9a9a9a"
            bars.append(f'<text x="10" y="{at}">{escape(name)}</text>')
            bars.append(f'<rect x="230" y="{at - 12}" width="{360 * value / longest:.0f}" height="16" fill="{colour}"/>')
            bars.append(f'<text x="{238 + 360 * value / longest:.0f}" y="{at}">{value:.3g}</text>')
        at += 40
    body = "\n".join(bars)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{at}" font-family="sans-serif" font-size="13">\n'
        f"{body}\n</svg>\n"
    )


def write(
    path: Path, results: Mapping[str, Samples], versions: Mapping[str, str], *, rounds: int, seconds: float,
    memory: Memory | None = None, scalings: Sequence[Scaling] = (),
) -> None:  # fmt: skip
    """The page, and the plot beside it."""
    image = path.with_suffix(".svg")
    image.write_text(plot(results), "utf-8")
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench BENCH='--write {path}'`: {rounds} alternating rounds of {seconds:g} s, in fresh namespaces",
        "each: host, gateway, gateway and host on one machine. Medians, least and greatest in brackets. Only the ratios",
        "mean something elsewhere; a busy machine (see load) makes all of them smaller.",
        "",
        f"Machine: {machine()}.",
        "",
        table(results),
        "",
        f"![throughput]({image.name})",
        "",
        "TCP is one iperf3 flow. UDP is datagrams of 64 octets from one sender, as fast as it can; *lost at 0.9* offers",
        "nine tenths of what was delivered. The idle round trip is ping's, 100 a second. IPv4, LAN MTU 1400.",
        "",
        *(_memory_text(memory) if memory is not None else ()),
        *(_workers_text(scalings) if scalings else ()),
        "Versions:",
        "",
        *(f"- {name}: {version}" for name, version in versions.items()),
        "",
        "What each stage of a packet's way costs: `python -m ipsecq.lab.stages`, see [performance.md](performance.md).",
        "",
    ]
    path.write_text("\n".join(lines), "utf-8")


def _memory_text(memory: Memory) -> list[str]:
    return [
        "## Memory",
        "",
        f"One gateway's processes with {memory.sas} SAs and {memory.policies} policies after {memory.received} datagrams of",
        f"{memory.flows} flows through each tunnel, both ways, so that every SA is in use (target: a worker takes 100 MB at",
        "most). RSS counts what processes share in each of them, PSS gives each its part; MB are 10^6 octets.",
        "",
        memory_table(memory),
        "",
    ]


def _workers_text(scalings: Sequence[Scaling]) -> list[str]:
    return [
        "## Two workers",
        "",
        f"The engine alone: a process a worker seals and opens UDP datagrams of {OCTETS} octets over {SAS} tunnels, and the",
        "workers share what a gateway's do: table of SAs, sequence leases, state file. Both teams in turn (target: 1.7",
        "times the rate on two idle processors). What sharing itself costs shows in the processor time of a packet, even",
        "where other programs are busy, too.",
        "",
        workers_table(scalings),
        "",
    ]
