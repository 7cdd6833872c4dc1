"""The worker processes: started, fed with changes, watched, replaced when dead or stuck.

All methods belong to the supervisor's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import ipsecq
from ipsecq.counters import Counter
from ipsecq.daemon.messages import LineReader, Operation, frames
from ipsecq.daemon.table import CounterPages
from ipsecq.errors import DaemonError

log: Final = logging.getLogger(__name__)

STUCK_SECONDS: Final = 5.0
"""Without a heartbeat for this long a worker is killed; its loop beats four times a second."""
START_SECONDS: Final = 30.0
"""From start to ready, the whole first state included."""
BACKOFF: Final = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds before the next try of a worker that keeps dying; a minute of life forgives all."""
MAX_BACKLOG: Final = 1 << 30
"""Octets of changes that may wait for one worker before it counts as stuck."""


class WorkerHandle:
    """The supervisor's view of one worker, over all of its lives."""

    def __init__(self, index: int, queues: tuple[int, ...], counters: memoryview) -> None:
        self.index, self.queues, self.counters = index, queues, counters
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.hand: socket.socket | None = None
        """Descriptors for it, each with its number as text."""
        self.pidfd = -1
        self.lines = LineReader()
        self.backlog = bytearray()
        self.ready = False
        self.acknowledged = 0
        self.restarts = 0
        self.crashes = 0
        self.born = 0.0
        self.beat = 0
        self.beat_time = 0.0
        self.failure = ""
        self.ended = ""
        """How its last life ended, for people."""

    @property
    def pid(self) -> int:
        """Process id, 0 between two lives."""
        return self.process.pid if self.process is not None else 0


