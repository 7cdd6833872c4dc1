"""A batch of packets through the engines: verdicts, then what leaves, and what waits for an SA.

Verdicts go first, datagrams after them: a verdict is what makes connection tracking confirm the flow, and the answer
to a datagram may come back before the next system call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, MutableSequence, Sequence
from typing import Final, Protocol

from ipsecq.counters import FIRST_DROP, Counter, Fate
from ipsecq.datapath.accounts import Refusals, account
from ipsecq.datapath.fast import FastPath
from ipsecq.datapath.gso import SegmentSizes, flow_of
from ipsecq.datapath.hold import Holder
from ipsecq.datapath.inward import FORWARD, LONE, InboundEngine, Inward
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.nfqueue import NF_ACCEPT, NF_DROP, NF_QUEUE, NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO
from ipsecq.datapath.outward import BURST, Outward
from ipsecq.datapath.queue import Packet, Queue
from ipsecq.datapath.ring import PacketRing
from ipsecq.datapath.routed import RoutedTunnels
from ipsecq.datapath.tap import Taps
from ipsecq.engine.emit import Acquire, Emissions, Event, PathMtuLearned
from ipsecq.engine.outbound_run import MIN_RUN
from ipsecq.netfilter.links import is_local
from ipsecq.numbers import Protocol as IpsecProtocol
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.checksum import complete

MAX_ADDRESSES: Final = 4096
"""Addresses that are remembered as this host's, or not."""

EARLY_PACKETS: Final = 512
"""Packets kept for one SA that key management is about to make."""
EARLY_SECONDS: Final = 2.0
"""A peer that uses a new SA before we have it is ahead by milliseconds."""

_ESP: Final = int(IpsecProtocol.ESP)
_UNFINISHED: Final = NFQA_SKB_CSUMNOTREADY | NFQA_SKB_GSO


class Engine(Protocol):
    """One direction of the engine: :class:`ipsecq.engine.outbound.Outbound`, :class:`ipsecq.engine.inbound.Inbound`."""

    def process(self, packet: Buffer, now: float, emit: Emissions) -> int:
        """The fate of one whole IP datagram: a Fate, or the Counter of a drop that the engine has counted."""


class OutboundEngine(Protocol):
    """The outbound direction (``mark``: of the socket's policy), which takes TCP super-packets, too."""

    def process(self, packet: Buffer, now: float, emit: Emissions, mark: int = 0) -> int:
        """As an :class:`Engine` does."""

    def process_super(self, packet: Buffer, size: int, now: float, emit: Emissions, mark: int = 0) -> int:
        """The fate of a super-packet whose segments have ``size`` octets of data; -1: they must come one by one."""

    def process_run(
        self, packets: Sequence[Buffer], unfinished: bool, now: float, emit: Emissions, mark: int = 0
    ) -> int:
        """Replace the first few of ``packets``, all of one flow: how many; 0: the first one comes alone."""


