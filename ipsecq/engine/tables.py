"""What the engine consults: SAD, SPD, knobs, the shared table, and where numbers and randomness come from."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

from ipsecq.numbers import NATT_PORT
from ipsecq.policy.interface import Interface
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.sysctl import Sysctl

Lease = Callable[[int, int], tuple[int, int]]
"""``lease(slot, limit) -> (first, end)``: numbers first ≤ n < end for the SA whose slot begins at word ``slot``.

``(0, 0)`` refuses: the numbers up to ``limit`` are used up, or the state on disk cannot be trusted.
"""

SocketOf = Callable[[bytes, bytes, int, int, int], int]
"""``socket_of(src, dst, protocol, sport, dport) -> mark`` of the policy of the socket that gets such a packet.

0: of none.  -1: nobody can tell now, so the packet is dropped.
"""

Random = Callable[[int], bytes]
"""``random(n) -> n octets`` that nobody can predict; ``os.urandom`` in the daemon, a seeded one in tests."""


@dataclass(slots=True)
class Tables:
    """One worker's replica of everything that decides about packets."""

    sad: Sad
    spd: Spd
    sysctl: Sysctl
    words: memoryview
    """The shared table, cast to 'Q': every SA's slot (:class:`ipsecq.sa.association.Slot`) is a run of it."""
    counters: memoryview
    """This worker's counter array, cast to 'Q' (:class:`ipsecq.counters.Counter`)."""
    lease: Lease
    random: Random
    natt_ports: frozenset[int] = frozenset((NATT_PORT,))
    """UDP destination ports on which ESP arrives; captures show those of the far side of a NAT, too."""
    unauthenticated: bool = False
    """Open ESP whose separate authentication key is missing.  For captures only: never true on a gateway."""
    burst_ports: frozenset[int] = frozenset()
    """Local UDP ports from which ESP may leave in bursts (:class:`ipsecq.engine.emit.Burst`)."""
    socket_of: SocketOf | None = None
    """Which socket an inbound packet is for; None where there are no sockets (captures)."""
    larval: Set[tuple[bytes, int, int]] = frozenset()
    """Keys (destination, protocol, SPI) of inbound SAs that key management is about to make."""
    parallel_sas: bool = False
    """Flows of one policy are shared by all SAs that fit (:mod:`ipsecq.engine.choice`)."""
    interfaces: dict[int, Interface] = field(default_factory=dict)
    """Route-based tunnels by their reqid: what such an SA opens enters from its interface, or not at all."""

    def generation(self) -> tuple[int, int, int]:
        """Changes whenever an SA, a policy or a knob does: what was derived from them before is then stale."""
        return self.sad.generation, self.spd.generation, self.sysctl.generation


class Pool:
    """Octets of ``random`` drawn in bulk: a system call for every 256 IVs instead of one for each."""

    __slots__ = ("_at", "_octets", "_random")

    SIZE = 4096

    def __init__(self, random: Random) -> None:
        self._random = random
        self._octets = b""
        self._at = 0

    def take(self, n: int) -> bytes:
        """The next ``n`` octets, each given out once.  ``n`` is at most :attr:`SIZE`."""
        at = self._at
        if at + n > len(self._octets):
            self._octets, at = self._random(self.SIZE), 0
        self._at = at + n
        return self._octets[at : at + n]
