"""A worker's loop: waits for packets and for everything else, and says who deals with them.

Packets of known flows are the fast path's where there is one; the others go through the engines (:mod:`.batch`).
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Final

from ipsecq.counters import Counter, Offload
from ipsecq.datapath.batch import Batches, OutboundEngine
from ipsecq.datapath.enc0 import Enc0
from ipsecq.datapath.fast import FastPath
from ipsecq.datapath.hold import Holder
from ipsecq.datapath.inward import InboundEngine
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.outward import Outward
from ipsecq.datapath.queue import BATCH, Queue
from ipsecq.datapath.ring import PacketRing
from ipsecq.datapath.routed import RoutedTunnels
from ipsecq.datapath.tap import Taps
from ipsecq.datapath.udp import UdpOutput
from ipsecq.engine.emit import Event

TICK: Final = 0.25
"""Longest sleep in seconds: the heartbeat beats at least twice a second, whatever the traffic."""

FEW: Final = 8
"""Packets that the engine takes where the fast path has left one alone."""


class WorkerLoop(Batches):
    """Everything that one worker does with packets.  One thread, one network namespace; no method is thread-safe.

    ``queue``, ``output``, ``enc0`` and ``path_mtu`` belong to the caller, who closes them.  ``stop`` ends :meth:`run`
    after the batch in hand.
    """

    def __init__(
        self,
        queue: Queue,
        output: RawOutput,
        enc0: Enc0 | None,
        engine_out: OutboundEngine,
        engine_in: InboundEngine,
        counters: MutableSequence[int],
        *,
        mark_stolen: int,
        mark_sockets: int = 0,
        path_mtu: PathMtu,
        clock: Callable[[], float] = time.time,
        control_fd: int = -1,
        on_control: Callable[[], None] | None = None,
        on_events: Callable[[list[Event]], None] | None = None,
        holder: Holder | None = None,
        lanes: Sequence[Queue] = (),
        plain_queue: Queue | None = None,
        taps: Taps | None = None,
        udp: UdpOutput | None = None,
        routed: RoutedTunnels | None = None,
        fast: FastPath | None = None,
        rings: Sequence[PacketRing] = (),
    ) -> None:
        """Join the parts.

        ``mark_stolen`` marks originals that egress has to drop, ``mark_sockets`` are the mark's bits that name the
        policy of the sending socket.  ``on_control()`` is called when ``control_fd`` is
        readable, ``on_events(events)`` with what the engine reported in a batch (copy the list to keep it).
        ``lanes`` are more queues like ``queue``; each has a batch in its turn, however full the others are.
        ``plain_queue``, a queue without GSO that is served here too, is where the kernel cuts the super-packets that
        we cannot; without one they are dropped.  ``taps`` watch the engines.  ``udp`` sends bursts; without one they go
        through ``output``.  ``routed`` are the route-based tunnels.  ``fast`` takes what it knows before the engines do.
        ``rings`` bring ESP past the queues.
        """
        super().__init__(
            queue, Outward(output, udp, enc0, path_mtu, counters), engine_out, engine_in, counters, mark_stolen=mark_stolen,
            mark_sockets=mark_sockets, path_mtu=path_mtu, clock=clock, on_events=on_events, holder=holder,
            plain_queue=plain_queue, taps=taps, routed=routed, fast=fast,
        )  # fmt: skip
        self._enc0 = enc0
        self._control_fd, self._on_control = control_fd, on_control
        self._usable = False
        """Whether the fast path may be used, when it was asked last."""
        self._stopping = False
        self._next_tick = 0.0
        self._queues = [queue, *lanes] if plain_queue is None else [queue, *lanes, plain_queue]
        self._rings = {ring.fd: ring for ring in rings}
        if fast is not None:
            for each in (queue, *lanes):
                fast.register(each)
            for ring in rings:
                fast.register_ring(ring)
        self._losses, self._refused = self._lost(), (0, 0)
        counters[Counter.OFFLOADS] = (
            (Offload.GSO if queue.gso else 0)
            | (Offload.COALESCE if enc0 is not None and enc0.coalescing else 0)
            | (Offload.COALESCE_UDP if enc0 is not None and enc0.coalescing and enc0.datagrams else 0)
            | (Offload.UDP_SEGMENT if udp is not None else 0)
            | (Offload.COMPILED if fast is not None else 0)
            | (Offload.RING if rings else 0)
        )

    # -- life ------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End :meth:`run` soon; from a control callback or a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        with select.epoll() as poll:
            queues = {queue.fd: queue for queue in self._queues}
            for descriptor in (*queues, *self._rings):
                poll.register(descriptor, select.EPOLLIN)
            if self._control_fd >= 0:
                poll.register(self._control_fd, select.EPOLLIN)
            if self._enc0 is not None:
                poll.register(self._enc0.fd, select.EPOLLIN)
            if self._routed is not None:
                self._routed.attach(poll)
            while not self._stopping:
                fast = self._fast_now()
                if fast is not None:
                    self._serve(fast, poll, queues)
                else:
                    ready = self._wait(poll)
                    self._counters[Counter.HEARTBEAT] += 1
                    for descriptor, _ in ready:
                        queue = queues.get(descriptor)
                        if queue is not None:
                            self.step(queue)
                        else:
                            self._other(descriptor)
                moment = time.monotonic()
                if moment >= self._next_tick:
                    self._next_tick = moment + TICK
                    self.tick()

    def _fast_now(self) -> FastPath | None:
        """The fast path, if it may be used now."""
        fast = self._fast
        if fast is not None and self._changed:
            self._usable, self._changed = fast.ready(), False
        return fast if self._usable else None

    def _serve(self, fast: FastPath, poll: select.epoll, queues: dict[int, Queue]) -> None:
        """Let the fast path work until there is something that it leaves to us."""
        descriptor, got = fast.serve(poll.fileno(), self._next_tick)
        queue = queues.get(descriptor)
        if queue is None:
            if descriptor >= 0:
                self._other(descriptor)
        elif queue is self._plain_queue:
            self.step(queue)
        else:
            self._active = queue
            self._mixed(queue, fast, *fast.finished(queue, got))
            self._drain()

    def _other(self, descriptor: int) -> None:
        """Something that is no queue is readable."""
        ring = self._rings.get(descriptor)
        if ring is not None:
            fast = self._fast_now()
            self._open_direct(ring, BATCH if fast is None else FEW, fast)
        elif descriptor == self._control_fd:
            self._changed = True
            if self._on_control is not None:
                self._on_control()
        elif self._enc0 is None or descriptor != self._enc0.fd:
            self._step_routed(descriptor)
        else:
            self._enc0.discard()

    def _wait(self, poll: select.epoll) -> list[tuple[int, int]]:
        """What is ready; tells the taps how long nothing was, as they may have half of that time."""
        taps = self._taps
        if taps is None or not taps.sinks:
            return poll.poll(TICK)
        before = time.perf_counter_ns()
        ready = poll.poll(TICK)
        taps.idle += time.perf_counter_ns() - before
        return ready

    def tick(self) -> None:
        """What is due a few times a second: losses in the kernel, packets that waited too long."""
        counters = self._counters
        self._changed = True
        self._local.clear()
        lost = self._lost()
        counters[Counter.ENOBUFS] += max(lost - self._losses, 0)
        for ring in self._rings.values():
            counters[Counter.RING_DROPPED] += ring.lost()
        self._losses = lost
        truncated, errors = self._refused
        self._refused = sum(queue.truncated for queue in self._queues), sum(queue.errors for queue in self._queues)
        counters[Counter.QUEUE_TRUNCATED] += self._refused[0] - truncated
        counters[Counter.QUEUE_ERRORS] += self._refused[1] - errors
        if self._holder.waiting:
            counters[Counter.OUT_NOSA] += self._holder.expire(self._clock())
        if self._early.waiting:
            counters[Counter.ESP_NOTDB] += self._early.expire(self._clock())
        if self._taps is not None:
            self._taps.tick()
        if self._routed is not None:
            self._routed.tick()

    def _lost(self) -> int:
        """Packets that socket buffers had no room for, and reads that told of such."""
        return sum(queue.stats().user_dropped + queue.overruns for queue in self._queues)

    # -- batches ---------------------------------------------------------------------------------------------

    def step(self, queue: Queue) -> int:
        """Read one batch and finish it, and what of it went to the plain queue; returns the number of packets."""
        return self._step(queue) + self._drain()

    def _drain(self) -> int:
        """Finish what went to the plain queue."""
        count, plain = 0, self._plain_queue
        if plain is not None and self._sizes.diverted:
            # The verdicts are given, so all of it is there by now; nothing else of its flows may come before it.
            while more := self._step(plain):
                count += more
            self._sizes.drained()
        return count

    def _step_routed(self, descriptor: int) -> None:
        """What was routed into the device of a tunnel."""
        if self._routed is not None:
            self._path_mtu.advance(self._clock())
            self._routed.step(descriptor, self._emit, self._send)
            if self._fast is not None and self._fast.failed:
                self._outward.resend(self._fast.take_failed())

    def _step(self, queue: Queue) -> int:
        self._active = queue
        fast = self._fast_now()
        if fast is None or queue is self._plain_queue or queue.unsent:
            packets = queue.read()
            return self._process(queue, packets, None) if packets else 0
        return self._mixed(queue, fast, *fast.finished(queue, fast.read(queue)))

    def _mixed(self, queue: Queue, fast: FastPath, finished: int, count: int) -> int:
        """A batch of ``count`` packets, of which the fast path has finished some and left the next one alone.

        The engine takes a few from there on, then the fast path goes on: a packet that only the engine may refuse must not
        cost those behind it the fast path.  Where it is many, they should be many at once: each time twice as many.
        """
        few = FEW
        while True:
            if fast.failed:
                self._outward.resend(fast.take_failed())
            if queue.unsent:
                self._changed = True
            if finished == count:
                return count
            if (left := fast.take_left()) is not None:
                self._finish_super(queue, queue.rest(finished, finished + 1), left)
                finished += 1
            else:
                end = min(finished + few, count)
                few *= 2
                if packets := queue.rest(finished, end):
                    self._process(queue, packets, fast)
                finished = end
            if finished < count and not self._sizes.diverted and not queue.unsent and fast.ready():
                finished = fast.go_on(queue, finished, count)