class Batches:
    """One worker's packets in the hands of its engines.  No method is thread-safe."""

    def __init__(
        self,
        queue: Queue,
        outward: Outward,
        engine_out: OutboundEngine,
        engine_in: InboundEngine,
        counters: MutableSequence[int],
        *,
        mark_stolen: int,
        mark_sockets: int,
        path_mtu: PathMtu,
        clock: Callable[[], float],
        on_events: Callable[[list[Event]], None] | None,
        holder: Holder | None,
        plain_queue: Queue | None,
        taps: Taps | None,
        routed: RoutedTunnels | None,
        fast: FastPath | None,
    ) -> None:
        """See :class:`ipsecq.datapath.loop.WorkerLoop`; ``queue`` is the first whose batch may be in hand."""
        self._outward = outward
        self._engine_out, self._engine_in = engine_out, engine_in
        self._counters = counters
        self._mark_stolen, self._mark_sockets = mark_stolen, mark_sockets
        self._path_mtu = path_mtu
        self._clock = clock
        self._on_events = on_events
        self._holder = holder or Holder()
        self._early = Holder(EARLY_PACKETS, 2 * EARLY_PACKETS, EARLY_SECONDS)
        """What the peer sent through an SA that is not here yet."""
        self._plain_queue = plain_queue
        self._taps, self._routed, self._fast = taps, routed, fast
        self._changed = True
        """Something has changed that the fast path may stand on."""
        self._local: dict[bytes, bool] = {}
        """Addresses that ESP came for under an SPI that is not ours: whether they are this host's; until the next tick."""
        self._sizes = SegmentSizes()
        self._emit = Emissions()
        self._inward = Inward(engine_in, self._hold_inbound, self._refuse, self._divert_inbound)
        self._active = queue
        """The queue whose batch is in hand."""
        self._refusals = Refusals(counters)

    # -- a batch ---------------------------------------------------------------------------------------------

    def _process(self, queue: Queue, packets: list[Packet], fast: FastPath | None) -> int:
        """Packets that the engine has to look at; ``fast`` has left the first of them alone."""
        start = time.perf_counter_ns()
        now = self._clock()
        self._changed = True  # what the engine learns (a path MTU, a limit) the fast path has to know
        self._path_mtu.advance(now)
        count = len(packets)
        emit = self._emit
        outbound = self._engine_out.process
        add_verdict, stolen, sockets = queue.add_verdict, self._mark_stolen, self._mark_sockets
        diverted = self._sizes.diverted if queue is not self._plain_queue else None
        if diverted is None:
            for segment in packets:
                self._sizes.learn(segment[4], now)
        entered = self._inward.take(packets, now, emit)
        if fast is not None and packets[0][1] < FORWARD:
            fast.learn_in()
            fast = None
        done = 0
        until = lone = 0
        while done < count:
            # One try around many packets; an exception costs its packet and starts the loop again behind it.
            try:
                for done in range(done, count):  # noqa: B020 (goes on where the last exception was)
                    cookie, hook, mark, info, packet = packets[done]
                    if hook < FORWARD:
                        add_verdict(cookie, entered[done])
                    elif done < until:  # of a run that has been sealed
                        add_verdict(cookie, NF_ACCEPT, mark | stolen)
                    elif diverted and flow_of(packet) in diverted:
                        self._divert(cookie, packet, whole=bool(info & NFQA_SKB_GSO))
                    elif lone <= done and not diverted and (taken := self._outbound_run(packets, done, now)):
                        until = done + taken
                        add_verdict(cookie, NF_ACCEPT, mark | stolen)
                        if fast is not None and not done:
                            fast.learn_out(mark & sockets)
                    elif info & _UNFINISHED:
                        lone = max(lone, done + LONE)
                        self._unfinished(cookie, mark, info, packet, now)
                    else:
                        lone = max(lone, done + LONE)
                        fate = outbound(packet, now, emit, mark & sockets)
                        if fate == 1:  # Fate.DONE
                            add_verdict(cookie, NF_ACCEPT, mark | stolen)
                            if fast is not None and not done:
                                fast.learn_out(mark & sockets)
                        else:
                            self._outbound_rest(fate, cookie, mark, packet, now)
            except Exception:
                self._refuse(packets[done][1], now)
                add_verdict(packets[done][0], NF_DROP)
            done += 1
        queue.flush()
        self._send()
        account(self._counters, start, count)
        return count

    def _open_direct(self, ring: PacketRing, most: int, fast: FastPath | None) -> int:
        """Up to ``most`` datagrams of a ring that the engine has to look at; ``fast`` has left the first one alone."""
        start = time.perf_counter_ns()
        now = self._clock()
        self._changed = True
        self._path_mtu.advance(now)
        datagrams = ring.read(most)
        if not datagrams:
            ring.find()
            return 0
        # A ring has ESP that only passes through this host, too, which the rules leave alone.
        mine = [datagram for datagram in datagrams if self._is_mine(datagram)]
        if mine:
            self._inward.take([(0, 0, 0, 0, memoryview(datagram)) for datagram in mine], now, self._emit)
            if fast is not None and mine[0] is datagrams[0]:
                fast.learn_in()
            self._send()
            account(self._counters, start, len(mine))
        return len(datagrams)

    def _is_mine(self, datagram: bytes) -> bool:
        """Whether ESP is for an SA of ours, or at least for an address of this host's."""
        if datagram[0] >> 4 == 4:
            dst, start = datagram[16:20], (datagram[0] & 15) * 4
        else:
            dst, start = datagram[24:40], 40
        # An SPI that is cut off is none that we know.
        if self._engine_in.knows((dst, _ESP, int.from_bytes(datagram[start : start + 4], "big"))):
            return True
        local = self._local.get(dst)
        if local is None:
            if len(self._local) >= MAX_ADDRESSES:
                self._local.clear()
            local = self._local[dst] = is_local(dst)
        return local

    def _finish_super(self, queue: Queue, packets: list[Packet], left: list[bytes]) -> None:
        """A super-packet of which the fast path has delivered all datagrams but those ``left``."""
        now = self._clock()
        self._changed = True
        for packet in packets:
            queue.add_verdict(packet[0], NF_DROP)
        for datagram in left:
            try:
                if self._engine_in.process(datagram, now, self._emit) == Fate.HOLD:
                    self._hold_inbound(datagram, now)
            except Exception:
                self._refuse(0, now)
        queue.flush()
        self._send()

    def _outbound_run(self, packets: list[Packet], start: int, now: float) -> int:
        """Seal equal packets of one flow in one go, from packet ``start`` on: how many."""
        if len(packets) - start < MIN_RUN:
            return 0
        unfinished = packets[start][3] & _UNFINISHED
        if unfinished & NFQA_SKB_GSO:
            return 0
        run: list[Buffer] = []
        mark = packets[start][2] & self._mark_sockets
        for _, hook, own, info, packet in packets[start:]:
            if hook < FORWARD or info & _UNFINISHED != unfinished or own & self._mark_sockets != mark:
                break
            run.append(packet)
        if len(run) < MIN_RUN:
            return 0
        return self._engine_out.process_run(run, bool(unfinished), now, self._emit, mark)

    def _outbound_rest(self, fate: int, cookie: int, mark: int, packet: Buffer, now: float) -> None:
        """The verdict for an outbound packet that was not simply replaced."""
        if fate >= FIRST_DROP:
            self._active.add_verdict(cookie, NF_DROP)
        elif fate == Fate.PASS:
            self._active.add_verdict(cookie, NF_ACCEPT)
        else:
            if fate == Fate.HOLD:
                self._hold(packet, mark, now)
            self._active.add_verdict(cookie, NF_ACCEPT, mark | self._mark_stolen)

    def _hold(self, packet: Buffer, mark: int, now: float) -> None:
        """Keep a copy until the SA is there.  The original goes the way of what is replaced: the flow is confirmed."""
        dropped = self._holder.hold(self._emit.held, bytes(packet), now, mark & self._mark_sockets)
        if dropped:
            self._counters[Counter.OUT_HELD_OVERFLOW] += dropped

    def _hold_inbound(self, packet: Buffer, now: float) -> None:
        self._counters[Counter.ESP_NOTDB] += self._early.hold(self._emit.held, bytes(packet), now)

    def _unfinished(self, cookie: int, mark: int, info: int, packet: memoryview, now: float) -> None:
        """An outbound packet that counts on a device's offloads: a super-packet, or one without its checksum."""
        if info & NFQA_SKB_GSO:
            self._super(cookie, mark, packet, now)
            return
        whole = complete(packet)
        fate = self._engine_out.process(whole, now, self._emit, mark & self._mark_sockets)
        if fate == Fate.DONE:
            self._active.add_verdict(cookie, NF_ACCEPT, mark | self._mark_stolen)
            if self._fast is not None and self._active is not self._plain_queue:
                self._fast.learn_out(mark & self._mark_sockets)
        else:
            self._outbound_rest(fate, cookie, mark, whole, now)

    def _super(self, cookie: int, mark: int, packet: memoryview, now: float) -> None:
        """A super-packet: sealed in one go where its segments' size is known, else cut by the kernel."""
        self._counters[Counter.SUPER_PACKETS] += 1
        size = self._sizes.size_of(packet, flow_of(packet), now)
        fate = -1
        if size:
            fate = self._engine_out.process_super(packet, size, now, self._emit, mark & self._mark_sockets)
        if fate < 0:
            self._divert(cookie, packet, whole=True)
        elif fate == Fate.DONE:
            self._active.add_verdict(cookie, NF_ACCEPT, mark | self._mark_stolen)
            if self._fast is not None:
                self._fast.learn_out(mark & self._mark_sockets, 0, size, self._sizes.until(flow_of(packet)))
            if self._emit.bursts or len(self._emit.wire) >= BURST:
                # The far end has a queue, too, and the sooner it starts the better.
                self._active.flush()
                self._send()
        else:
            self._outbound_rest(fate, cookie, mark, packet, now)

    def _divert_inbound(self, packet: memoryview) -> int:
        """The verdict that gives an inbound super-packet to the plain queue, if there is one."""
        self._counters[Counter.SUPER_PACKETS] += 1
        if self._plain_queue is None:
            self._counters[Counter.OVERLOAD] += 1
            return NF_DROP
        self._sizes.divert(packet, None, whole=False)
        return NF_QUEUE | self._plain_queue.number << 16

    def _divert(self, cookie: int, packet: memoryview, *, whole: bool) -> None:
        """Give a packet to the plain queue, if there is one."""
        if self._plain_queue is not None:
            self._sizes.divert(packet, flow_of(packet), whole=whole)
            self._active.add_requeue(cookie, self._plain_queue.number)
        else:
            self._counters[Counter.OVERLOAD] += 1
            self._active.add_verdict(cookie, NF_DROP)

    def _refuse(self, hook: int, now: float) -> None:
        """Count the packet that made the engine raise."""
        counter = Counter.OUT_INVAL if hook >= FORWARD else Counter.IN_INVAL
        self._refusals.count(counter, now, f"a packet at hook {hook}")

    # -- what leaves -----------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Everything that a batch emitted: datagrams, decapsulated packets, events."""
        emit = self._emit
        if emit.wire or emit.bursts:
            self._outward.send(emit)
        if emit.inner or emit.runs:
            self._outward.inject(emit)
        if emit.interfaces and self._routed is not None:
            self._routed.inject(emit)
        if emit.events:
            if self._fast is not None:
                self._fast.forget()
            for event in emit.events:
                if isinstance(event, PathMtuLearned):
                    self._path_mtu.learn(event.dst, event.mtu, self._clock())
            if self._on_events is not None:
                self._on_events(emit.events)
        emit.clear()
        if self._taps is not None and self._taps.sinks:
            self._taps.flush()

    # -- packets that wait -----------------------------------------------------------------------------------

    def retry_held(self) -> int:
        """Try the held packets again, after an SA or a policy came; returns how many found their way.

        Those that still wait keep the time of their arrival; what the policy now refuses is dropped.
        """
        if self._early.waiting:
            self._retry_early()
        now = self._clock()
        self._path_mtu.advance(now)
        emit, found = self._emit, 0
        if self._routed is not None:
            found = self._routed.retry_held(emit)
        for since, packet, mark in self._holder.release_all():
            try:
                fate = self._engine_out.process(packet, now, emit, mark)
            except Exception:
                self._refusals.count(Counter.OUT_INVAL, now, "a held packet")
                continue
            if fate == Fate.HOLD:
                self._counters[Counter.OUT_HELD_OVERFLOW] += self._holder.hold(emit.held, packet, since, mark)
            elif fate == Fate.PASS:
                # The policy has gone and the packet is free to leave as it is; its original was stolen.
                emit.wire.append(packet)
                found += 1
            elif fate < FIRST_DROP:
                found += 1
        self._send()
        return found

    def _retry_early(self) -> None:
        """Open what came before its SA did; the engine counts what it drops."""
        now, emit = self._clock(), self._emit
        for since, packet, _ in self._early.release_all():
            try:
                if self._engine_in.process(packet, now, emit) == Fate.HOLD:
                    self._counters[Counter.ESP_NOTDB] += self._early.hold(emit.held, packet, since)
            except Exception:
                self._refusals.count(Counter.IN_INVAL, now, "a held packet")
        self._send()

    def drop_held(self, protocol: int, src: bytes, dst: bytes, reqid: int) -> int:
        """Drop the packets that wait for an SA of this kind: nobody can make it.  Returns how many."""
        dropped = 0
        for key in self._holder.held():
            if isinstance(key, Acquire) and (key.protocol, key.src, key.dst, key.reqid) == (protocol, src, dst, reqid):
                dropped += len(self._holder.release(key))
        if self._routed is not None:
            dropped += self._routed.drop_held(protocol, src, dst, reqid)
        self._counters[Counter.OUT_NOSA] += dropped
        return dropped
