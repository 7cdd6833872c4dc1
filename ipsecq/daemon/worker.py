"""A worker process: ``python -m ipsecq.daemon.worker``, started by the supervisor and by nobody else.

It maps the shared table, loads its replica of SAD and SPD, binds its queue, gives up privileges and serves packets
until the supervisor says stop or is gone.  A worker that dies at any point loses the packets in its hands and nothing
else.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import MutableSequence, Sequence
from typing import Any, Final, cast

from ipsecq import fastpath
from ipsecq.counters import Counter
from ipsecq.daemon import privileges
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.log import LOGGER, configure
from ipsecq.daemon.messages import Frame, FrameReader, WorkerSetup, encode_line, take_descriptor
from ipsecq.daemon.replica import Replica
from ipsecq.daemon.table import CounterPages, SharedTable
from ipsecq.daemon.taprequest import MIRROR
from ipsecq.datapath.droplog import DropLog
from ipsecq.datapath.enc0 import Enc0
from ipsecq.datapath.fast import FastPath
from ipsecq.datapath.loop import WorkerLoop
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.queue import Queue
from ipsecq.datapath.ring import above, take_over
from ipsecq.datapath.routed import RoutedTunnels
from ipsecq.datapath.sockdiag import SocketLookup
from ipsecq.datapath.tap import Mirror, Taps, TapSink, mirror_socket
from ipsecq.datapath.udp import UdpOutput
from ipsecq.engine.emit import Acquire, Event, Expired, PathMtuLearned, PeerMoved
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.engine.outbound_run import OutboundRuns
from ipsecq.engine.tables import Tables
from ipsecq.errors import IpsecqError, NetfilterError, StateError
from ipsecq.netfilter.steering import worker_of
from ipsecq.policy.interface import Interface

log: Final = logging.getLogger(f"{LOGGER}.worker")

QUEUE_PATIENCE: Final = 3.0
"""Seconds to wait for a queue that a dead predecessor may still hold."""
REFUSAL_SECONDS: Final = 1.0
"""After a refused lease nobody asks again for this long: every packet of the SA would touch lock and disk."""
MAX_REPORTS: Final = 1 << 18
"""Octets of reports that may wait for the supervisor; what comes then is lost."""


class Leases:
    """The engine's ``lease``: refusals are (0, 0), logged, and remembered for a second."""

    def __init__(self, book: LeaseBook) -> None:
        self._book = book
        self._refused: dict[int, float] = {}

    def __call__(self, slot: int, limit: int) -> tuple[int, int]:
        """See :data:`ipsecq.engine.tables.Lease`."""
        if self._refused and time.monotonic() < self._refused.get(slot, 0.0):
            return 0, 0
        try:
            lease = self._book.lease(slot, limit)
        except StateError as error:
            self._refused[slot] = time.monotonic() + REFUSAL_SECONDS
            log.warning("%s", error)
            return 0, 0
        self._refused.pop(slot, None)
        return lease


