"""What the engine hands to its caller besides the fate of a packet."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from ipsecq.numbers import IPPROTO_UDP
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.checksum import complete
from ipsecq.packet.coalesce import Run

UDP_HEADER: Final = 8
_ports: Final = Struct(">HHHH").pack


class Acquire(NamedTuple):
    """An SA is wanted (SADB_ACQUIRE).  Also the key under which the caller keeps the packets that wait for it."""

    protocol: int
    mode: int
    src: bytes
    dst: bytes
    reqid: int
    policy: int
    """``Policy.id``."""


class Expired(NamedTuple):
    """An SA reached a limit while it was carrying a packet (SADB_EXPIRE)."""

    dst: bytes
    protocol: int
    spi: int
    hard: bool


class PathMtuLearned(NamedTuple):
    """An ICMP error about a packet that we really sent says that the path to ``dst`` carries ``mtu`` octets."""

    dst: bytes
    mtu: int


class PeerMoved(NamedTuple):
    """An authenticated packet came from another address or port: the NAT in front of the peer has changed."""

    dst: bytes
    protocol: int
    spi: int
    old_src: bytes
    src: bytes
    sport: int


Event = Acquire | Expired | PathMtuLearned | PeerMoved


class Burst(NamedTuple):
    """Datagrams of ESP in UDP that a UDP socket sends in one call, as the kernel takes them apart itself."""

    src: bytes
    dst: bytes
    sport: int
    dport: int
    tos: int
    df: bool
    flow_label: int
    identification: int
    """For those who have to make the datagrams one by one."""
    size: int
    """Octets of UDP data in each datagram; the last one may have fewer."""
    number: int
    data: bytes

    def datagrams(self) -> list[bytes]:
        """The finished IP datagrams."""
        made = []
        for index in range(self.number):
            piece = self.data[index * self.size : (index + 1) * self.size]
            length = len(piece) + UDP_HEADER
            udp = b"".join((_ports(self.sport, self.dport, length, 0), piece))
            if len(self.dst) == 4:
                identification = self.identification + index & 0xFFFF
                header = ipv4.header(
                    self.src, self.dst, IPPROTO_UDP, length, tos=self.tos, identification=identification, df=self.df
                )
                made.append(header + udp)
                continue
            header = ipv6.header(
                self.src, self.dst, IPPROTO_UDP, length, traffic_class=self.tos, flow_label=self.flow_label
            )
            made.append(complete(header + udp))
        return made


class Entering:
    """Decapsulated packets for one interface: ``inner`` and ``runs`` as in :class:`Emissions`."""

    __slots__ = ("inner", "runs")

    def __init__(self) -> None:
        self.inner: list[bytes] = []
        self.runs: list[tuple[int, Run]] = []


class Emissions:
    """Datagrams and events of a batch; the caller empties it with :meth:`clear` after it has sent them.

    ``wire`` holds whole IP datagrams for the network (ESP, AH, IPComp, UDP, and the ICMP errors that we answer with),
    ``inner`` decapsulated packets for the local stack, ``held`` what the last packet with ``Fate.HOLD`` waits for: an
    :class:`Acquire`, or the key of a larval SA.  ``runs`` holds decapsulated packets that are already put together,
    each with the number of packets of ``inner`` that come before it.  ``interfaces`` holds those that enter from a
    route-based tunnel, by its reqid.
    ``bursts`` holds more for the network, each with the number of datagrams of ``wire`` that go before it.
    """

    __slots__ = ("bursts", "events", "held", "inner", "interfaces", "runs", "wire")

    def __init__(self) -> None:
        self.wire: list[bytes] = []
        self.bursts: list[tuple[int, Burst]] = []
        self.inner: list[bytes] = []
        self.runs: list[tuple[int, Run]] = []
        self.events: list[Event] = []
        self.interfaces: dict[int, Entering] = {}
        self.held: Acquire | tuple[bytes, int, int] | None = None

    def into(self, reqid: int) -> Entering:
        """Where packets go that enter from the interface with that reqid."""
        found = self.interfaces.get(reqid)
        if found is None:
            found = self.interfaces[reqid] = Entering()
        return found

    def clear(self) -> None:
        """Forget everything; the lists stay the same objects."""
        self.wire.clear()
        self.bursts.clear()
        self.inner.clear()
        self.runs.clear()
        self.events.clear()
        self.interfaces.clear()
        self.held = None
