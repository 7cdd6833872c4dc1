"""A peer with the fast path in front of its engine, and what it must have in common with one that has none."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from types import SimpleNamespace

from engine_peers import Peer

from ipsecq.counters import Counter
from ipsecq.datapath.fast import FastPath
from ipsecq.engine.emit import Burst, Emissions, Event
from ipsecq.engine.inbound_run import InboundRuns
from ipsecq.packet.segments import split


@dataclass
class Fast:
    """A peer with a fast path in front of its engine.  Nothing is sent: what would be is kept."""

    peer: Peer
    taken: int = 0
    events: list[Event] = field(default_factory=list)
    paths: SimpleNamespace = field(init=False)
    path: FastPath = field(init=False)

    def __post_init__(self):
        peer = self.peer
        self.paths = SimpleNamespace(version=0, mtu_of=lambda dst: peer.mtu, until=lambda dst: peer.now + 1.0)
        output = SimpleNamespace(descriptor=lambda family: -1)
        sockets = SimpleNamespace(descriptors=lambda family: (-1, -1))
        device = SimpleNamespace(fd=-1, coalescing=True, datagrams=True)
        self.path = FastPath(
            peer.tables, peer.outbound, peer.inbound, self.paths, output, sockets, device, lambda reqid: None, None,
            mark_stolen=1, mark_sockets=0, collect=True,
        )  # fmt: skip

    def send(self, packet: bytes, size: int = 0, *, unfinished: bool = False) -> list[bytes]:
        """The datagrams that a packet becomes, a super-packet's of segments with ``size`` octets."""
        peer, path = self.peer, self.path
        if path.ready() and path.sealer.seal(packet, unfinished, size != 0, size, 0, 0, peer.now):
            self.taken += 1
            return []
        before = self.finish()
        emit = Emissions()
        if size:
            for piece in split(packet, size):
                peer.outbound.process(piece, peer.now, emit)
        else:
            peer.outbound.process(packet, peer.now, emit)
        path.learn_out(0)
        if emit.events:
            path.forget()
        return before + emit.wire + [each for _, burst in emit.bursts for each in burst.datagrams()]

    def finish(self) -> list[bytes]:
        """What the sealer has made."""
        sealer = self.path.sealer
        sealer.finish()
        made, sealer.collected = sealer.collected, []
        return [each for one in made for each in (one.datagrams() if isinstance(one, Burst) else [one])]

    def receive(self, datagrams: list[bytes], *, gso: bool = False) -> list[bytes]:
        """The packets that come out of datagrams."""
        peer, path, out = self.peer, self.path, []
        for datagram in datagrams:
            took = path.opener.open(datagram, gso, peer.now) if path.ready() else 0
            self.taken += took == 1
            if took == 1:
                continue
            out += self.opened()
            emit = Emissions()
            for each in path.opener.rest if took == 2 else [datagram]:
                if gso and took != 2:
                    assert isinstance(peer.inbound, InboundRuns)
                    peer.inbound.process_super(each, peer.now, emit)
                else:
                    peer.inbound.process(each, peer.now, emit)
            path.opener.rest = []
            if took != 2:
                path.learn_in()
            out += emit.inner
            self.events += emit.events
            if emit.events:
                path.forget()
        return out + self.opened()

    def opened(self) -> list[bytes]:
        """What the opener has put together, taken apart again as the kernel would."""
        opener, out = self.path.opener, []
        opener.finish()
        for virtio, packet in opener.collected:
            flags, kind, header, size, offset, place = struct.unpack("=BBHHHH", virtio)
            if not kind:
                assert (flags, header, size, offset, place) == (0, 0, 0, 0, 0)
                out.append(packet)
                continue
            udp_run = kind == 5
            assert flags == 1
            assert kind in {1 if packet[0] >> 4 == 4 else 4, 5}
            assert place == (6 if udp_run else 16)
            assert offset == (20 if packet[0] >> 4 == 4 else 40)
            assert header == offset + (8 if udp_run else packet[offset + 12] >> 4 << 2)
            out += split(packet, size)
        opener.collected = []
        return out


def alike(one: Peer, other: Peer) -> None:
    """All counts but how often the flow cache was asked: the fast path has its own."""
    left, right = one.tables.counters.tolist(), other.tables.counters.tolist()
    right[Counter.COALESCED] = left[Counter.COALESCED]
    right[Counter.FAST_PACKETS] = left[Counter.FAST_PACKETS]
    right[Counter.SUPER_PACKETS] = left[Counter.SUPER_PACKETS]
    assert {Counter(n): (a, b) for n, (a, b) in enumerate(zip(left, right, strict=True)) if a != b} == {}
    assert one.tables.words.tolist() == other.tables.words.tolist()
