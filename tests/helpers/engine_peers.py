"""Two engines wired in memory: what one puts on the wire, the other takes from it."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass, field, replace

from ipsecq.counters import Counter
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound import Inbound
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.standalone import build
from ipsecq.engine.tables import Tables
from ipsecq.numbers import Direction
from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.policy import setpolicy
from ipsecq.policy.model import Policy, Selector
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sysctl import Sysctl


def address(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def network(text: str) -> tuple[bytes, bytes]:
    """First and last address of a prefix."""
    host, _, length = text.partition("/")
    octets = address(host)
    bits = len(octets) * 8
    keep = int(length) if length else bits
    mask = ((1 << keep) - 1) << (bits - keep)
    first = int.from_bytes(octets, "big") & mask
    last = first | ~mask & ((1 << bits) - 1)
    return first.to_bytes(len(octets), "big"), last.to_bytes(len(octets), "big")


def udp(src: str, dst: str, payload: bytes, *, sport: int = 1000, dport: int = 2000, tos: int = 0, df: bool = False,
        ttl: int = 64) -> bytes:  # fmt: skip
    """A UDP datagram with right checksums."""
    s, d = address(src), address(dst)
    head = sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + (8 + len(payload)).to_bytes(2, "big")
    zero = head + b"\0\0" + payload
    segment = head + (checksum.transport(s, d, 17, zero) or 0xFFFF).to_bytes(2, "big") + payload
    if len(s) == 4:
        return ipv4.header(s, d, 17, len(segment), tos=tos, df=df, ttl=ttl, identification=7) + segment
    return ipv6.header(s, d, 17, len(segment), traffic_class=tos, hop_limit=ttl) + segment


def policy(direction: str, src: str, dst: str, text: str, protocol: int = 255) -> Policy:
    """One policy from prefixes and an ipsec_set_policy(3) tail such as ``ipsec esp/tunnel/1.1.1.1-2.2.2.2/require``."""
    parsed = setpolicy.parse(f"{direction} {text}")
    selector = Selector(*network(src), *network(dst), protocol)
    way = Direction.OUT if direction == "out" else Direction.IN
    return Policy(way, selector, parsed.action, parsed.transforms, parsed.priority)


@dataclass
class Peer:
    """One gateway's engine with everything it emitted."""

    tables: Tables
    outbound: Outbound
    inbound: Inbound
    emit: Emissions
    mtu: int = 1500
    now: float = 1000.0
    spare: list[SecurityAssociation] = field(default_factory=list)
    socket_mark: int = 0
    """Of the policies of the socket that gets what arrives."""

    def send(self, packet: bytes, mark: int = 0) -> tuple[int, list[bytes]]:
        """Fate of an outbound packet, and what it put on the wire; ``mark`` is of its socket's policies."""
        self.emit.clear()
        fate = self.outbound.process(packet, self.now, self.emit, mark)
        return fate, list(self.emit.wire)

    def receive(self, packet: bytes) -> tuple[int, list[bytes]]:
        """Fate of a datagram from the wire, and the packets that came out of it."""
        self.emit.clear()
        fate = self.inbound.process(packet, self.now, self.emit)
        return fate, list(self.emit.inner)

    def count(self, counter: Counter) -> int:
        return self.tables.counters[counter]


def make_peer(
    sas: list[SecurityAssociation],
    policies: list[Policy],
    knobs: dict[str, int] | None = None,
    mtu: int = 1500,
    spare: list[SecurityAssociation] | None = None,
) -> Peer:
    """An engine with its own copies of the SAs; ``spare`` SAs have their slots but are not in the SAD yet."""
    source = random.Random(4711)
    waiting = [replace(sa) for sa in spare or []]
    tables = build([replace(sa) for sa in sas] + waiting, policies, source.randbytes, Sysctl(knobs or {}))
    for sa in waiting:
        tables.sad.delete(sa.dst, sa.protocol, sa.spi)
    own = {4: address("192.0.2.1"), 16: address("2001:db8::1")}
    peer = Peer.__new__(Peer)
    outbound = Outbound(tables, lambda _: peer.mtu, lambda dst: own[len(dst)])
    tables.socket_of = lambda *flow: peer.socket_mark
    Peer.__init__(peer, tables, outbound, Inbound(tables), Emissions(), mtu, spare=waiting)
    return peer
