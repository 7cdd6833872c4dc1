"""``make chaos``: a seeded run of everything that goes wrong, under load, with a proof from the wire at the end.

Two gateways, a router with an attacker between them, TCP, UDP and ping from LAN to LAN over IPv4 and IPv6.  Meanwhile
processes are killed or stopped, files reloaded, disks filled, queues flooded, rulesets flushed, SAs replaced.
Afterwards the capture of what both gateways sent is read: no (key, IV) pair twice, nothing in clear; the receivers tell
whether a replay got through; memory is compared with the beginning.  The second gateway's daemon is never killed (its
workers are), so that its memory shows the growth of the whole run.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipsecq.errors import IpsecqError
from ipsecq.lab.attacker import Attacker
from ipsecq.lab.capture import Capture
from ipsecq.lab.gateway import Gateway
from ipsecq.lab.load import Datagrams, Pinger, Transfers
from ipsecq.lab.mayhem import Mayhem, pids_of_workers
from ipsecq.lab.netns import Lab, LabError
from ipsecq.lab.wirecheck import Findings, WireCheck, keys_of

GROWTH: Final = 1.25
"""Memory at the end, as a multiple of the beginning, that is not yet a finding."""
GROWTH_LATE: Final = 1.1
"""The same, of what there was after a third.  Memory may grow by what is loaded when something is done for the first
time, and by the numbers of SAs that are gone, which are kept for a while; what goes on growing is a leak."""
UDP_PORT: Final = 6000


@dataclass
class Event:
    """One thing that was done."""

    name: str
    where: str
    time: float


@dataclass
class Report:
    """The figures of a run; ``problems`` is empty when every promise was kept."""

    seed: int
    seconds: float
    events: list[Event] = field(default_factory=list)
    outages: dict[str, float] = field(default_factory=dict)
    """Worst time without an answer to ping in which this happened, seconds."""
    wire: Findings = field(default_factory=Findings)
    memory: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    killed: int = 0

    def text(self) -> str:
        """For people."""
        tally = Tally(event.name for event in self.events)
        worst = max(self.outages.values(), default=0.0)
        rows = [f"seed {self.seed}, {self.seconds:.0f} s, {len(self.events)} events, {self.killed} processes killed"]
        rows += [f"  {name:18} {count:4}   worst outage {1e3 * self.outages.get(name, 0):7.0f} ms"
                 for name, count in sorted(tally.items())]  # fmt: skip
        rows += [
            f"worst outage: {1e3 * worst:.0f} ms",
            f"wire: {self.wire.packets} packets checked, {self.wire.esp} of them ESP with {self.wire.pairs} different "
            f"(key, IV) pairs; {self.wire.reused} reused, {self.wire.clear} in clear, {self.wire.unknown} unknown SPIs",
            *self.lines, *self.memory,
        ]  # fmt: skip
        return "\n".join(rows + [f"PROBLEM: {problem}" for problem in self.problems])


class Chaos:
    """``run`` does it all and returns the report."""

    def __init__(
        self, lab: Lab, seed: int, seconds: float, say: Callable[[str], None] = lambda _: None, *, least: int = 0
    ) -> None:
        """``least``: go on for longer where so many things have not been broken yet: the machine may be slow."""
        self.report, self._least = Report(seed, seconds), least
        self._random, self._say = random.Random(seed), say  # noqa: S311  # to be repeated, not to be secret
        self.mayhem = Mayhem(lab, self._random)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """Start, break things for so long, recover, judge."""
        report, network, gateways = self.report, self.mayhem.network, self.mayhem.gateways
        one, two = network.sites
        router = network.router
        assert router is not None
        for gateway in gateways:
            gateway.start()
        pings = [Pinger(one.host, two.host4), Pinger(two.host, one.host6)]
        flows = [
            Datagrams(near.host, far.host, far.host_address(version), UDP_PORT)
            for near, far in ((one, two), (two, one))
            for version in (4, 6)
        ]
        transfers = [
            Transfers(one.host, two.host, two.host4, 6100, octets=4_000_000, pace=1_500_000),
            Transfers(one.host, two.host, two.host6, 6101, octets=4_000_000, pace=1_500_000, reverse=True),
        ]
        attackers = [
            Attacker(network, router, device, victim, UDP_PORT, report.seed + victim)
            for device, victim in (("left", 1), ("right", 2))
        ]
        wires = [
            Capture(router, device, snaplen=128, bulk=True, arriving=True) for device in ("left", "right")
        ]
        with contextlib.ExitStack() as stack:
            for parts in (wires, pings, flows, transfers, attackers):
                for part in parts:
                    stack.enter_context(part)
            time.sleep(3.0)
            before = middle = [memory(gateway) for gateway in gateways]
            try:
                self._break_things(time.monotonic() + report.seconds / 3)
                for gateway in gateways:
                    self.mayhem.recover(gateway)
                middle = [memory(gateway) for gateway in gateways]
                self._break_things(time.monotonic() + report.seconds * 2 / 3, self._least)
                for gateway in gateways:
                    self.mayhem.recover(gateway)
            except (LabError, IpsecqError, OSError) as error:
                report.problems.append(f"{report.events[-1].name if report.events else 'start'}: {error}")
                report.lines += [f"log of {gateway.space.role}:\n{gateway.log_tail(15)}" for gateway in gateways]
            time.sleep(3.0)
            after = [memory(gateway) for gateway in gateways]
        for gateway in gateways:
            gateway.stop()
        self._judge(wires, pings, flows, transfers, attackers)
        self._judge_memory(before, middle, after)
        return report

    def _break_things(self, end: float, least: int = 0) -> None:
        for name in self._deck():
            if time.monotonic() >= end and len(self.report.events) >= least:
                return
            event = Event(name, "", time.time())
            self.report.events.append(event)
            gateway = self.mayhem.actions[name]()
            event.where = gateway.space.role
            self._say(f"{name} ({event.where})")
            # Mostly one thing at a time, now and then on top of one another.
            if self._random.random() < 0.75:
                self.mayhem.recover(gateway)
            time.sleep(self._random.uniform(0.1, 1.0))

    def _deck(self) -> Iterator[str]:
        """All actions in random order, again and again."""
        while True:
            names = list(self.mayhem.actions)
            self._random.shuffle(names)
            yield from names

    # -- afterwards --------------------------------------------------------------------------------------------------

    def _judge(
        self, wires: list[Capture], pings: list[Pinger], flows: list[Datagrams], transfers: list[Transfers],
        attackers: list[Attacker],
    ) -> None:  # fmt: skip
        report = self.report
        report.killed = self.mayhem.killed
        check = WireCheck(keys_of(self.mayhem.lines), [site.lan(v) for site in self.mayhem.network.sites for v in (4, 6)])
        for wire in wires:
            check.read(wire.path)
        report.wire = wired = check.result()
        report.problems += wired.notes
        lost = sum(wire.lost for wire in wires)
        for pinger in pings:
            for gap in pinger.gaps():
                for event in report.events:
                    # What came up to a second before the silence began may be its cause.
                    if gap.begin - 1.0 < event.time < gap.end:
                        report.outages[event.name] = max(report.outages.get(event.name, 0.0), gap.length)
        for flow in flows:
            if flow.twice:
                report.problems.append(f"{flow.name}: {flow.twice} datagrams came in twice")
            if flow.foreign:
                report.problems.append(f"{flow.name}: {flow.foreign} datagrams that nobody sent came in")
        for transfer in transfers:
            report.problems += transfer.failures
            if transfer.damaged:
                report.problems.append(f"TCP: {transfer.damaged} transfers with a wrong digest")
        sent, received = sum(flow.sent for flow in flows), sum(flow.received for flow in flows)
        report.lines += [
            f"ping: {sum(p.received for p in pings)} of {sum(p.sent for p in pings)} answered; "
            f"UDP: {received} of {sent} arrived, {sum(flow.twice for flow in flows)} twice; "
            f"TCP: {sum(t.done for t in transfers)} transfers, {sum(t.octets for t in transfers) / 1e6:.0f} MB intact",
            f"attacker: {sum(a.replayed for a in attackers)} replays, {sum(a.forged for a in attackers)} forgeries, "
            f"{sum(a.clear for a in attackers)} clear packets sent; none may get in: "
            f"{sum(flow.twice + flow.foreign for flow in flows)} did",
            f"capture: {lost} packets lost by tcpdump",
        ]
        for gateway in self.mayhem.gateways:
            for line in gateway.log.read_text(errors="replace").splitlines():
                if "Traceback" in line or " unexpected: " in line or "made the engine fail" in line:
                    report.problems.append(f"{gateway.space.role}: {line}")

    def _judge_memory(self, *sizes: list[dict[str, int]]) -> None:
        """At the start, after a third of the run, and at the end."""
        for gateway, then, middle, now in zip(self.mayhem.gateways, *sizes, strict=True):
            for what in then:
                steps = " -> ".join(f"{each[what] / 1024:.0f}" for each in (then, middle, now))
                text = f"memory of {gateway.space.role}, {what}: {steps} MiB"
                self.report.memory.append(text)
                if now[what] > max(then[what] * GROWTH, middle[what] * GROWTH_LATE):
                    self.report.problems.append(text)


def memory(gateway: Gateway) -> dict[str, int]:
    """Resident memory in KiB: of the daemon, and of the largest of its workers."""
    return {"daemon": _resident(gateway.pid), "workers": max(map(_resident, pids_of_workers(gateway)))}


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def main() -> int:
    """Command line of ``python -m ipsecq.lab.chaos``."""
    parser = argparse.ArgumentParser(description="break everything, and prove from the wire that nothing got out")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default 600)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="repeats the order of events")
    options = parser.parse_args()
    began = time.monotonic()
    print(f"chaos: seed {options.seed}, {options.seconds:.0f} s", flush=True)
    with Lab() as lab:
        report = Chaos(
            lab, options.seed, options.seconds,
            lambda text: print(f"{time.monotonic() - began:7.1f}  {text}", flush=True),
        ).run()  # fmt: skip
    print(report.text())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
