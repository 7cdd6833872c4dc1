"""What the engine hands to its caller besides the fate of a packet."""

from __future__ import annotations

from typing import NamedTuple

from ipsecq.packet.coalesce import Run


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


class Emissions:
    """Datagrams and events of a batch; the caller empties it with :meth:`clear` after it has sent them.

    ``wire`` holds whole IP datagrams for the network (ESP, AH, IPComp, UDP, and the ICMP errors that we answer with),
    ``inner`` decapsulated packets for the local stack, ``held`` what the last packet with ``Fate.HOLD`` waits for: an
    :class:`Acquire`, or the key of a larval SA.  ``runs`` holds decapsulated packets that are already put together,
    each with the number of packets of ``inner`` that come before it.
    """

    __slots__ = ("events", "held", "inner", "runs", "wire")

    def __init__(self) -> None:
        self.wire: list[bytes] = []
        self.inner: list[bytes] = []
        self.runs: list[tuple[int, Run]] = []
        self.events: list[Event] = []
        self.held: Acquire | tuple[bytes, int, int] | None = None

    def clear(self) -> None:
        """Forget everything; the lists stay the same objects."""
        self.wire.clear()
        self.inner.clear()
        self.runs.clear()
        self.events.clear()
        self.held = None
