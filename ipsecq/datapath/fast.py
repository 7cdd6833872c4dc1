"""What the compiled fast path knows: flows and SAs that the engine has decided about, and for how long that holds.

Every packet of a new flow goes through the engine; what was decided is told to :mod:`ipsecq.fastpath.sealer` and
:mod:`ipsecq.fastpath.opener` here, if it is simple enough, and they take the packets that follow.  All of it is forgotten
whenever an SA, a policy, a knob or a route changes, and while somebody watches packets.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from ipsecq import compiled, fastpath
from ipsecq.counters import Counter
from ipsecq.datapath.enc0 import Enc0
from ipsecq.datapath.ipsecdev import Routed
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.queue import BATCH, Queue
from ipsecq.datapath.ring import FRAME, PacketRing
from ipsecq.datapath.tap import Taps
from ipsecq.datapath.tun import TunQueue
from ipsecq.datapath.udp import UdpOutput
from ipsecq.datapath.udp import options as udp_options
from ipsecq.engine.emit import Burst
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.inbound_sa import EspReady, InboundSa
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.outbound_esp import EspStep
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP, Mode, Protocol
from ipsecq.packet.view import PacketView
from ipsecq.transforms import natt

_ESP: Final = int(Protocol.ESP)
_PORTS: Final = frozenset({IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMP, IPPROTO_ICMPV6})
_key: Final = struct.Struct(">HHBII").pack
_flow: Final = struct.Struct(">HHB").unpack_from


def flow_key(view: PacketView, mark: int, tag: int) -> bytes:
    """The sealer's key of the flow of the packet in the view."""
    return view.src + view.dst + _key(view.sport, view.dport, view.protocol, mark, tag)