class WorkerPool:
    """The workers, one for each page of counters.

    ``queues(index)`` are the numbers of a worker's queues; ``first_state(index)`` gives the operations that bring a new
    worker to now, its set-up first; ``on_report(worker, report)`` gets what workers say beyond ``ready`` and ``ack``.
    """

    def __init__(
        self,
        pages: CounterPages,
        queues: Callable[[int], tuple[int, ...]],
        descriptors: dict[str, int],
        kept: Sequence[int],
        first_state: Callable[[int], Iterable[Operation]],
        on_report: Callable[[WorkerHandle, dict[str, Any]], None],
        environment: dict[str, str],
    ) -> None:
        """``descriptors``: name of a worker's option → descriptor; ``kept``: more of them that workers hold open.

        ``environment`` is added to the workers'.
        """
        self.workers = [WorkerHandle(index, queues(index), pages.page(index)) for index in range(len(pages))]
        self.generation = 0
        self._descriptors, self._kept = descriptors, kept
        self._first_state, self._on_report = first_state, on_report
        self._environment = environment
        self._changed = asyncio.Event()
        self._stopping = False
        self._timers: set[asyncio.TimerHandle] = set()
        self._shared: dict[int, int] = {}

    # -- changes ------------------------------------------------------------------------------------------------------

    def broadcast(self, operations: Iterable[Operation], *, but: int = -1) -> int:
        """Send to every worker that lives (a new one gets the whole state); the generation to wait for."""
        self.generation += 1
        octets = b"".join(frames(self.generation, operations))
        for worker in self.workers:
            if worker.socket is not None and worker.index != but:
                self._send(worker, octets)
        return self.generation

    def share(self, number: int, descriptor: int) -> None:
        """Give a copy of ``descriptor`` to every worker, those of later lives included, until :meth:`unshare`.

        It is there before any operation that is sent afterwards; a worker takes it with :func:`take_descriptor`.
        """
        self._shared[number] = os.dup(descriptor)
        for worker in self.workers:
            self._give(worker, number)

    def unshare(self, number: int) -> None:
        """Workers to come do not get it; those that have it are told by an operation."""
        descriptor = self._shared.pop(number, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def _give(self, worker: WorkerHandle, number: int) -> None:
        if worker.hand is not None:
            try:
                socket.send_fds(worker.hand, [str(number).encode()], [self._shared[number]])
            except OSError as error:
                log.warning("worker %d: no descriptor for a capture: %s", worker.index, error.strerror)

    async def settled(self, generation: int, patience: float = START_SECONDS) -> None:
        """Wait until every worker is ready and has acknowledged ``generation``.  Raises DaemonError."""
        deadline = time.monotonic() + patience
        while True:
            late = [worker for worker in self.workers if not worker.ready or worker.acknowledged < generation]
            if not late:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                failure = next((worker.failure for worker in late if worker.failure), "no answer")
                raise DaemonError(f"worker {late[0].index} is not ready after {patience:.0f} s: {failure}")
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all of them; :meth:`settled` says when they serve."""
        self.generation += 1
        for worker in self.workers:
            self._spawn(worker)

    def check(self) -> bool:
        """Kill what is stuck; whether all workers are ready and made progress lately.  Call it about twice a second."""
        now = time.monotonic()
        well = True
        for worker in self.workers:
            if worker.process is None:
                well = False
                continue
            beat = worker.counters[Counter.HEARTBEAT]
            if beat != worker.beat:
                worker.beat, worker.beat_time = beat, now
            limit = STUCK_SECONDS if worker.ready else START_SECONDS
            if now - worker.beat_time > limit or len(worker.backlog) > MAX_BACKLOG:
                log.error("worker %d (pid %d) made no progress for %.0f s: killed", worker.index, worker.pid, limit)
                worker.process.kill()
                well = False
            elif worker.crashes and worker.ready and now - worker.born > 60:
                worker.crashes = 0
            well = well and worker.ready
        return well

    async def stop(self, patience: float = 2.0) -> None:
        """Ask all to end, kill what doesn't; afterwards no worker lives."""
        self._stopping = True
        for timer in self._timers:
            timer.cancel()
        self.broadcast([("stop",)])
        deadline = time.monotonic() + patience
        while any(worker.process for worker in self.workers) and time.monotonic() < deadline:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 0.1)
        for worker in self.workers:
            if worker.process is not None:
                worker.process.kill()
                worker.process.wait()
                self._buried(worker)

    def _spawn(self, worker: WorkerHandle) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        hand, taken = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = {**self._descriptors, "control": theirs.fileno(), "hand": taken.fileno()}
        numbers = {"index": worker.index, "parent": os.getpid(), **descriptors}
        root = str(Path(ipsecq.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        settings = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        # Workers die with this thread (PR_SET_PDEATHSIG), so it has to be the event loop's.
        try:
            worker.process = subprocess.Popen(
                [sys.executable, "-m", "ipsecq.daemon.worker", *(f"--{name}={value}" for name, value in numbers.items())],
                pass_fds=[*descriptors.values(), *self._kept],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self._environment, **settings},
            )
        except OSError as error:
            mine.close()
            hand.close()
            raise DaemonError(f"worker {worker.index} cannot be started: {sys.executable}: {error.strerror}") from error
        finally:
            theirs.close()
            taken.close()
        mine.setblocking(False)
        hand.setblocking(False)
        now = time.monotonic()
        worker.socket, worker.lines, worker.backlog = mine, LineReader(), bytearray()
        worker.ready, worker.acknowledged, worker.born, worker.beat_time = False, 0, now, now
        worker.failure, worker.hand = "", hand
        for number in self._shared:
            self._give(worker, number)
        worker.pidfd = os.pidfd_open(worker.process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(worker.pidfd, self._died, worker)
        loop.add_reader(mine.fileno(), self._readable, worker)
        state = self._first_state(worker.index)
        self._send(worker, b"".join(frames(self.generation, state)))

    def _died(self, worker: WorkerHandle) -> None:
        process = worker.process
        if process is None or process.poll() is None:
            return
        self._readable(worker)
        lived = time.monotonic() - worker.born
        self._buried(worker)
        if self._stopping:
            return
        worker.restarts += 1
        delay = BACKOFF[min(worker.crashes, len(BACKOFF) - 1)]
        worker.crashes += 1
        status = process.returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        worker.ended = f"{how}: {worker.failure}" if worker.failure else how
        log.error("worker %d (pid %d) ended after %.1f s (%s); replaced", worker.index, process.pid, lived, worker.ended)
        if delay:
            loop = asyncio.get_running_loop()
            self._timers.add(loop.call_later(delay, self._again, worker))
        else:
            self._again(worker)

    def _again(self, worker: WorkerHandle) -> None:
        self._timers = {timer for timer in self._timers if timer.when() > asyncio.get_running_loop().time()}
        if self._stopping or worker.process is not None:
            return
        try:
            self._spawn(worker)
        except DaemonError as error:  # no memory, no descriptors: perhaps later
            log.error("%s", error)
            self._timers.add(asyncio.get_running_loop().call_later(BACKOFF[-1], self._again, worker))

    def _buried(self, worker: WorkerHandle) -> None:
        loop = asyncio.get_running_loop()
        if worker.socket is not None:
            loop.remove_reader(worker.socket.fileno())
            loop.remove_writer(worker.socket.fileno())
            worker.socket.close()
        if worker.hand is not None:
            worker.hand.close()
        if worker.pidfd >= 0:
            loop.remove_reader(worker.pidfd)
            os.close(worker.pidfd)
        worker.socket, worker.hand, worker.pidfd, worker.process, worker.ready = None, None, -1, None, False
        worker.backlog = bytearray()
        self._changed.set()

    # -- the sockets --------------------------------------------------------------------------------------------------

    def _send(self, worker: WorkerHandle, octets: bytes) -> None:
        worker.backlog += octets
        self._writable(worker)

    def _writable(self, worker: WorkerHandle) -> None:
        if worker.socket is None:
            return
        loop = asyncio.get_running_loop()
        try:
            while worker.backlog:
                sent = worker.socket.send(memoryview(worker.backlog)[: 1 << 18])
                del worker.backlog[:sent]
        except BlockingIOError:
            loop.add_writer(worker.socket.fileno(), self._writable, worker)
            return
        except OSError:
            worker.backlog = bytearray()  # dead: the pidfd tells
        loop.remove_writer(worker.socket.fileno())

    def _readable(self, worker: WorkerHandle) -> None:
        if worker.socket is None:
            return
        try:
            octets = worker.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            octets = b""
        if not octets:
            asyncio.get_running_loop().remove_reader(worker.socket.fileno())
            return
        for report in worker.lines.feed(octets):
            kind = report["kind"]
            if kind == "ready":
                worker.ready, worker.beat_time = True, time.monotonic()
                self._changed.set()
            elif kind == "ack" and isinstance(report.get("generation"), int):
                worker.acknowledged = min(report["generation"], self.generation)
                self._changed.set()
            elif kind == "failed":
                worker.failure = str(report.get("message", ""))[:500]
            else:
                self._on_report(worker, report)
