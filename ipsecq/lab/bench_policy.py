"""What a policy look-up costs at 10, 1,000 and 100,000 policies and SAs: ``make bench-policy``.

Every time is that of :meth:`Outbound.process` or :meth:`Inbound.process` for one packet that gets no further than its
look-ups, so that no cipher hides them; the best of several runs, all sizes in turn.

* **hit**: 4,096 known flows (header checks, flow cache, their SA's accounts) of ten policies, the others idle;
* **miss**: the first packets of 4,096 flows of policies all over the SPD (the SPD and the SAD besides);
* **clear hit**, **clear miss**: the same where the policies say ``none``;
* **inbound**: ESP packets of ten SAs, found by SPI.

Outbound ESP packets stop at their SA's hard lifetime, inbound ones at the replay window. ``mixed`` has policies of six
shapes (hosts, two prefix lengths, a protocol, a port, a range of ports) instead of one. Memory is what a worker's copies
of SPD and SAD take (tracemalloc); an SA's slot in the shared table is not in it, as it is there once for all workers.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipsecq.counters import Counter
from ipsecq.engine import standalone
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IPPROTO_ANY, IPPROTO_UDP, Action, Direction, Level, Mode, Protocol
from ipsecq.packet import ipv4
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import Lifetime, SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.secret import Key

SIZES: Final = (10, 1_000, 100_000)
FLOWS: Final = 4096
"""Flows of one run."""
BUSY: Final = 10
"""Policies and SAs that the flows of a hit use: as many whatever the size, so that only idle ones are added."""
NOW: Final = 10.0
HIT_TARGET: Final = 1.3
MISS_TARGET: Final = 3.0
MEMORY_TARGET: Final = 2048


@dataclass
class Case:
    """One number of policies, of one or of several shapes."""

    count: int
    shapes: str
    times: dict[str, float] = field(default_factory=dict)
    """Seconds an operation, by column."""
    policy_bytes: float = 0.0
    sa_bytes: float = 0.0

    def keep(self, column: str, seconds: float) -> None:
        """Remember the best run: what the machine did meanwhile only ever adds."""
        self.times[column] = min(seconds, self.times.get(column, seconds))


def selector(number: int, mixed: bool) -> Selector:
    """The selector of policy ``number``: disjoint from every other one."""
    src = 0x0A000000 + (number << 4 & 0xFFFFF0)
    dst = 0x80000000 + (number << 8)
    shape = number % 6 if mixed else 0
    low = bytes(4) if shape == 1 else src.to_bytes(4, "big")
    high = b"\xff" * 4 if shape == 1 else (src + (0 if shape == 2 else 15)).to_bytes(4, "big")
    protocol = IPPROTO_UDP if shape >= 3 else IPPROTO_ANY
    dport = {4: (2000, 2000), 5: (1000, 3000)}.get(shape, (0, 65535))
    return Selector(low, high, dst.to_bytes(4, "big"), (dst + 255).to_bytes(4, "big"), protocol, 0, 65535, *dport)


def ends(number: int) -> tuple[bytes, bytes]:
    """The tunnel of policy ``number``."""
    return b"\xc6\x12\x00\x01", (0xC0000000 + number).to_bytes(4, "big")


def clear_policies(count: int, mixed: bool) -> list[Policy]:
    """Policies ``none``."""
    return [Policy(Direction.OUT, selector(number, mixed), Action.NONE) for number in range(count)]


def tunnel_policies(count: int, mixed: bool) -> list[Policy]:
    """Policies of one tunnel each."""
    return [
        Policy(
            Direction.OUT, selector(number, mixed), Action.IPSEC,
            (Transform(Protocol.ESP, Mode.TUNNEL, *ends(number), Level.REQUIRE),),
        )
        for number in range(count)
    ]  # fmt: skip


def associations(count: int) -> list[SecurityAssociation]:
    """An SA for each tunnel, with a key of its own."""
    return [
        SecurityAssociation(
            Protocol.ESP, 0x1000 + number, *ends(number), Mode.TUNNEL, encryption="aes-gcm-16",
            encryption_key=Key(number.to_bytes(20, "big")), replay_window=64, hard=Lifetime(addtime=1),
        )
        for number in range(count)
    ]  # fmt: skip


def packets(count: int, mixed: bool, policies: int) -> list[bytes]:
    """FLOWS UDP datagrams that ``policies`` of the policies name, at random but always the same."""
    source = random.Random(42)  # noqa: S311 - which policy is asked for is no secret
    busy = source.sample(range(count), min(policies, count))
    payload = bytes(64)
    found = []
    for index in range(FLOWS):
        wanted = selector(busy[source.randrange(len(busy))], mixed)
        src = b"\x0a\x00\x00\x07" if wanted.src_first == bytes(4) else wanted.src_first
        ports = (1000 + index).to_bytes(2, "big") + (2000).to_bytes(2, "big")
        udp = ports + (8 + len(payload)).to_bytes(2, "big") + b"\0\0" + payload
        found.append(ipv4.header(src, wanted.dst_first, IPPROTO_UDP, len(udp)) + udp)
    return found


def arriving(count: int) -> list[bytes]:
    """FLOWS ESP datagrams to BUSY of the SAs, with sequence number 0, which no window takes."""
    source = random.Random(43)  # noqa: S311
    busy = source.sample(range(count), min(BUSY, count))
    found = []
    for _ in range(FLOWS):
        number = busy[source.randrange(len(busy))]
        src, dst = ends(number)
        esp = (0x1000 + number).to_bytes(4, "big") + bytes(4 + 64)
        found.append(ipv4.header(src, dst, int(Protocol.ESP), len(esp)) + esp)
    return found


class Subject:
    """Everything that is measured for one case, built once."""

    def __init__(self, case: Case) -> None:
        mixed = case.shapes == "mixed"
        self.case = case
        self.clear = standalone.build([], clear_policies(case.count, mixed), bytes)
        self.esp = standalone.build(associations(case.count), tunnel_policies(case.count, mixed), bytes)
        self.extra = Policy(Direction.IN, selector(0, False), Action.NONE)
        self.busy = packets(case.count, mixed, BUSY)
        self.spread = packets(case.count, mixed, case.count)
        self.arriving = arriving(case.count)
        self.engines = [self._engine(self.clear), self._engine(self.esp)]
        self.inbound = Inbound(self.esp)
        self._time("", self.engines[1], self.spread, self.esp, Counter.ESP_EXPIRED)  # every SA is in use from here on

    @staticmethod
    def _engine(tables: Tables) -> Outbound:
        return Outbound(tables, lambda _: 1500, lambda _: b"\x7f\0\0\1")

    def measure(self) -> None:
        """One run of each column."""
        for prefix, engine, tables, fate in (
            ("clear ", self.engines[0], self.clear, Counter.OUT_PASSED),
            ("", self.engines[1], self.esp, Counter.ESP_EXPIRED),
        ):
            for column, datagrams in (("miss", self.spread), ("hit", self.busy)):
                # A change of the SPD makes every flow unknown; the packet after it pays for forgetting them.
                self.extra = tables.spd.add(self.extra)
                tables.spd.delete_id(self.extra.id)
                engine.process(datagrams[0], NOW, Emissions())
                if column == "hit":
                    self._time("", engine, datagrams, tables, fate)
                before = tables.counters[Counter.FLOW_HIT]
                self._time(prefix + column, engine, datagrams, tables, fate)
                hits = tables.counters[Counter.FLOW_HIT] - before
                assert hits == (FLOWS if column == "hit" else 1), f"{hits} hits"
        self._time("inbound", self.inbound, self.arriving, self.esp, Counter.ESP_REPLAY)

    def _time(
        self, column: str, engine: Outbound | Inbound, datagrams: list[bytes], tables: Tables, fate: Counter
    ) -> None:
        """Seconds for one of FLOWS packets, all of which must meet ``fate``."""
        emit = Emissions()
        process = engine.process
        before = tables.counters[fate]
        began = time.perf_counter()
        for datagram in datagrams:
            process(datagram, NOW, emit)
        seconds = (time.perf_counter() - began) / FLOWS
        assert tables.counters[fate] - before == FLOWS, f"not every packet met {fate.name}"
        if column:
            self.case.keep(column, seconds)


def weigh(case: Case) -> None:
    """Octets of a policy and of an SA, with everything that hangs on it."""
    mixed = case.shapes == "mixed"
    for attribute, build in (
        ("policy_bytes", lambda: Spd(tunnel_policies(case.count, mixed))),
        ("sa_bytes", lambda: Sad(associations(case.count))),
    ):
        gc.collect()
        tracemalloc.start()
        kept = build()
        gc.collect()
        setattr(case, attribute, tracemalloc.get_traced_memory()[0] / case.count)
        tracemalloc.stop()
        del kept


COLUMNS: Final = ("hit", "miss", "clear hit", "clear miss", "inbound")


def report(cases: Sequence[Case]) -> str:
    """The table: nanoseconds, and how many times the smallest number of policies."""
    head = f"{'shapes':7}{'policies':>9}" + "".join(f"{name + ' ns':>15}{'ratio':>6}" for name in COLUMNS)
    lines = [head + f"{'B/policy':>10}{'B/SA':>7}"]
    for case in cases:
        base = next(each for each in cases if each.shapes == case.shapes)
        line = f"{case.shapes:7}{case.count:>9,}"
        for name in COLUMNS:
            line += f"{case.times[name] * 1e9:>15.0f}{case.times[name] / base.times[name]:>5.2f}x"
        lines.append(line + f"{case.policy_bytes:>10.0f}{case.sa_bytes:>7.0f}")
    return "\n".join(lines)


def verdicts(cases: Sequence[Case]) -> list[tuple[bool, str]]:
    """The targets, held against the largest case of each kind."""
    found = []
    for shapes in dict.fromkeys(case.shapes for case in cases):
        mine = [case for case in cases if case.shapes == shapes]
        first, last = mine[0], mine[-1]
        for name in COLUMNS:
            target = MISS_TARGET if name.endswith("miss") else HIT_TARGET
            ratio = last.times[name] / first.times[name]
            found.append((ratio <= target, f"{shapes}, {name}: {ratio:.2f}x at {last.count:,}, target {target}x"))
        for name, weight in (("policy", last.policy_bytes), ("SA", last.sa_bytes)):
            text = f"{shapes}, memory: {weight:.0f} B a {name} at {last.count:,}, target {MEMORY_TARGET}"
            found.append((weight < MEMORY_TARGET, text))
    return found


def run(sizes: Sequence[int] = SIZES, rounds: int = 7) -> list[Case]:
    """Measure: all sizes in turn, ``rounds`` times, so that a slow moment of the machine meets all alike."""
    cases = [Case(size, shapes) for shapes in ("one", "mixed") for size in sizes]
    for case in cases:
        weigh(case)
    for shapes in ("one", "mixed"):
        subjects = [Subject(case) for case in cases if case.shapes == shapes]
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for subject in subjects:
                    subject.measure()
        finally:
            gc.enable()
    return cases


def main() -> int:
    """Print the table; exit status 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="bench-policy", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="N", help="numbers of policies")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="runs, of which the best counts (%(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write it there, too")
    arguments = parser.parse_args()
    cases = run(arguments.sizes, arguments.rounds)
    judged = verdicts(cases)
    text = report(cases) + "\n\n" + "\n".join(f"{'ok    ' if good else 'MISSED'}  {what}" for good, what in judged)
    print(text)
    if arguments.write:
        title = f"# Policy look-ups\n\n`make bench-policy`, Python {sys.version.split()[0]}. {(__doc__ or '').strip()}\n"
        arguments.write.write_text(f"{title}\n```\n{text}\n```\n", "utf-8")
    return 0 if all(good for good, _ in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