class FastPath:
    """One worker's fast path.  ``devices(reqid)``: where packets enter from that interface, None without one."""

    def __init__(
        self, tables: Tables, outbound: Outbound, inbound: Inbound, path_mtu: PathMtu, output: RawOutput,
        udp: UdpOutput | None, enc0: Enc0 | None, devices: Callable[[int], TunQueue | None], taps: Taps | None,
        *, mark_stolen: int, mark_sockets: int, collect: bool = False,
    ) -> None:  # fmt: skip
        """The parts that it stands beside; only where :data:`ipsecq.fastpath.active`.  ``collect``: send nothing (tests)."""
        self._tables, self._outbound, self._inbound, self._path_mtu = tables, outbound, inbound, path_mtu
        self._output, self._udp, self._enc0, self._devices, self._taps = output, udp, enc0, devices, taps
        sealer: Any
        opener: Any
        ring: Any
        reader: Any
        self._compiled: Any
        self._compiled, sealer, opener, ring, reader = fastpath.modules
        self._ring = ring.Ring
        self.sealer = sealer.Sealer(tables.counters, tables.words, collect)
        self.opener = opener.Opener(tables.counters, tables.words, tables.natt_ports, collect)
        self._path = reader.Reader(self.sealer, self.opener, mark_stolen, mark_sockets)
        self._ways: dict[EspStep, tuple[object, Any]] = {}
        self._targets: dict[int, Any] = {}
        self._places: dict[Queue, int] = {}
        """The places of queues in the path."""
        self._generation: tuple[int, int, int, int] | None = None

    def ready(self) -> bool:
        """Whether it may be used now; forgets what does not hold any more."""
        tables = self._tables
        generation = (
            tables.sad.generation, tables.spd.generation, tables.sysctl.generation, self._path_mtu.version,
        )  # fmt: skip
        if generation != self._generation:
            self.forget()
            self._generation = generation
            # The drop log hears of packets from the engine.
            self.opener.refusing = not (tables.sysctl.v4.debug or tables.sysctl.v6.debug)
        # Verdicts that the kernel had no room for go first, and that is the engine's way.
        return (self._taps is None or not self._taps.sinks) and not any(queue.unsent for queue in self._places)

    def forget(self) -> None:
        """What the engine reports may be what something here stands on: a limit, a peer's address."""
        self.sealer.clear()
        self.opener.clear()
        self._ways.clear()
        self._targets.clear()

    # -- packets ---------------------------------------------------------------------------------------------

    def register(self, queue: Queue) -> None:
        """Serve this queue."""
        self._path.register(queue.fd, queue.vector, BATCH, queue.verdict_header)
        self._places[queue] = len(self._places)

    def register_ring(self, ring: PacketRing) -> None:
        """Serve this packet ring."""
        self._path.ring(self._ring(ring.fd, ring.memory, ring.frames, FRAME, ctypes.addressof(ring.cursor), ring))

    def serve(self, poll: int, until: float) -> tuple[int, int]:
        """Wait and work until ``until`` (monotonic seconds), or until there is something that is not for the fast path.

        ``poll`` is an epoll descriptor.  Returns a descriptor that is readable (-1: none), and the result of
        :meth:`read` where it is that of a queue: :meth:`finished` of those packets are finished.
        """
        found: tuple[int, int] = self._path.serve(poll, until)
        return found

    def read(self, queue: Queue) -> int:
        """Read a batch: how many packets there are, of which :meth:`finished` are finished.  -errno where that failed."""
        got: int = self._path.step(self._places[queue])
        return got

    def finished(self, queue: Queue, got: int) -> tuple[int, int]:
        """Of ``got`` packets that were read: how many are finished, and how many there are, once errors are dealt with.

        The first that is not finished is the engine's; of a super-packet perhaps only :meth:`take_left`.
        """
        path = self._path
        if path.lost:
            queue.keep(path.lost)
            path.lost = b""
        if got < 0:
            queue.refuse(-got)
            return 0, 0
        return path.done, got

    def go_on(self, queue: Queue, first: int, got: int) -> int:
        """Go on with packet ``first`` of the ``got`` that there are: how many are finished then."""
        self._path.go_on(self._places[queue], first, got)
        return self.finished(queue, got)[0]

    def attach(self, descriptor: int, tag: int) -> None:
        """Serve the device of the interface with this reqid, too."""
        self._path.attach(descriptor, tag)

    def detach(self, descriptor: int) -> None:
        """No more."""
        self._path.detach(descriptor)

    def taken(self) -> list[Routed]:
        """The packet of a device that :meth:`serve` has read and not finished, if there is one."""
        left, self._path.left = self._path.left, None
        if left is None:
            return []
        size, unfinished, packet = left
        return [Routed(size, unfinished, memoryview(packet))]

    def take_left(self) -> list[bytes] | None:
        """Datagrams that are left of the first packet behind the finished ones, once; None: all of it is."""
        if not self._path.partial:
            return None
        self._path.partial = False  # the engine goes on behind that packet, perhaps without us
        rest: list[bytes] = self.opener.rest
        self.opener.rest = []
        return rest

    @property
    def failed(self) -> bool:
        """The kernel did not take everything, and it has to go another way."""
        return bool(self.sealer.failed)

    def take_failed(self) -> list[Burst | bytes]:
        """What that is."""
        failed: list[Burst | bytes] = self.sealer.failed
        self.sealer.failed = []
        return failed

    # -- what the engine has decided ---------------------------------------------------------------------------

    def learn_out(self, mark: int, tag: int = 0, size: int = 0, size_until: float = 0.0) -> None:
        """The engine has just sealed a packet: it may do without for the flow's next ones.

        ``mark`` is that of the socket's policy, ``tag`` the reqid of the interface that it was routed into; a
        super-packet had segments with ``size`` octets of data, which is believed up to ``size_until``.
        """
        bundle = self._outbound.settled(mark)
        view = self._outbound.view
        if bundle is None or not bundle.single or view.protocol not in _PORTS or view.fragment_word & 0x3FFF:
            return
        step = bundle.first
        way = self._way_of(step) if isinstance(step, EspStep) else None
        if way is None:
            return
        key = flow_key(view, mark, tag)
        mtu, until = self._path_mtu.mtu_of(bundle.dst), self._path_mtu.until(bundle.dst)
        flow = self.sealer.flows.get(key)
        if flow is None or flow.way is not way:
            flow = self._compiled.Flow(way, mtu, until)
            self.sealer.add(key, flow)
        flow.mtu, flow.mtu_until = mtu, until
        if size:
            flow.size, flow.size_until = size, size_until

    def learn_in(self) -> None:
        """The engine has just opened what the opener had left alone: it may do without for the next ones."""
        key, flow = self.opener.refused_sa, self.opener.refused_flow
        if flow is not None:
            self._allow(key, flow)
        elif isinstance(key, bytes):
            ready = self._inbound.ready((key[:-4], _ESP, int.from_bytes(key[-4:], "big")))
            if isinstance(ready, EspReady) and self._simple(ready.cipher) and ready.sa.mode is not Mode.TRANSPORT:
                self._know(key, ready)

    @staticmethod
    def _simple(cipher: object) -> bool:
        return compiled.aead is not None and isinstance(cipher, compiled.aead.Aead)

    def _know(self, key: bytes, ready: EspReady) -> None:
        sa = ready.sa
        peer, port = ready.peer
        made = self._compiled.Sa(
            ready.cipher, self._compiled.Limits(sa.slot, *ready.limits), sa.esn, ready.window.size,
            max(ready.window.mask, 0), sa.natt is not None, peer, port, ready,
        )  # fmt: skip
        self.opener.add(key, made)

    def _allow(self, sa: Any, flow: bytes) -> None:
        ready: InboundSa = sa.owner
        half = (len(flow) - 5) // 2
        sport, dport, protocol = _flow(flow, 2 * half)
        reqid = self._inbound.admits(
            (flow[:half], flow[half : 2 * half], protocol, sport, dport), ready.as_tunnel
        )
        if reqid is None:
            return
        target = self._targets.get(reqid)
        if target is None:
            device = self._devices(reqid) if reqid else self._enc0
            if device is None:
                return
            failure = Counter.INTERFACE_DOWN if reqid else Counter.INJECT_FAILED
            target = self._targets[reqid] = self._compiled.Target(
                device.fd, device.coalescing, device.datagrams, int(failure), device
            )
        self.opener.allow(sa, flow, target)

    def _way_of(self, step: EspStep) -> Any:
        """The step as the sealer knows it; None: it is not simple enough."""
        limits = step.limits
        found = self._ways.get(step)
        if found is not None and found[0] == limits:
            return found[1]
        outer, sa = step.outer, step.sa
        if not self._simple(step.cipher) or not step.plain or outer is None or (len(sa.dst) == 16 and sa.dst[0] == 0xFE):
            return None
        family = socket.AF_INET if len(sa.dst) == 4 else socket.AF_INET6
        front, options, port = outer.build(0, 0, False, 0, 0), b"", 0
        if sa.natt is not None:
            front, port = natt.wrap(front, sa.natt, 0), sa.natt.dport
        burst: Any = None
        if step.bursts and sa.natt is not None:
            if self._udp is None:
                return None
            sockets = self._udp.descriptors(family)
            if sockets is None:
                return None
            plain, df = sockets
            # The sealer fills in size, TOS and flow label, so there has to be one.
            options = b"".join([_control(*each) for each in udp_options(sa.src, 0, 1, 0)])
            burst = _burst_maker(sa.src, sa.dst, sa.natt.sport, sa.natt.dport)
        else:
            plain = df = self._output.descriptor(family)
            port = 0
        tos_mask, dfbit = outer.rules
        way = self._compiled.Way(
            step.cipher, self._compiled.Limits(sa.slot, *limits), step.sequence.take, front,
            _sockaddr(family, sa.dst, port), options, sa.spi, sa.esn, outer.identification(0), tos_mask, dfbit, plain,
            df, step.bursts, burst,
        )  # fmt: skip
        self._ways[step] = (limits, way)
        return way


def _burst_maker(src: bytes, dst: bytes, sport: int, dport: int) -> Callable[..., Burst]:
    def make(tos: int, df: bool, label: int, identification: int, size: int, number: int, data: bytes) -> Burst:
        return Burst(src, dst, sport, dport, tos, df, label, identification, size, number, data)

    return make


def _sockaddr(family: socket.AddressFamily, address: bytes, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    head = struct.pack("=H", family) + port.to_bytes(2, "big")
    return head + address + bytes(8) if family == socket.AF_INET else head + bytes(4) + address + bytes(4)


def _control(level: int, kind: int, data: bytes) -> bytes:
    """A control message as the kernel reads it."""
    return struct.pack("=Qii", 16 + len(data), level, kind) + data + bytes(-len(data) % 8)
