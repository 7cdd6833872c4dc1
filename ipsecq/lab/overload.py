"""``make overload``: several times what a gateway can take, for a minute, beside a flow that asks for little.

Both flows have SAs of their own between the same gateways, so one worker serves both.  Measured: what the quiet flow
gets of its datagrams, how fast ``status`` and ``/metrics`` answer, memory, and how soon the flooded SA serves again.
"""

from __future__ import annotations

import argparse
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

from ipsecq.lab.bench import UDP_OCTETS, UDP_PORT
from ipsecq.lab.capture import Capture
from ipsecq.lab.gateway import AES_CBC_SHA256, AES_GCM, Gateway
from ipsecq.lab.load import Datagrams
from ipsecq.lab.netns import Lab, LabError, wait_for
from ipsecq.lab.rejects import measure
from ipsecq.lab.sink import Sink
from ipsecq.lab.topology import Network, Site, address, build
from ipsecq.lab.traffic import ping
from ipsecq.netfilter.steering import queue_of
from ipsecq.packet import ipv4
from ipsecq.packet.checksum import complete
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

QUIET_RATE: Final = 300.0
"""Datagrams a second of the quiet flow."""
QUIET_SHARE: Final = 0.95
"""Of them must arrive: the flow asks for a small part of its fair share, so it loses none to the flood."""
ANSWER_SECONDS: Final = 1.0
LATE: Final = 10
"""One answer in so many may be late: the machine is as busy as it can be."""
RECOVERY_SECONDS: Final = 1.0
GROWTH_MIB: Final = 64
"""Memory that one process may take more than before: buffers and queues that are full."""
_LANES: Final = 4