class Reports:
    """Lines to the supervisor; never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._waiting = bytearray()

    def send(self, kind: str, **values: object) -> None:
        """One line, or as much as the socket takes now; the rest goes with the next call."""
        if len(self._waiting) < MAX_REPORTS:
            self._waiting += encode_line(kind, **values)
        self.flush()

    def flush(self) -> None:
        """Send what waits."""
        while self._waiting:
            try:
                sent = self._socket.send(self._waiting)
            except OSError:
                return
            del self._waiting[:sent]

    def events(self, events: list[Event]) -> None:
        """What the engine saw in a batch."""
        for event in events:
            if isinstance(event, Acquire):
                self.send(
                    "acquire", protocol=event.protocol, mode=event.mode, src=event.src.hex(), dst=event.dst.hex(),
                    reqid=event.reqid, policy=event.policy,
                )  # fmt: skip
            elif isinstance(event, Expired):
                self.send("expired", dst=event.dst.hex(), protocol=event.protocol, spi=event.spi, hard=event.hard)
            elif isinstance(event, PathMtuLearned):
                self.send("path_mtu", dst=event.dst.hex(), mtu=event.mtu)
            elif isinstance(event, PeerMoved):
                self.send(
                    "moved", dst=event.dst.hex(), protocol=event.protocol, spi=event.spi, old_src=event.old_src.hex(),
                    src=event.src.hex(), sport=event.sport,
                )  # fmt: skip


class Worker:
    """One worker over the descriptors that it inherited."""

    def __init__(
        self, index: int, table: SharedTable, counters: memoryview, book: LeaseBook, sock: socket.socket,
        hand: socket.socket,
    ) -> None:  # fmt: skip
        self._index = index
        self._table = table
        self._counters = counters
        self._hand = hand
        self._leases = Leases(book)
        sock.setblocking(False)
        self._socket = sock
        self._frames = FrameReader(sock)
        self._reports = Reports(sock)
        self._replica = Replica()
        self._loop: WorkerLoop | None = None

    def run(self) -> None:
        """Until the supervisor says stop, or is gone."""
        setup = self._first_state()
        if setup is None:
            return
        with above(setup.rings):
            queue = _bind(setup.queues[0], gso=setup.plain_queue >= 0)
            lanes = [_bind(number, gso=queue.gso, room=queue) for number in setup.queues[1:]]
            plain_queue = _bind(setup.plain_queue, room=queue) if queue.gso else None
        if queue.blind:
            log.warning("%s: packets that the kernel drops are not counted; be root or in group root", queue.blind)
        output = RawOutput(setup.mark_done)
        udp = UdpOutput(setup.udp) if setup.udp else None
        rings = take_over(setup.rings, self._index, setup.workers)
        enc0 = Enc0(setup.enc_device, coalescing=setup.coalesce)
        path_mtu = PathMtu(mark=setup.mark_done, floor=lambda: self._replica.sysctl.v4.min_pmtu)
        mirror = mirror_socket(setup.enc_device)
        # The sockets are open; of what is left only netlink (NFQUEUE) and SO_MARK ask for a capability.
        privileges.keep_capabilities([privileges.CAP_NET_ADMIN])
        replica = self._replica
        tables = Tables(
            replica.sad, replica.spd, replica.sysctl, self._table.words, self._counters, self._leases, os.urandom,
            larval=replica.larval, burst_ports=frozenset({setup.udp_port} if setup.udp else ()),
            socket_of=SocketLookup(setup.mark_sockets, setup.enc_device), parallel_sas=setup.parallel_sas,
            natt_ports=setup.natt_ports,
        )  # fmt: skip
        counters = cast("MutableSequence[int]", self._counters)
        outbound = OutboundRuns(tables, path_mtu.mtu_of, path_mtu.source_for)
        inbound = InboundRuns(tables, unite=setup.coalesce)
        routed = RoutedTunnels(
            outbound, counters, lambda each: worker_of(each.policy(4), setup.workers) == self._index,
            gso=setup.plain_queue >= 0, coalescing=setup.coalesce,
        )  # fmt: skip
        tables.interfaces = routed.interfaces
        outbound.on_drop = inbound.on_drop = DropLog(replica.sysctl)
        taps = Taps(outbound, inbound, replica.sysctl)
        fast = FastPath(
            tables, outbound, inbound, path_mtu, output, udp, enc0, routed.device, taps,
            mark_stolen=setup.mark_stolen, mark_sockets=setup.mark_sockets,
        ) if fastpath.active else None  # fmt: skip
        routed.fast = fast
        self._loop = WorkerLoop(
            queue,
            output,
            enc0,
            outbound,
            inbound,
            counters,
            mark_stolen=setup.mark_stolen,
            mark_sockets=setup.mark_sockets,
            path_mtu=path_mtu,
            control_fd=self._socket.fileno(),
            on_control=self._control,
            on_events=self._reports.events,
            lanes=lanes,
            plain_queue=plain_queue,
            taps=taps,
            udp=udp,
            routed=routed,
            fast=fast,
            rings=rings,
        )

        def on_tap(number: int, request: Any) -> None:
            if request is None:
                taps.detach(number)
            elif number == MIRROR:
                if mirror is not None:
                    taps.attach(number, Mirror(mirror, counters))
            elif (descriptor := take_descriptor(self._hand, number)) >= 0:
                taps.attach(number, TapSink(
                    descriptor, self._index, counters,
                    ways=request.ways, spis=request.spis, snaplen=request.snaplen, share=request.share,
                ))  # fmt: skip

        replica.on_tap = on_tap
        for number, request in replica.taps.items():
            on_tap(number, request)

        def on_interfaces(interfaces: tuple[Interface, ...]) -> None:
            routed.become(interfaces)
            replica.spd.generation += 1  # verdicts that were found with the others

        replica.on_interfaces = on_interfaces
        on_interfaces(replica.interfaces)
        replica.on_path_mtu = lambda dst, mtu: path_mtu.learn(dst, mtu, time.time())
        replica.on_acquire_failed = self._loop.drop_held
        replica.on_routes_changed = path_mtu.invalidate
        # What lives now lives on: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        give_back()
        self._reports.send("ready")
        # A change that came right behind the first state has been read already: no descriptor would tell of it.
        self._control()
        try:
            if not replica.stopping:
                self._loop.run()
        finally:
            for part in (taps, mirror, queue, *lanes, plain_queue, *rings, output, udp, enc0, routed):
                if part is not None:
                    part.close()

    def _first_state(self) -> WorkerSetup | None:
        """Wait for the set-up and the whole first state; None when the supervisor went meanwhile."""
        setup: WorkerSetup | None = None
        while not self._frames.closed:
            select.select([self._socket], [], [])
            for generation, operations in self._frames.read():
                rest = operations
                if setup is None:
                    (_, setup), *rest = operations
                    configure(setup.log, journal=setup.journal)
                self._apply((generation, rest))
                if generation:
                    return setup
        return None

    def _control(self) -> None:
        """Between two batches: what the supervisor sent."""
        for frame in self._frames.read():
            if self._apply(frame) and self._loop is not None:
                self._loop.retry_held()
        if (self._frames.closed or self._replica.stopping) and self._loop is not None:
            self._loop.stop()

    def _apply(self, frame: Frame) -> bool:
        generation, operations = frame
        useful = self._replica.apply(operations)
        # A long change is work too.
        self._counters[Counter.HEARTBEAT] += 1
        if generation:
            self._reports.send("ack", generation=generation)
        return useful


def give_back() -> None:
    """Let the kernel have what the first state took only while it was read (glibc's ``malloc_trim``)."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _bind(number: int, *, gso: bool = False, room: Queue | None = None) -> Queue:
    deadline = time.monotonic() + QUEUE_PATIENCE
    while True:
        try:
            return Queue(number, gso=gso, room=room)
        except NetfilterError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the arguments are descriptors that the supervisor left open."""
    parser = argparse.ArgumentParser(prog="ipsecq-worker")
    for name in ("index", "parent", "table", "counters", "state", "control", "hand"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args(argv)
    privileges.set_name(f"ipsecq-w{arguments.index}")
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the supervisor, sent to the terminal's whole group
    sock = socket.socket(fileno=arguments.control)
    try:
        privileges.forbid_dumps()
        privileges.die_with_parent(arguments.parent)
        privileges.lock_memory()
        table = SharedTable.attach(arguments.table)
        book = LeaseBook.attach(arguments.state, table)
        counters = CounterPages(arguments.counters).page(arguments.index)
        hand = socket.socket(fileno=arguments.hand)
        Worker(arguments.index, table, counters, book, sock, hand).run()
    except IpsecqError as error:
        sock.setblocking(True)
        sock.settimeout(1.0)
        Reports(sock).send("failed", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
