"""A worker's share of the route-based tunnels: what is routed into a device is sealed, what its SAs open enters there."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import Final, Protocol

from ipsecq.counters import Counter, Fate
from ipsecq.datapath.accounts import Refusals, account
from ipsecq.datapath.fast import FastPath
from ipsecq.datapath.hold import Holder
from ipsecq.datapath.inward import LONE
from ipsecq.datapath.ipsecdev import IpsecDevice, Routed
from ipsecq.datapath.outward import BURST
from ipsecq.engine.emit import Acquire, Emissions
from ipsecq.engine.outbound_run import MIN_RUN
from ipsecq.errors import DaemonError
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.checksum import complete
from ipsecq.packet.segments import split
from ipsecq.policy.interface import Interface

log: Final = logging.getLogger(__name__)

_DONE: Final = int(Fate.DONE)
_EIO: Final = 5
"""What the kernel says to a packet for a device that is down."""


class SealingEngine(Protocol):
    """:class:`ipsecq.engine.outbound_run.OutboundRuns`."""

    def through(self, interface: Interface | None) -> None:
        """Whose policy decides from now on."""

    def forget_interface(self, interface: Interface) -> None:
        """It has gone."""

    def process(self, packet: Buffer, now: float, emit: Emissions) -> int:
        """See Outbound."""

    def process_super(self, packet: Buffer, size: int, now: float, emit: Emissions) -> int:
        """See Outbound."""

    def process_run(self, packets: Sequence[Buffer], unfinished: bool, now: float, emit: Emissions) -> int:
        """See OutboundRuns."""


class _Entry:
    __slots__ = ("device", "holder", "interface")

    def __init__(self, interface: Interface, device: IpsecDevice) -> None:
        self.interface, self.device = interface, device
        self.holder = Holder()


class RoutedTunnels:
    """The interfaces of one worker.  ``is_mine(interface)``: this worker seals for it; every worker opens for all.

    ``send`` gives away what a batch emitted.
    """

    def __init__(
        self,
        engine: SealingEngine,
        counters: MutableSequence[int],
        is_mine: Callable[[Interface], bool],
        *,
        gso: bool = True,
        coalescing: bool = True,
    ) -> None:
        self._engine, self._counters = engine, counters
        self._is_mine, self._gso, self._coalescing = is_mine, gso, coalescing
        self._entries: dict[int, _Entry] = {}
        """By reqid."""
        self._readers: dict[int, _Entry] = {}
        """By descriptor."""
        self._poll: select.epoll | None = None
        self._refusals = Refusals(counters)
        self.fast: FastPath | None = None
        """Takes the packets of known flows before the engine does."""
        self.interfaces: dict[int, Interface] = {}
        """What the inbound engine consults (:class:`ipsecq.engine.tables.Tables`)."""

    # -- which there are ---------------------------------------------------------------------------------------

    def become(self, interfaces: Iterable[Interface]) -> None:
        """Serve these from now on, and no others.  A device that cannot be opened is logged; nothing passes through it."""
        wanted = {interface.reqid: interface for interface in interfaces}
        for reqid, entry in list(self._entries.items()):
            if wanted.get(reqid) != entry.interface or not entry.device.attached:
                self._close(entry)
        for reqid, interface in wanted.items():
            if reqid in self._entries:
                continue
            mine = self._is_mine(interface)
            try:
                device = IpsecDevice(interface.name, reading=mine, gso=self._gso, coalescing=self._coalescing)
            except DaemonError as error:
                log.error("%s", error)
                continue
            entry = self._entries[reqid] = _Entry(interface, device)
            if mine:
                self._readers[device.fd] = entry
                if self.fast is not None:
                    self.fast.attach(device.fd, reqid)
                if self._poll is not None:
                    self._poll.register(device.fd, select.EPOLLIN)
        # An SA of an interface whose device is not here must not come in from somewhere else.
        self.interfaces.clear()
        self.interfaces.update(wanted)

    def attach(self, poll: select.epoll) -> None:
        """Descriptors are polled by ``poll`` from now on."""
        self._poll = poll
        for descriptor in self._readers:
            poll.register(descriptor, select.EPOLLIN)

    def close(self) -> None:
        """Detach from all; the devices stay."""
        for entry in list(self._entries.values()):
            self._close(entry)

    def _close(self, entry: _Entry) -> None:
        self._entries.pop(entry.interface.reqid, None)
        self._counters[Counter.OUT_NOSA] += len(entry.holder.release_all())
        descriptor = entry.device.fd
        if self.fast is not None:
            self.fast.detach(descriptor)
            self.fast.forget()  # or it would write to whatever gets this number next
        if self._readers.pop(descriptor, None) is not None and self._poll is not None:
            self._poll.unregister(descriptor)
        entry.device.close()
        self._engine.forget_interface(entry.interface)

    def device(self, reqid: int) -> IpsecDevice | None:
        """The device of the interface with that reqid."""
        entry = self._entries.get(reqid)
        return entry.device if entry is not None else None

    # -- out ---------------------------------------------------------------------------------------------------

    def step(self, descriptor: int, emit: Emissions, send: Callable[[], None]) -> bool:
        """Seal what waits in a device; False: the descriptor is none of ours."""
        entry = self._readers.get(descriptor)
        if entry is None:
            return False
        start = time.perf_counter_ns()
        batch = entry.device.read_batch()
        if batch is not None and self.fast is not None:
            batch = [*self.fast.taken(), *batch]
        if batch is None:
            log.error("%s: somebody has removed the device", entry.interface.name)
            self._close(entry)
            return True
        if not batch:
            return True
        now, engine = time.time(), self._engine
        engine.through(entry.interface)
        try:
            self._seal(entry, batch, now, emit, send)
        finally:
            engine.through(None)
        send()
        account(self._counters, start, len(batch))
        return True

    def _seal(
        self, entry: _Entry, batch: Sequence[Routed], now: float, emit: Emissions, send: Callable[[], None]
    ) -> None:
        process, count = self._engine.process, len(batch)
        at = lone = 0
        while at < count:
            size, unfinished, packet = batch[at]
            taken = 1
            try:
                if size:
                    self._seal_super(entry, packet, size, now, emit)
                    if self.fast is not None and not at:
                        self.fast.learn_out(0, entry.interface.reqid, size)
                    if emit.bursts or len(emit.wire) >= BURST:
                        send()
                elif at >= lone and (more := self._seal_run(batch, at, now, emit)):
                    taken = more
                    if self.fast is not None and not at:
                        self.fast.learn_out(0, entry.interface.reqid)
                else:
                    lone = max(lone, at + LONE)
                    whole = complete(packet) if unfinished else packet
                    fate = process(whole, now, emit)
                    if fate == Fate.HOLD:
                        self._hold(entry, whole, now, emit)
                    elif fate == _DONE and self.fast is not None and not at:
                        self.fast.learn_out(0, entry.interface.reqid)
            except Exception:
                self._refuse(now)
            at += taken

    def _seal_run(self, batch: Sequence[Routed], start: int, now: float, emit: Emissions) -> int:
        """Seal equal packets of one flow in one go, from packet ``start`` on: how many."""
        unfinished = batch[start].unfinished
        run: list[Buffer] = []
        for routed in batch[start:]:
            if routed.size or routed.unfinished != unfinished:
                break
            run.append(routed.packet)
        return self._engine.process_run(run, unfinished, now, emit) if len(run) >= MIN_RUN else 0

    def _seal_super(self, entry: _Entry, packet: memoryview, size: int, now: float, emit: Emissions) -> None:
        self._counters[Counter.SUPER_PACKETS] += 1
        if self._engine.process_super(packet, size, now, emit) >= 0:
            return
        for segment in split(packet, size):
            if self._engine.process(segment, now, emit) == Fate.HOLD:
                self._hold(entry, segment, now, emit)

    def _hold(self, entry: _Entry, packet: Buffer, now: float, emit: Emissions) -> None:
        self._counters[Counter.OUT_HELD_OVERFLOW] += entry.holder.hold(emit.held, bytes(packet), now)

    def _refuse(self, now: float) -> None:
        """Count a packet that made the engine raise; it is lost."""
        self._refusals.count(Counter.OUT_INVAL, now, "a packet of an interface")

    # -- packets that wait for an SA -----------------------------------------------------------------------------

    def tick(self) -> None:
        """Packets that waited too long."""
        for entry in self._entries.values():
            if entry.holder.waiting:
                self._counters[Counter.OUT_NOSA] += entry.holder.expire(time.time())

    def retry_held(self, emit: Emissions) -> int:
        """Try them again, after an SA came: how many found their way.  The caller sends what was emitted."""
        found = 0
        for entry in self._entries.values():
            if not entry.holder.waiting:
                continue
            waiting = entry.holder.release_all()
            if not entry.device.is_up():
                self._counters[Counter.OUT_NOSA] += len(waiting)
                continue
            now = time.time()
            self._engine.through(entry.interface)
            try:
                for since, packet, _ in waiting:
                    try:
                        fate = self._engine.process(packet, now, emit)
                        if fate == Fate.HOLD:
                            self._hold(entry, packet, since, emit)
                        found += fate == _DONE
                    except Exception:
                        self._refuse(now)
            finally:
                self._engine.through(None)
        return found

    def drop_held(self, protocol: int, src: bytes, dst: bytes, reqid: int) -> int:
        """Nobody can make this SA: drop what waits for it."""
        entry, dropped = self._entries.get(reqid), 0
        if entry is not None:
            for key in entry.holder.held():
                if isinstance(key, Acquire) and (key.protocol, key.src, key.dst) == (protocol, src, dst):
                    dropped += len(entry.holder.release(key))
        return dropped

    # -- in ----------------------------------------------------------------------------------------------------

    def inject(self, emit: Emissions) -> None:
        """Give decapsulated packets to the kernel, each from its interface.  What does not go is counted."""
        counters = self._counters
        for reqid, entering in emit.interfaces.items():
            count = len(entering.inner) + sum([run.number for _, run in entering.runs])
            entry = self._entries.get(reqid)
            if entry is None:
                counters[Counter.INTERFACE_DOWN] += count
                continue
            device = entry.device
            before, down = device.coalesced, device.errors.get(_EIO, 0)
            taken = device.write_all(entering.inner, entering.runs)
            if taken == count:
                counters[Counter.COALESCED] += device.coalesced - before
            elif device.errors.get(_EIO, 0) > down or not device.attached:
                counters[Counter.INTERFACE_DOWN] += count - taken
            else:
                counters[Counter.INJECT_FAILED] += count - taken