@dataclass
class Report:
    """The figures; ``problems`` is empty when every promise was kept."""

    seconds: float
    capacity: float = 0.0
    """Thousands of datagrams a second that arrived in the flood."""
    offered: float = 0.0
    alone: float = 0.0
    """What of the quiet flow arrives without a flood."""
    quiet: float = 0.0
    status: list[float] = field(default_factory=list)
    """Times of answers in seconds."""
    metrics: list[float] = field(default_factory=list)
    recovery: float = 0.0
    memory: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Process → (before, most) in MiB."""
    lost: float = 0.0
    """Packets that queues had no room for, by the metrics."""
    forged: float = 0.0
    """Thousands of forged ESP packets a second that were put on the wire, and how many of them were refused one by one."""
    refused: float = 0.0
    quiet_forged: float = 0.0
    """What of the quiet flow arrives beside them."""

    @property
    def problems(self) -> list[str]:
        """Promises that were not kept."""
        found = []
        for beside, share in (("the flood", self.quiet), ("the forgeries", self.quiet_forged)):
            if share < QUIET_SHARE * self.alone:
                found.append(f"the quiet flow got {share:.1%} of its datagrams through beside {beside}")
        if self.refused == 0:
            found.append("no forged packet was refused: they did not arrive")
        for what, times in (("status", self.status), ("/metrics", self.metrics)):
            if usually(times) > ANSWER_SECONDS or max(times) > 10 * ANSWER_SECONDS:
                found.append(f"{what} took {usually(times):.2f} s and more, {max(times):.2f} s at most")
        if self.recovery > RECOVERY_SECONDS:
            found.append(f"the flooded SA served again only after {self.recovery:.2f} s")
        for process, (before, most) in self.memory.items():
            if most > before + GROWTH_MIB:
                found.append(f"{process} grew from {before:.0f} to {most:.0f} MiB")
        if self.lost == 0:
            found.append("no queue overflowed: that was no overload")
        return found

    def text(self) -> str:
        """For people."""
        rows = [
            f"flood of {self.seconds:.0f} s: {self.offered:.0f} thousand datagrams a second offered, "
            f"{self.capacity:.0f} delivered: {self.offered / max(self.capacity, 0.1):.1f} times the capacity; "
            f"{self.lost:.0f} dropped by full queues",
            f"quiet flow: {self.quiet:.1%} arrived in the flood, {self.alone:.1%} without",
            f"forged ESP under the flooded SA's SPI: {self.forged:.0f} thousand a second, {self.refused:.0f} of them looked "
            f"at and refused, the others dropped by its lane; quiet flow: {self.quiet_forged:.1%} arrived",
            f"answers (nine of ten, worst): status {_range(self.status)} ms, /metrics {_range(self.metrics)} ms",
            f"flooded SA serves again after {1e3 * self.recovery:.0f} ms",
            *(f"memory of {name}: {before:.0f} MiB, at most {most:.0f}" for name, (before, most) in self.memory.items()),
        ]
        return "\n".join(rows + [f"PROBLEM: {problem}" for problem in self.problems])


_ALGORITHMS: Final = AES_CBC_SHA256, AES_GCM
"""Of the flooded SA and of the quiet one.  AES-GCM takes nearly as much as the same two processors can send."""


class Overload:
    """The network with one worker a gateway, two SAs each way, in different lanes."""

    def __init__(self, lab: Lab, seconds: float, senders: int = 2) -> None:
        self.report, self._senders = Report(seconds), senders
        self._flood_ended = 0.0
        self.network: Network = build(lab)
        address(self.network.two.host, "eth0", "10.2.0.3/24")
        self._add = [
            f"add {near.wan4} {far.wan4} esp 0x{0x3000 + near.number * 16 + flow:x} -u {{{flow}}} -m tunnel -r 32"
            f" {_ALGORITHMS[flow].keys()};"
            for near, far in (self.network.sites, self.network.sites[::-1])
            for flow in (0, 1)
        ]
        self._reqids = self._different_lanes()
        self.gateways = [Gateway(site.gateway, self._setkey(site), workers=1, daemon=f"lanes = {_LANES}")
                         for site in self.network.sites]  # fmt: skip

    def _different_lanes(self) -> tuple[int, int]:
        """Request ids whose policies are in different lanes, at both ends: which lane it is, is a hash's choice."""
        for second in count(2):
            self._reqids = 1, second
            lanes = [
                [queue_of(policy, 1, _LANES) for policy in apply(parse(self._setkey(site)), Sad(), Spd(), now=1.0).spd
                 if policy.direction.name == "OUT"]
                for site in self.network.sites
            ]  # fmt: skip
            if all(len(set(each)) == 2 for each in lanes):
                return self._reqids
        raise LabError("every policy is in one lane")

    def _setkey(self, site: Site) -> str:
        far = self.network.sites[2 - site.number]
        text = ["flush;", "spdflush;", *(line.format(*self._reqids) for line in self._add)]
        for flow, reqid in enumerate(self._reqids):
            target = f"10.2.0.{2 + flow}"
            ours, theirs = ("10.1.0.0/24", target) if site.number == 1 else (target, "10.1.0.0/24")
            ends = site.wan4, far.wan4
            text += [
                f"spdadd {ours} {theirs} any -P out ipsec esp/tunnel/{ends[0]}-{ends[1]}/unique:{reqid};",
                f"spdadd {theirs} {ours} any -P in ipsec esp/tunnel/{ends[1]}-{ends[0]}/unique:{reqid};",
            ]
        return "\n".join(text) + "\n"

    def run(self) -> Report:
        """Measure without a flood, flood, watch, and wait for the end of it."""
        report, (one, two) = self.report, self.network.sites
        for gateway in self.gateways:
            gateway.start()
        wait_for(lambda: ping(one.host, "10.2.0.3", count=1, wait=1), "the quiet flow")
        wait_for(lambda: ping(one.host, two.host4, count=1, wait=1), "the other one")
        with Datagrams(one.host, two.host, "10.2.0.3", 6000, QUIET_RATE) as alone:
            time.sleep(min(3.0, report.seconds))
        report.alone = alone.received / alone.sent
        processes = self._processes()
        before = {name: resident(pid) for name, pid in processes.items()}
        most = dict(before)
        with Datagrams(one.host, two.host, "10.2.0.3", 6001, QUIET_RATE) as quiet:
            rates: list[tuple[float, float]] = []
            flood = threading.Thread(target=lambda: rates.append(self._flood()))
            flood.start()
            end = time.monotonic() + report.seconds
            while time.monotonic() < end:
                self._watch()
                for name, pid in processes.items():
                    most[name] = max(most[name], resident(pid))
                time.sleep(0.2)
            wait_for(lambda: ping(one.host, two.host4, count=1, wait=0.2), "the flooded SA", 30.0, every=0.01)
            answered = time.monotonic()
            flood.join()
            report.recovery = max(0.0, answered - self._flood_ended)
        report.quiet = quiet.received / quiet.sent
        report.capacity, report.offered = rates[0]
        self._forge()
        report.memory = {name: (before[name], most[name]) for name in processes}
        report.lost = sum(gateway.metric("ipsecq_queue_dropped_total") for gateway in self.gateways)
        for gateway in self.gateways:
            gateway.stop()
        return report

    def _flood(self) -> tuple[float, float]:
        """Thousands of datagrams a second that arrived, and that were sent: raw frames, which cost the sender least."""
        one, two = self.network.sites
        here, there = (socket.inet_aton(site.host4) for site in (one, two))
        mac = one.gateway.run("cat", "/sys/class/net/lan/address").stdout.strip().replace(":", "")
        datagram = struct.pack("!HHHH", 40000, UDP_PORT, 8 + UDP_OCTETS, 0) + bytes(UDP_OCTETS)
        packet = complete(ipv4.header(here, there, 17, len(datagram)) + datagram)
        frame = bytes.fromhex(mac) + bytes([2, 0, 0, 0, 0, 1]) + b"\x08\x00" + packet
        with Sink(two.host, two.host4, UDP_PORT) as sink:
            seconds = self.report.seconds
            argv = (sys.executable, "-m", "ipsecq.lab.forge", "eth0", str(seconds), frame.hex())
            with ThreadPoolExecutor(self._senders) as pool:
                done = list(pool.map(lambda _: one.host.run(*argv, timeout=seconds + 30), range(self._senders)))
            self._flood_ended = time.monotonic()
            sent = sum(int(each.stdout) for each in done)
            return sink.arrived() / seconds / 1e3, sent / seconds / 1e3

    def _forge(self) -> None:
        """Packets under the SPI of the flooded SA, ahead of its window, with a wrong ICV: each costs an authentication."""
        report, (one, two) = self.report, self.network.sites
        with Capture(one.gateway, "wan", expression="esp") as wire:
            wait_for(lambda: ping(one.host, two.host4, count=1), "the flooded SA")
            wire.settle()
        frame = next(frame for frame in wire.frames() if frame.esp and frame.dst == two.wan4)
        data = bytearray(frame.data)
        at = len(data) - len(frame.payload)
        data[at + 4 : at + 8] = (frame.esp[1] + 1000 if frame.esp else 0).to_bytes(4, "big")
        data[-1] ^= 1
        seconds = min(report.seconds, 20.0)
        before = self.gateways[1].metric("ipsecq_drops_total", reason="esp_badauth")
        with Datagrams(one.host, two.host, "10.2.0.3", 6002, QUIET_RATE) as quiet:
            done = one.gateway.run(
                sys.executable, "-m", "ipsecq.lab.forge", "wan", str(seconds), data.hex(), timeout=seconds + 30
            )
        report.forged = int(done.stdout) / seconds / 1e3
        report.refused = (self.gateways[1].metric("ipsecq_drops_total", reason="esp_badauth") - before) / seconds / 1e3
        report.quiet_forged = quiet.received / quiet.sent

    def _processes(self) -> dict[str, int]:
        return {
            f"{gateway.space.role} {name}": pid
            for gateway in self.gateways
            for name, pid in (("daemon", gateway.pid), ("worker", gateway.workers()[0]))
        }

    def _watch(self) -> None:
        for gateway in self.gateways:
            began = time.monotonic()
            gateway.status()
            asked = time.monotonic()
            gateway.metrics_text()
            self.report.status.append(asked - began)
            self.report.metrics.append(time.monotonic() - asked)


def usually(times: list[float]) -> float:
    """What all but one of :data:`LATE` took at most."""
    return sorted(times)[-1 - len(times) // LATE]


def _range(times: list[float]) -> str:
    return f"{1e3 * usually(times):.0f}, {1e3 * max(times):.0f}"


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> int:
    """Command line of ``python -m ipsecq.lab.overload``."""
    parser = argparse.ArgumentParser(description="offer a gateway several times what it can take")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the flood (default 60)")
    options = parser.parse_args()
    print("time to refuse a packet, microseconds (inbound engine, without kernel):")
    for octets in (64, 1400):
        for algorithm, kind, cost in measure(octets):
            print(f"  {algorithm:22}{octets:6} octets  {kind:14}{cost:7.2f}")
    with Lab() as lab:
        report = Overload(lab, options.seconds).run()
    print(report.text())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
