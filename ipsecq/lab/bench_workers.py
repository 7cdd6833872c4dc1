"""Two workers against one, for a load that is bound by ciphers: the engine alone, without the topology's own cost.

A process a worker, each with the engine of a sending and of a receiving gateway, over what workers of a gateway share:
the mapped table with every SA's slot, sequence leases under their locks, with the state file on disk, and counter pages.
A worker serves the tunnels that steering gives it.  Each packet is sealed, opened by its peer and held against policy;
what was sealed and did not come out again is an error.  One team of one worker and one of two, in turn.
"""

from __future__ import annotations

import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import truediv
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Final, NamedTuple

from ipsecq.counters import Counter
from ipsecq.crypto import registry
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.table import CounterPages, SharedTable, fingerprint
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.engine.outbound_run import OutboundRuns
from ipsecq.engine.tables import Tables
from ipsecq.lab.netns import LabError
from ipsecq.netfilter.steering import worker_of
from ipsecq.numbers import IPPROTO_UDP, Action, Direction, Level, Mode, Protocol
from ipsecq.packet import checksum, ipv4
from ipsecq.packet.buffer import Buffer
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.secret import Key
from ipsecq.sysctl import Sysctl

SAS: Final = 512
OCTETS: Final = 1400
"""Of an inner packet."""
BATCH: Final = 16
"""Packets of one SA that come one behind the other."""
_GATEWAY: Final = bytes((192, 0, 2, 1))
_HOST: Final = bytes((10, 1, 0, 2))


@dataclass(frozen=True)
class Suite:
    """Algorithms of an SA: their names, and octets of their keys."""

    name: str
    encryption: str
    key: int
    authentication: str | None = None
    authentication_key: int = 0


SUITES: Final = (
    Suite("AES-128-CBC, HMAC-SHA2-256", "aes-cbc", 16, "hmac-sha2-256", 32),
    Suite("AES-128-GCM", "aes-gcm-16", 20),
)


class Run(NamedTuple):
    """One round of a team."""

    kpps: float
    """Thousands of packets a second, all workers together."""
    cost: float
    """Processor time of a packet, µs: what a busy machine takes from the rate does not show here."""


