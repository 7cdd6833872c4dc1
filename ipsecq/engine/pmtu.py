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
from ipsecq.sysctl import Sysctl
from ipsecq.transforms.natt import HEADER_LENGTH

RECENT: Final = 1 << 20
"""A quoted sequence number must be one of the last so many that the SA has sent; nobody off the path knows it."""

_IPSEC: Final = {int(Protocol.ESP), int(Protocol.AH), int(Protocol.IPCOMP), IPPROTO_UDP}
_SEQUENCE: Final = int(Slot.SEQUENCE)


class PathMtuCheck:
    """Decides about ICMP "fragmentation needed" and ICMPv6 "packet too big" (RFC 4301 section 8.2.1)."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def is_about_us(self, packet: Buffer, view: PacketView, emit: Emissions) -> bool:
        """True when the error names an SA of ours and is dealt with: learned (an event), or refused and counted.

        False: it is about somebody else's packet (IKE, a host behind our NAT that has a tunnel of its own), or nothing
        tells whose, and the kernel should have it.
        """
        error = icmp.parse_error(memoryview(packet)[: view.length])
        if error is None or not error.too_big or error.protocol not in _IPSEC:
            return False
        # A later fragment has no SPI, so nothing ties it to an SA.  Where one is too long, so is the first.
        if error.inner_fragment:
            return False
        protocol, at = error.protocol, error.upper_offset
        if protocol == IPPROTO_UDP:
            if self._tables.natt_ports.isdisjoint((error.sport, error.dport)):
                return False
            protocol, at = int(Protocol.ESP), at + HEADER_LENGTH
        counters = self._tables.counters
        quoted = error.quoted[at : at + 12]
        spi, sequence = _identity(protocol, quoted)
        # No SA has SPI 0, which is IKE's non-ESP marker, nor -1: a keepalive, or a quotation that ends before.
        sa = self._tables.sad.inbound((error.inner_dst, protocol, spi))
        if sa is None:
            return False
        if sa.src != error.inner_src:
            counters[Counter.IN_PMTU_REFUSED] += 1
            return True
        if protocol != Protocol.IPCOMP:
            sent = self._tables.words[sa.slot + _SEQUENCE]
            if sequence < 0 or (sent - sequence) & 0xFFFFFFFF >= min(RECENT, sent):
                counters[Counter.IN_PMTU_REFUSED] += 1
                return True
        counters[Counter.IN_PMTU_LEARNED] += 1
        mtu = max(error.mtu, floor(error.inner_dst, self._tables.sysctl))
        emit.events.append(PathMtuLearned(error.inner_dst, mtu))
        return True


def floor(dst: bytes, sysctl: Sysctl) -> int:
    """The smallest path MTU that is believed of the way to a packed address; ValueError for what is none."""
    if len(dst) not in {4, 16}:
        raise ValueError(f"an address of {len(dst)} octets")
    return sysctl.v4.min_pmtu if len(dst) == 4 else IPV6_MIN_MTU


def _identity(protocol: int, header: bytes) -> tuple[int, int]:
    """SPI (CPI) and sequence number of a quoted header's first octets; -1 for what was not quoted."""
    if protocol == Protocol.IPCOMP:
        return (int.from_bytes(header[2:4], "big"), 0) if len(header) >= 4 else (-1, -1)
    at = 4 if protocol == Protocol.AH else 0
    if len(header) < at + 4:
        return -1, -1
    spi = int.from_bytes(header[at : at + 4], "big")
    return spi, int.from_bytes(header[at + 4 : at + 8], "big") if len(header) >= at + 8 else -1
