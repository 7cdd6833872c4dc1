"""A worker's side of enc(4): inner packets to `ipsecq tap`, and the outbound ones onto enc0 while somebody listens there.

A watcher may take a small share of the worker's time, measured as it is spent; beyond it packets are dropped from the
capture, never from the gateway, and counted.  Nothing here waits.
"""

from __future__ import annotations

import socket
import time
from collections.abc import MutableSequence
from typing import Final

from ipsecq.counters import Counter
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.tap import BEFORE, Tap, Watcher
from ipsecq.packet.buffer import Buffer
from ipsecq.pcap.enc import HEADER_LENGTH, MESSAGE, RECORD
from ipsecq.sysctl import Sysctl

SHARE: Final = 5
"""Percent of the processor time of a busy worker that one watcher may take, unless it asks for another share."""

IDLE_SHARE: Final = 0.5
"""Of the time in which the worker has nothing to do."""

BURST: Final = 4_000_000
"""Nanoseconds that a watcher may have saved up: a batch of packets comes at once."""

OVERHEAD: Final = 1.5
"""What showing a packet costs beside what is measured."""

LONGEST: Final = 200_000
"""Nanoseconds that one step can take; what is beyond was somebody else's turn on the processor."""

END_SECONDS: Final = 5.0
"""How long the last message waits for a reader who has no room for it."""

CHUNK: Final = 60_000
"""Octets of one message to the reader; a packet that is longer goes alone."""


class Budget:
    """Time that may be spent, at most :data:`BURST` saved: see :meth:`refill`."""

    def __init__(self, share: int, counters: MutableSequence[int]) -> None:
        self._share = share / 100
        self._counters = counters
        self._left = float(BURST)
        self._start = 0
        self.dropped = 0

    def refill(self, busy: int, idle: int) -> None:
        """``busy`` nanoseconds of work and ``idle`` ones of waiting have gone by: a share of the one, half of the other."""
        self._left = min(self._left + busy * self._share + idle * IDLE_SHARE, BURST)

    @property
    def ready(self) -> bool:
        """Enough has been saved for packets in a row."""
        return self._left > BURST / 2

    def take(self) -> bool:
        """See :class:`ipsecq.engine.tap.Watcher`.  The clock runs from here to :meth:`spent`."""
        if self._left > 0:
            self._start = time.perf_counter_ns()
            return True
        self.drop(1)
        return False

    def spent(self) -> None:
        """The work that :meth:`take` allowed is done."""
        self._left -= OVERHEAD * min(time.perf_counter_ns() - self._start, LONGEST)

    def drop(self, count: int) -> None:
        """Packets that the reader will not see."""
        self.dropped += count
        self._counters[Counter.TAP_DROPPED] += count