@dataclass
class Scaling:
    """What teams of one and of two workers did with one suite, by round."""

    suite: str
    one: list[Run] = field(default_factory=list)
    two: list[Run] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Of the medians of packets a second."""
        return median(run.kpps for run in self.two) / median(run.kpps for run in self.one)


def _peer(number: int) -> bytes:
    return (0x64400001 + number).to_bytes(4, "big")


def _target(number: int) -> bytes:
    return (0x0A400001 + number).to_bytes(4, "big")


def associations(suite: Suite, count: int) -> list[SecurityAssociation]:
    """An SA to each peer."""
    return [
        SecurityAssociation(
            Protocol.ESP, 0x1000 + number, _GATEWAY, _peer(number), Mode.TUNNEL, replay_window=256,
            encryption=suite.encryption, encryption_key=Key(secrets.token_bytes(suite.key)),
            authentication=suite.authentication, authentication_key=Key(secrets.token_bytes(suite.authentication_key)),
        )
        for number in range(count)
    ]  # fmt: skip


def policies(direction: Direction, count: int) -> list[Policy]:
    """One for each peer."""
    return [
        Policy(
            direction, Selector(_HOST, _HOST, _target(number), _target(number)), Action.IPSEC,
            (Transform(Protocol.ESP, Mode.TUNNEL, _GATEWAY, _peer(number), Level.REQUIRE),), id=number + 1,
        )
        for number in range(count)
    ]  # fmt: skip


class _Side:
    """What the workers of one gateway share."""

    def __init__(self, directory: Path, suite: Suite, sas: Sequence[SecurityAssociation], workers: int) -> None:
        directory.mkdir()
        self.table = SharedTable.open(directory / "table", bytes(16))
        self.book = LeaseBook.open(directory, self.table, bytes(16))
        self.pages = CounterPages.create(workers)
        self.slots = []
        for sa in sas:
            slot = self.table.allocate(fingerprint(sa), sa.replay_window)
            self.book.enroll(slot, counter_iv=registry.encryption(suite.encryption).iv_is_counter)
            self.slots.append(slot)

    def descriptors(self) -> tuple[int, int, int]:
        """For the workers."""
        return self.table.descriptor, self.book.state.descriptor, self.pages.descriptor


class Team:
    """Worker processes that wait for :meth:`run`; a context manager."""

    def __init__(self, directory: Path, suite: Suite, workers: int, sas: int) -> None:
        associated = associations(suite, sas)
        sides = [_Side(directory / name, suite, associated, workers) for name in ("near", "far")]
        self._sides = sides
        self._processes: list[subprocess.Popen[bytes]] = []
        descriptors = [side.descriptors() for side in sides]
        for index in range(workers):
            process = subprocess.Popen(
                [sys.executable, "-m", "ipsecq.lab.bench_workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                pass_fds=[number for side in descriptors for number in side],
            )  # fmt: skip
            self._processes.append(process)
            job = index, workers, associated, [(*side.descriptors(), side.slots) for side in sides]
            _say(process, job)
        for process in self._processes:
            _line(process)

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()  # a worker's sign to end
            process.wait(10)

    def run(self, seconds: float) -> Run:
        """What all workers together sealed and opened.  LabError: some packets got lost."""
        for process in self._processes:
            _say(process, seconds)
        counts, times, processor = zip(*map(_hear, self._processes), strict=True)
        return Run(sum(map(truediv, counts, times)) / 1e3, sum(processor) / sum(counts) * 1e6)


def _say(process: subprocess.Popen[bytes], what: object) -> None:
    if process.stdin is None:
        raise LabError("a worker without a pipe")
    pickle.dump(what, process.stdin)
    process.stdin.flush()


def _line(process: subprocess.Popen[bytes]) -> bytes:
    line = process.stdout.readline() if process.stdout is not None else b""
    if not line:
        raise LabError(f"a worker ended with status {process.wait(10)}")
    return line


def _hear(process: subprocess.Popen[bytes]) -> list[float]:
    return [float(word) for word in _line(process).split()]


class _Worker:
    """In its own process: one worker's part of both gateways."""

    def __init__(self, index: int, workers: int, sas: list[SecurityAssociation], sides: list[tuple[Any, ...]]) -> None:
        outgoing = policies(Direction.OUT, len(sas))
        near, far = (
            self._tables(side, sas, index, chosen)
            for side, chosen in zip(sides, (outgoing, policies(Direction.IN, len(sas))), strict=True)
        )
        self._outbound = OutboundRuns(near, lambda _: 1500, lambda _: _GATEWAY)
        self._inbound = InboundRuns(far, unite=True)
        self._delivered = far.counters
        self._emit, self._opened = Emissions(), Emissions()
        self._batches: list[list[Buffer]] = [
            [_datagram(number)] * BATCH
            for number, policy in enumerate(outgoing)
            if worker_of(policy, workers) == index
        ]
        self._next = 0
        for _ in self._batches:
            self._turn()

    @staticmethod
    def _tables(
        side: tuple[int, int, int, list[int]], sas: list[SecurityAssociation], index: int, chosen: list[Policy]
    ) -> Tables:
        descriptor, state, pages, slots = side
        table = SharedTable.attach(descriptor)
        book = LeaseBook.attach(state, table)
        own: list[SecurityAssociation] = pickle.loads(pickle.dumps(sas))  # noqa: S301 - a replica for each gateway
        for sa, slot in zip(own, slots, strict=True):
            sa.slot = slot
        counters = CounterPages(pages).page(index)
        return Tables(Sad(own), Spd(chosen), Sysctl(), table.words, counters, book.lease, os.urandom)

    def _turn(self) -> int:
        """A batch through the next tunnel; how many packets that were."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        now, emit, opened = time.time(), self._emit, self._opened
        left = batch
        while left:
            taken = self._outbound.process_run(left, False, now, emit)
            if not taken:
                self._outbound.process(left[0], now, emit)
            left = left[taken or 1 :]
        wire: list[Buffer] = [memoryview(datagram) for datagram in emit.wire]
        while wire:
            taken = self._inbound.process_run(wire, now, opened)
            if not taken:
                self._inbound.process(wire[0], now, opened)
            wire = wire[taken or 1 :]
        emit.clear()
        opened.clear()
        return len(batch)

    def run(self, seconds: float) -> tuple[int, float, float]:
        """Packets, seconds that they took, and seconds of processor time."""
        before = self._delivered[Counter.IN_DELIVERED]
        count, processor, start = 0, time.process_time(), time.monotonic()
        now = start
        while not count or now - start < seconds:
            count += self._turn()
            now = time.monotonic()
        if (came := self._delivered[Counter.IN_DELIVERED] - before) != count:
            raise LabError(f"{count} packets were sealed, {came} came out")
        return count, now - start, time.process_time() - processor


def _datagram(number: int) -> bytes:
    body = (1000).to_bytes(2, "big") + (2000).to_bytes(2, "big") + (OCTETS - 20).to_bytes(2, "big") + bytes(OCTETS - 26)
    return checksum.complete(ipv4.header(_HOST, _target(number), IPPROTO_UDP, len(body), df=True) + body)


def measure(suite: Suite, *, rounds: int, seconds: float, sas: int = SAS) -> Scaling:
    """Both teams in turn, ``rounds`` times ``seconds`` each."""
    found = Scaling(suite.name)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipsecq-bench-")))
        teams = []
        for workers in (1, 2):
            (place := directory / str(workers)).mkdir()
            teams.append(stack.enter_context(Team(place, suite, workers, sas)))
        for _ in range(rounds):
            found.one.append(teams[0].run(seconds))
            found.two.append(teams[1].run(seconds))
    return found


def _main() -> None:
    """A worker's life: its part of the tables, then a run for each number of seconds that it is told."""
    worker = _Worker(*pickle.load(sys.stdin.buffer))  # noqa: S301 - our own parent
    print("ready", flush=True)
    while True:
        try:
            seconds = pickle.load(sys.stdin.buffer)  # noqa: S301
        except EOFError:
            return
        print(*worker.run(seconds), flush=True)


if __name__ == "__main__":
    _main()
