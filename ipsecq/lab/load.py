"""Traffic that goes on while things break, and that tells what it lost: datagrams that are known by heart, ping, TCP."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import secrets
import signal
import socket
import struct
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from ipsecq.datapath.queue import SO_RCVBUFFORCE
from ipsecq.lab.netns import LabError, Namespace, wait_for
from ipsecq.lab.traffic import MARKER, family, tcp

_NUMBER: Final = struct.Struct("!Q")
DIGEST: Final = 16
LAST_SECONDS: Final = 3.0
"""How long the last datagrams may be under way."""
PATIENCE: Final = 180.0
"""Longest pause of a TCP transfer: a sender's own pauses between tries double to two minutes."""
RTO_MAX: Final = "net/ipv4/tcp_rto_max_ms"
"""Linux 6.15: pauses that end sooner."""
CONGESTION: Final = "net/ipv4/tcp_congestion_control"


@dataclass
class Gap:
    """A time without answers, Unix seconds."""

    begin: float
    end: float

    @property
    def length(self) -> float:
        """Seconds."""
        return self.end - self.begin


class Pinger:
    """Ping, a hundred times a second, until the block ends; then ``sent``, ``received`` and ``gaps`` are known."""

    def __init__(self, space: Namespace, address: str, interval: float = 0.01) -> None:
        self.space, self.address, self.interval = space, address, interval
        self.sent = self.received = 0
        self.times: list[float] = []
        self.ended = 0.0
        self._log = space.lab.directory / f"ping-{time.monotonic_ns()}"

    def __enter__(self) -> Pinger:
        self._process = self.space.popen(
            "ping", "-n", "-D", "-i", str(self.interval), "-W", "1", self.address, log=self._log
        )
        wait_for(lambda: self._log.exists() and "bytes from" in self._log.read_text(), f"an answer of {self.address}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        time.sleep(0.3)  # what is on its way may still arrive
        self.ended = time.time()
        self._process.send_signal(signal.SIGINT)
        self._process.wait(5)
        text = self._log.read_text()
        if summary := re.search(r"(\d+) packets transmitted, (\d+) received", text):
            self.sent, self.received = int(summary[1]), int(summary[2])
        self.times = sorted(float(stamp) for stamp in re.findall(r"^\[(\d+\.\d+)\] .*icmp_seq=", text, re.MULTILINE))

    def gaps(self, longer: float = 0.05) -> list[Gap]:
        """Times without any answer, longer than so many seconds; the end counts as one."""
        return [Gap(one, two) for one, two in itertools.pairwise([*self.times, self.ended]) if two - one > longer]


class Datagrams:
    """Numbered UDP datagrams from client to server; the receiver knows each and counts what must not be.

    ``twice`` are datagrams that came in more than once: replays that the far end accepted.  ``foreign`` are those that
    nobody here sent.
    """

    def __init__(self, client: Namespace, server: Namespace, address: str, port: int, rate: float = 100.0) -> None:
        self.sent = self.received = self.twice = self.foreign = 0
        self.name = f"{client.role}>{server.role} {address}"
        self._secret = secrets.token_bytes(16)
        self._rate = rate
        self._seen: set[int] = set()
        self._stop, self._all_sent = threading.Event(), threading.Event()
        self._sink = server.socket(family(address), socket.SOCK_DGRAM)
        # A burst after somebody's pause is not to be lost here.
        self._sink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 24)
        self._sink.bind((address, port))
        self._sink.settimeout(0.1)
        self._source = client.socket(family(address), socket.SOCK_DGRAM)
        self._source.connect((address, port))
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]

    def __enter__(self) -> Datagrams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._threads[0].join()
        # What is on its way may still arrive.
        last = time.monotonic() + LAST_SECONDS
        while self.received < self.sent and time.monotonic() < last:
            time.sleep(0.01)
        self._all_sent.set()
        self._threads[1].join()
        self._sink.close()
        self._source.close()

    def _content(self, number: int) -> bytes:
        digest = hashlib.blake2b(_NUMBER.pack(number), key=self._secret, digest_size=DIGEST).digest()
        # Every size up to what a tunnel carries in one piece, and now and then one that it doesn't.
        size = 1800 if number % 50 == 0 else 60 + number * 37 % 1200
        return (_NUMBER.pack(number) + digest + MARKER).ljust(size, b".")

    def _send(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            with contextlib.suppress(OSError):  # an ICMP error for an earlier one
                self._source.send(self._content(self.sent))
            self.sent += 1
            due = max(due + 1 / self._rate, time.monotonic() - 0.05)  # after a pause, no burst of all that was left out
            time.sleep(max(0.0, due - time.monotonic()))

    def _receive(self) -> None:
        while True:
            try:
                data = self._sink.recv(65536)
            except TimeoutError:
                if self._all_sent.is_set():
                    return
                continue
            number = _NUMBER.unpack_from(data)[0] if len(data) >= _NUMBER.size else -1
            if not 0 <= number <= self.sent or data != self._content(number):
                self.foreign += 1
            elif number in self._seen:
                self.twice += 1
            else:
                self._seen.add(number)
                self.received += 1


class Transfers:
    """TCP transfers one after the other, each with a digest at its end; ``pace`` in octets a second."""

    def __init__(
        self, client: Namespace, server: Namespace, address: str, port: int, *, octets: int, pace: int,
        reverse: bool = False,
    ) -> None:  # fmt: skip
        self.done = self.damaged = 0
        self.octets = 0
        self.pause = 0.0
        """Longest time in which no octet arrived, seconds."""
        self.failures: list[str] = []
        self._arguments = (client, server, address, octets)
        self._options = {"port": port, "pace": pace, "reverse": reverse}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        for space in (client, server):
            with contextlib.suppress(FileNotFoundError):
                space.sysctl(RTO_MAX, 3000)
            # BBR takes a row of outages for the path's bandwidth and may stay at a few octets a second afterwards.
            with contextlib.suppress(OSError):
                space.sysctl(CONGESTION, "cubic")

    def __enter__(self) -> Transfers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        client, server, address, octets = self._arguments
        while not self._stop.is_set():
            try:
                transfer = tcp(
                    client, server, address, octets, port=int(self._options["port"]), timeout=PATIENCE,
                    reverse=bool(self._options["reverse"]), pace=int(self._options["pace"]),
                )  # fmt: skip
            except LabError as error:
                self.failures.append(str(error))
                continue
            self.done += 1
            self.octets += transfer.octets
            self.pause = max(self.pause, transfer.longest_pause)
            self.damaged += not transfer.digest_matches
