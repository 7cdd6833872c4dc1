"""ICMP errors about our own IPsec packets: a smaller path MTU, believed only if we really sent the quoted packet."""

from __future__ import annotations

from typing import Final

from ipsecq.counters import Counter
from ipsecq.engine.emit import Emissions, PathMtuLearned
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IPPROTO_UDP, IPV6_MIN_MTU, Protocol
from ipsecq.packet import icmp
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import Slot

RECENT: Final = 1 << 20
"""A quoted sequence number must be one of the last so many that the SA has sent; nobody off the path knows it."""

_IPSEC: Final = {int(Protocol.ESP), int(Protocol.AH), int(Protocol.IPCOMP), IPPROTO_UDP}
_SEQUENCE: Final = int(Slot.SEQUENCE)


class PathMtuCheck:
    """Decides about ICMP "fragmentation needed" and ICMPv6 "packet too big" (RFC 4301 section 8.2.1)."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def is_about_us(self, packet: Buffer, view: PacketView, emit: Emissions) -> bool:
        """True when the error quotes an IPsec packet and is dealt with: learned (an event), or refused and counted.

        False: it is none of ours, and the kernel should have it.
        """
        error = icmp.parse_error(memoryview(packet)[: view.length])
        if error is None or not error.is_too_big or error.protocol not in _IPSEC:
            return False
        counters = self._tables.counters
        spi, sequence, protocol = error.spi, error.sequence, error.protocol
        if protocol == IPPROTO_UDP:
            protocol = int(Protocol.ESP)
        if spi is None:
            return False
        sa = self._tables.sad.inbound((error.dst, protocol, spi))
        if sa is None or sa.src != error.src:
            counters[Counter.IN_PMTU_REFUSED] += 1
            return True
        if protocol != Protocol.IPCOMP:
            sent = self._tables.words[sa.slot + _SEQUENCE]
            if sequence is None or not 0 <= (sent - sequence) & 0xFFFFFFFF < min(RECENT, sent + 1):
                counters[Counter.IN_PMTU_REFUSED] += 1
                return True
        floor = IPV6_MIN_MTU if view.version == 6 else self._tables.sysctl.v4.min_pmtu
        counters[Counter.IN_PMTU_LEARNED] += 1
        emit.events.append(PathMtuLearned(error.dst, max(error.mtu, floor)))
        return True