class TapSink(Budget):
    """One reader: a non-blocking SOCK_SEQPACKET descriptor, one message for a batch or a part of it."""

    def __init__(
        self, descriptor: int, worker: int, counters: MutableSequence[int], *, ways: tuple[int, int],
        spis: frozenset[int] = frozenset(), snaplen: int = 262144, share: int = SHARE,
    ) -> None:
        """Own ``descriptor``.  ``snaplen``: octets of a packet that are kept, the enc header not counted."""
        super().__init__(share, counters)
        self.ways, self.spis = ways, spis
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self._worker = worker
        self._snaplen = snaplen
        self._parts: list[bytes] = []
        self._count = self._size = 0
        self.gone = False
        """The reader has closed its end."""

    def record(self, kind: int, enc: bytes, front: bytes, body: Buffer) -> None:
        """See :class:`ipsecq.engine.tap.Watcher`."""
        length = kept = len(front) + len(body)
        if length > self._snaplen:
            kept = self._snaplen
            front, body = front[:kept], body[: max(kept - len(front), 0)]
        if self._size + kept > CHUNK:
            self._send()
        head = RECORD.pack(time.time_ns(), HEADER_LENGTH + kept, HEADER_LENGTH + length, kind)
        self._parts.append(b"".join((head, enc, front, body)))
        self._count += 1
        self._size += RECORD.size + HEADER_LENGTH + kept
        self.spent()

    def flush(self) -> None:
        """Send what waits; after each batch."""
        if self._count:
            self._start = time.perf_counter_ns()
            self._send()
            self.spent()

    def tick(self) -> None:
        """Tell of drops though nothing else is to be told; a few times a second."""
        if self.dropped and not self._count:
            self._send()

    def end(self) -> bool:
        """Send what waits and tell of drops, then close.  False when the reader has no room for that yet."""
        if self._count:
            self._send()
        if self.dropped and not self.gone:
            self._send()
        if self.dropped and not self.gone:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Close the descriptor."""
        self._socket.close()

    def _send(self) -> None:
        head = MESSAGE.pack(self._worker, self._count, min(self.dropped, 0xFFFFFFFF))
        try:
            self._socket.send(b"".join((head, *self._parts)), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self.dropped = 0
            self._counters[Counter.TAP_PACKETS] += self._count
        except BlockingIOError:
            self.drop(self._count)
        except OSError:
            self.gone = True
        self._parts, self._count, self._size = [], 0, 0


class Mirror(Budget):
    """Outbound packets in clear, sent *into* enc0 so that captures on it see them; a worker reads and drops them there."""

    ways = (0, BEFORE)
    spis: frozenset[int] = frozenset()
    gone = False

    def __init__(self, sock: socket.socket, counters: MutableSequence[int]) -> None:
        """``sock`` comes from :func:`mirror_socket` and belongs to the caller."""
        super().__init__(SHARE, counters)
        self._socket = sock

    def record(self, kind: int, enc: bytes, front: bytes, body: Buffer) -> None:
        """See :class:`ipsecq.engine.tap.Watcher`."""
        try:
            self._socket.send(body)
        except OSError:  # no room, or longer than the device takes
            self.drop(1)
        self.spent()

    def flush(self) -> None:
        """Nothing waits."""

    def tick(self) -> None:
        """Nobody is told of drops but the counter."""

    def end(self) -> bool:
        """The socket stays."""
        return True

    def close(self) -> None:
        """The socket stays."""


def mirror_socket(device: str) -> socket.socket | None:
    """A packet socket that sends into ``device`` and receives nothing (packet(7): protocol 0).

    None where there can't be one (no CAP_NET_RAW, no AF_PACKET for this service): a gateway works without.
    """
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    except OSError:
        return None
    try:
        sock.setblocking(False)
        sock.bind((device, 0))
    except OSError:
        sock.close()
        return None
    return sock


class Taps:
    """All watchers of one worker.  ``sinks`` is empty while nobody watches: all that a batch then asks."""

    def __init__(self, outbound: Outbound, inbound: Inbound, sysctl: Sysctl) -> None:
        self._outbound, self._inbound, self._sysctl = outbound, inbound, sysctl
        self.idle = 0
        """Nanoseconds in which the worker waited for packets, to be told by the loop while there are sinks."""
        self._worked = 0
        """Processor time when :meth:`_refill` was called last."""
        self.sinks: dict[int, TapSink | Mirror] = {}
        self._ending: list[tuple[TapSink | Mirror, float]] = []
        """Sinks whose last message has not gone out, and how long it may wait."""
        self._tap: Tap | None = None

    def attach(self, number: int, sink: TapSink | Mirror) -> None:
        """Begin; ``number`` is the watcher's name."""
        self.detach(number)
        if not self.sinks:
            self._worked, self.idle = time.thread_time_ns(), 0
        self.sinks[number] = sink
        self._watch()

    def detach(self, number: int) -> None:
        """End; nothing happens when it has ended already."""
        sink = self.sinks.pop(number, None)
        if sink is not None:
            if not sink.end():
                self._ending.append((sink, time.monotonic() + END_SECONDS))
            self._watch()

    def flush(self) -> None:
        """After each batch with watchers."""
        self._refill()
        for number, sink in list(self.sinks.items()):
            sink.flush()
            if sink.gone:
                self.detach(number)

    def tick(self) -> None:
        """A few times a second."""
        if self._tap is not None:
            self._refill()
            self._tap.tell()
        for sink in self.sinks.values():
            sink.tick()
        ending, self._ending = self._ending, []
        for sink, until in ending:
            if sink.end():
                continue
            if time.monotonic() < until:
                self._ending.append((sink, until))
            else:
                sink.close()

    def close(self) -> None:
        """All watchers go."""
        for number in list(self.sinks):
            self.detach(number)
        for sink, _ in self._ending:
            sink.close()
        self._ending.clear()

    def _refill(self) -> None:
        """Budgets grow by the worker's time; what it waited for others on the processor is not its own."""
        worked = time.thread_time_ns()
        busy, idle = worked - self._worked, self.idle
        self._worked, self.idle = worked, 0
        for sink in self.sinks.values():
            sink.refill(busy, idle)
        if self._tap is not None and self._tap.quiet and any(sink.ready for sink in self.sinks.values()):
            self._tap.wake()

    def _watch(self) -> None:
        watchers: list[Watcher] = list(self.sinks.values())
        self._tap = tap = Tap(watchers, self._sysctl) if watchers else None
        self._outbound.watch(tap)
        self._inbound.watch(tap)
