"""Path MTU and source address towards a destination: the kernel's routes, and what authenticated ICMP taught.

The kernel is asked with a connected UDP socket (ip(7): IP_MTU, ipv6(7): IPV6_MTU), which sends nothing.  Its answer
has in it what ICMP errors about other packets said (of pings, of IKE), which anybody can forge: ``min_pmtu`` bounds that
in IPv4, as it bounds what is learned here.  In IPv6 the kernel itself believes nothing below 1280.
Sources: RFC 1191 section 6.3 (forget after ten minutes), RFC 8201, RFC 4301 section 8.2.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from ipsecq.datapath import rtnetlink
from ipsecq.numbers import IPV4_LEAST_MTU, IPV6_MIN_MTU

IP_MTU: Final = 14
IPV6_MTU: Final = 24
SO_MARK: Final = 36

CACHE_SECONDS: Final = 1.0
LEARNED_SECONDS: Final = 600.0
_MAX_ENTRIES: Final = 8192
_DEFAULT_MTU: Final = 1500
"""For a destination that has no route just now: the packet is dropped elsewhere, with a reason."""


class PathMtu:
    """Answers ``mtu_of(dst)`` and ``source_for(dst)`` from caches that live a second.

    ``advance(now)`` tells the time; the look-ups themselves take none, so that they fit the engine's callbacks.
    """

    def __init__(self, *, mark: int = 0, floor: Callable[[], int] = lambda: IPV4_LEAST_MTU) -> None:
        """``mark`` is the mark of our output, so that policy routing gives the same route; ``floor()`` is ``min_pmtu``."""
        self._mark = mark
        self._floor = floor
        self._now = 0.0
        self.version = 0
        """Changes when answers may have changed before their time."""
        self._cached: dict[bytes, tuple[float, int, bytes]] = {}
        self._learned: dict[bytes, tuple[float, int]] = {}

    def advance(self, now: float) -> None:
        """Set the time (Unix seconds) that cached answers are judged by."""
        self._now = now

    def mtu_of(self, dst: bytes) -> int:
        """The largest datagram, in octets, that the path to a packed address is known to carry."""
        found = self._cached.get(dst)
        if found is None or not 0.0 <= self._now - found[0] < CACHE_SECONDS:
            found = self._ask(dst)
        return found[1]

    def source_for(self, dst: bytes) -> bytes:
        """This host's own address towards a packed address; all zeros when there is no route."""
        found = self._cached.get(dst)
        if found is None or not 0.0 <= self._now - found[0] < CACHE_SECONDS:
            found = self._ask(dst)
        return found[2]

    def learn(self, dst: bytes, mtu: int, now: float) -> bool:
        """Believe that the path to ``dst`` carries ``mtu`` octets; True when that is news.

        Values below what every link carries (68 octets of IPv4, 1280 of IPv6) are raised to it; that ``min_pmtu`` asks
        for more is the engine's affair.  Values that are no smaller than what is known are ignored: an ICMP error never
        raises an MTU.
        """
        self.advance(now)
        mtu = max(mtu, IPV4_LEAST_MTU if len(dst) == 4 else IPV6_MIN_MTU)
        if mtu >= self.mtu_of(dst):
            return False
        if len(self._learned) >= _MAX_ENTRIES:
            self._learned = {key: value for key, value in self._learned.items() if now - value[0] < LEARNED_SECONDS}
            if len(self._learned) >= _MAX_ENTRIES:
                del self._learned[next(iter(self._learned))]
        self._learned[dst] = (now, mtu)
        self._cached.pop(dst, None)
        self.version += 1
        return True

    def invalidate(self) -> None:
        """Ask the kernel again from now on (a route or link changed); what was learned stays."""
        self._cached.clear()
        self.version += 1

    def until(self, dst: bytes) -> float:
        """When the answer about ``dst`` has to be asked for again, Unix seconds."""
        found = self._cached.get(dst)
        return found[0] + CACHE_SECONDS if found is not None else 0.0

    def _ask(self, dst: bytes) -> tuple[float, int, bytes]:
        mtu, source = self._route(dst)
        learned = self._learned.get(dst)
        if learned is not None:
            if self._now - learned[0] < LEARNED_SECONDS:
                mtu = min(mtu, learned[1])
            else:
                del self._learned[dst]
        if len(self._cached) >= _MAX_ENTRIES:
            self._cached.clear()
        found = (self._now, mtu, source)
        self._cached[dst] = found
        return found

    def _route(self, dst: bytes) -> tuple[int, bytes]:
        """What the kernel's routes say: (MTU, source address)."""
        family = socket.AF_INET if len(dst) == 4 else socket.AF_INET6
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                if self._mark:
                    probe.setsockopt(socket.SOL_SOCKET, SO_MARK, self._mark)
                probe.connect((socket.inet_ntop(family, dst), 9))
                if family == socket.AF_INET:
                    mtu = probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
                    if mtu < (floor := self._floor()):
                        mtu = max(mtu, min(floor, rtnetlink.configured_mtu(dst, self._mark)))
                else:
                    mtu = probe.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
                source = socket.inet_pton(family, probe.getsockname()[0].partition("%")[0])
        except OSError:
            return _DEFAULT_MTU, bytes(len(dst))
        # The loopback's 65536 is more than a datagram's length field holds.
        return min(mtu, 65535), source
