"""What supervisor and worker say to each other over their socket pair.

Down: frames of ``length (4 octets, big-endian) + pickle of (generation, [operation, ...])``.  An operation is a tuple
whose first item names a method of the worker's replica (:mod:`ipsecq.daemon.replica`).  The supervisor is trusted, and
pickle carries SAs and policies as they are, keys included.

Up: one JSON object a line.  A worker reads hostile packets, so what it sends is never unpickled, and both the length
of a line and the amount that may wait are bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ipsecq.daemon.options import LogConfig
from ipsecq.datapath.ring import RingSocket
from ipsecq.datapath.udp import UdpSocket
from ipsecq.errors import DaemonError
from ipsecq.policy.model import Policy
from ipsecq.sa.association import SecurityAssociation

Operation = tuple[Any, ...]
Frame = tuple[int, list[Operation]]

MAX_FRAME: Final = 1 << 28
MAX_LINE: Final = 8192
BATCH: Final = 1000
"""Operations in one frame at most: a worker goes back to its packets after each."""
_LENGTH: Final = 4


@dataclass(slots=True, frozen=True)
class WorkerSetup:
    """What a worker needs to know once: the first operation of its first frame."""

    queues: tuple[int, ...]
    """Its lanes."""
    plain_queue: int
    """Queue in which the kernel cuts super-packets; -1: no super-packets, please."""
    workers: int
    mark_done: int
    mark_stolen: int
    mark_sockets: int
    enc_device: str
    coalesce: bool
    parallel_sas: bool
    udp: tuple[UdpSocket, ...]
    """Inherited sockets for bursts of ESP in UDP; empty: no bursts."""
    udp_port: int
    """The source port that our table gives to what they send."""
    natt_ports: frozenset[int]
    """The ports on which ESP in UDP arrives."""
    rings: tuple[RingSocket, ...]
    """Inherited packet rings, those of all workers; empty: ESP comes by the queues."""
    log: LogConfig
    journal: bool


def encode(generation: int, operations: Sequence[Operation]) -> bytes:
    """One frame."""
    body = pickle.dumps((generation, list(operations)), protocol=5)
    return len(body).to_bytes(_LENGTH, "big") + body


def frames(generation: int, operations: Iterable[Operation]) -> Iterator[bytes]:
    """Frames of at most :data:`BATCH` operations; the last one carries ``generation``, the others 0 (no answer)."""
    waiting: list[Operation] = []
    for operation in operations:
        if len(waiting) == BATCH:
            yield encode(0, waiting)
            waiting = []
        waiting.append(operation)
    yield encode(generation, waiting)


def take_descriptor(hand: socket.socket, number: int) -> int:
    """The descriptor with that number that the supervisor has sent (see WorkerPool.share), or -1.

    Those that were sent before it and never asked for are closed.
    """
    with contextlib.suppress(OSError):
        while True:
            octets, descriptors, _, _ = socket.recv_fds(hand, 16, 1, socket.MSG_DONTWAIT)
            if not octets:
                break
            if octets == str(number).encode() and descriptors:
                return descriptors[0]
            for descriptor in descriptors:
                os.close(descriptor)
    return -1


class FrameReader:
    """The worker's end: frames out of a non-blocking stream socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self.closed = False
        """The supervisor is gone."""

    def read(self) -> Iterator[Frame]:
        """Every whole frame that has arrived, those first that an earlier reader left when it had enough.

        Raises DaemonError when the stream makes no sense.
        """
        yield from self._split()
        while not self.closed:
            try:
                octets = self._socket.recv(1 << 18)
            except BlockingIOError:
                break
            except ConnectionResetError:
                octets = b""
            if not octets:
                self.closed = True
            self._buffer += octets
            yield from self._split()

    def _split(self) -> Iterator[Frame]:
        buffer = self._buffer
        while len(buffer) >= _LENGTH:
            length = int.from_bytes(buffer[:_LENGTH], "big")
            if length > MAX_FRAME:
                raise DaemonError(f"control stream: a frame of {length} octets: are two versions mixed?")
            if len(buffer) < _LENGTH + length:
                return
            frame: Frame = pickle.loads(memoryview(buffer)[_LENGTH : _LENGTH + length])  # noqa: S301  # our supervisor
            del buffer[: _LENGTH + length]
            yield frame[0], [_unlabelled(operation) for operation in frame[1]]


def _unlabelled(operation: Operation) -> Operation:
    """Where an SA or a policy came from is for people, who ask the supervisor: a tenth of what a worker would keep."""
    match operation:
        case "sa_put", SecurityAssociation() as sa:
            sa.label = ""
        case "spd_put" as name, Policy() as policy:
            return name, replace(policy, label="")
        case "spd_replace" as name, list(policies):
            return name, [replace(policy, label="") for policy in policies]
    return operation


def encode_line(kind: str, **values: object) -> bytes:
    """One report of a worker."""
    return json.dumps({"kind": kind, **values}, separators=(",", ":")).encode() + b"\n"


class LineReader:
    """The supervisor's end: reports out of octets that a worker wrote.  Nonsense is skipped."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, octets: bytes) -> Iterator[dict[str, Any]]:
        """Every whole report; ``kind`` is a string in each."""
        self._buffer += octets
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            try:
                report = json.loads(line) if end <= MAX_LINE else None
            except (ValueError, RecursionError):
                report = None
            if isinstance(report, dict) and isinstance(report.get("kind"), str):
                yield report
        if len(self._buffer) > MAX_LINE:
            self._buffer.clear()
