"""An outbound SA made ready for packets, of AH and IPComp; ESP is :mod:`ipsecq.engine.outbound_esp`."""

from __future__ import annotations

from typing import Final

from ipsecq.counters import Counter
from ipsecq.crypto import cipher
from ipsecq.engine.accounting import Account
from ipsecq.engine.emit import Emissions
from ipsecq.engine.headers import own_header
from ipsecq.engine.outbound_esp import EspStep
from ipsecq.engine.outbound_step import OutboundStep, outer_header, sequence_of
from ipsecq.engine.padding import Padding
from ipsecq.engine.tables import Pool, Tables
from ipsecq.numbers import IP_MAXPACKET, IPPROTO_IPV4, IPPROTO_IPV6, Protocol
from ipsecq.packet import ipv4
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.sa.sequence import LIMIT_32
from ipsecq.transforms.ah import AhTransform
from ipsecq.transforms.ipcomp import IpcompTransform

_SEQUENCE: Final = int(Slot.SEQUENCE)
_DROPS: Final = int(Slot.DROPS)

_AH_OUTPUT: Final = int(Counter.AH_OUTPUT)
_AH_OBYTES: Final = int(Counter.AH_OBYTES)
_AH_TUNNEL: Final = int(Counter.AH_TUNNEL)
_IPCOMP_OUTPUT: Final = int(Counter.IPCOMP_OUTPUT)
_IPCOMP_OBYTES: Final = int(Counter.IPCOMP_OBYTES)
_IPCOMP_THRESHOLD: Final = int(Counter.IPCOMP_THRESHOLD)
_IPCOMP_UNCOMPR: Final = int(Counter.IPCOMP_UNCOMPR)


def _identified(header: bytes, sequence: int) -> bytes:
    """An IPv4 header whose identification is not 0: AH covers it, and raw sockets replace a 0 (raw(7))."""
    head = bytearray(header)
    head[4:6] = (sequence & 0xFFFF or 1).to_bytes(2, "big")
    ipv4.fix_checksum(head)
    return bytes(head)


class AhStep:
    """AH, transport or tunnel mode: the same thing but for the header in front."""

    padding: Padding | None = None

    def __init__(self, sa: SecurityAssociation, tables: Tables, tunnel: bool) -> None:
        self.sa = sa
        self.tunnel = tunnel
        icv = cipher.icv(sa.authentication or "", sa.authentication_key)
        # IPv6 always takes 8; what the SA says is for IPv4 (RFC 4302 section 3.3.3.2.1).
        self._transform = AhTransform(sa.spi, icv, esn=sa.esn, align=sa.ah_align if sa.family == 4 else 0)
        self._cleartos = tables.sysctl.v4.ah_cleartos != 0
        self._offsetmask = tables.sysctl.v4.ah_offsetmask
        self.sequence = sequence_of(sa, tables)
        self._account = Account(sa, tables.words)
        self._words, self._base = tables.words, sa.slot
        self._counters = tables.counters
        self._outer = outer_header(sa, int(Protocol.AH), tables) if tunnel else None

    def apply_run(
        self, packet: Buffer, view: PacketView, size: int, now: float, emit: Emissions
    ) -> list[bytes] | None:
        """See :class:`OutboundStep`: never."""
        return None

    def sealed_length(self, length: int, header: int) -> int:
        """See :class:`OutboundStep`."""
        outer = self._outer
        if outer is not None:
            return outer.length + self._transform.header_length(outer.version) + length
        return length + self._transform.header_length(4 if len(self.sa.dst) == 4 else 6)

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """See :class:`OutboundStep`."""
        outer = self._outer
        header = 0 if outer is not None else view.header_length
        version = outer.version if outer is not None else view.version
        inner = view.length - header
        behind = self._transform.header_length(version) + inner
        if behind + (outer.length if outer is not None else header) > IP_MAXPACKET:
            return Counter.AH_TOOBIG
        if not self._account.charge(inner, now, emit):
            return Counter.AH_EXPIRED
        sequence = self.sequence.take(1)
        if not sequence:
            self._words[self._base + _DROPS] += 1
            exhausted = not self.sa.esn and self._words[self._base + _SEQUENCE] >= LIMIT_32
            return Counter.AH_WRAP if exhausted else Counter.AH_NOSEQ
        self._words[self._base + _SEQUENCE] = sequence
        counters = self._counters
        if outer is not None:
            next_header = IPPROTO_IPV4 if view.version == 4 else IPPROTO_IPV6
            prefix = outer.build(behind, view.tos, view.dont_fragment, view.flow_label, sequence)
            counters[_AH_TUNNEL] += 1
        else:
            next_header = packet[view.header_nexthdr]
            prefix = own_header(packet, view, int(Protocol.AH), behind)
        if version == 4 and not (prefix[4] or prefix[5]):
            prefix = _identified(prefix, sequence)
        sealed = self._transform.seal(
            memoryview(packet)[header : view.length], next_header, sequence, prefix,
            cleartos=self._cleartos, offsetmask=self._offsetmask,
        )  # fmt: skip
        if sealed is None:
            return Counter.AH_HDROPS
        counters[_AH_OUTPUT] += 1
        counters[_AH_OBYTES] += inner
        return sealed


class IpcompStep:
    """IPComp, transport or tunnel mode.  What would not become shorter goes on uncompressed (RFC 3173 section 2.2)."""

    padding: Padding | None = None

    def __init__(self, sa: SecurityAssociation, tables: Tables, tunnel: bool) -> None:
        self.sa = sa
        self.tunnel = tunnel
        self._transform = IpcompTransform(sa.spi, sa.compression or "deflate")
        self._account = Account(sa, tables.words)
        self._words, self._base = tables.words, sa.slot
        self._counters = tables.counters
        self._serial = 0  # IPComp has no sequence number, but IPv4 wants an identification
        self._outer = outer_header(sa, int(Protocol.IPCOMP), tables) if tunnel else None
        self._plain = {
            version: outer_header(sa, protocol, tables) for version, protocol in ((4, IPPROTO_IPV4), (6, IPPROTO_IPV6))
        }

    def apply_run(
        self, packet: Buffer, view: PacketView, size: int, now: float, emit: Emissions
    ) -> list[bytes] | None:
        """See :class:`OutboundStep`: never."""
        return None

    def sealed_length(self, length: int, header: int) -> int:
        """See :class:`OutboundStep`: as long as the packet is when nothing can be compressed."""
        return length + (self._outer.length if self._outer is not None else 0)

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """See :class:`OutboundStep`."""
        outer = self._outer
        header = 0 if outer is not None else view.header_length
        inner = view.length - header
        if outer is not None and inner + outer.length > IP_MAXPACKET:
            return Counter.IPCOMP_TOOBIG
        if not self._account.charge(inner, now, emit):
            return Counter.IPCOMP_EXPIRED
        counters = self._counters
        self._serial += 1
        payload = memoryview(packet)[header : view.length]
        if outer is not None:
            next_header = IPPROTO_IPV4 if view.version == 4 else IPPROTO_IPV6
        else:
            next_header = packet[view.header_nexthdr]
        sealed = self._transform.seal(payload, next_header)
        if sealed is None:
            counters[_IPCOMP_THRESHOLD if inner < self._transform.threshold else _IPCOMP_UNCOMPR] += 1
            if outer is None:
                return bytes(packet[: view.length])
            prefix = self._plain[view.version].build(
                inner, view.tos, view.dont_fragment, view.flow_label, self._serial
            )
            return b"".join((prefix, payload))
        counters[_IPCOMP_OUTPUT] += 1
        counters[_IPCOMP_OBYTES] += inner
        if outer is not None:
            prefix = outer.build(len(sealed), view.tos, view.dont_fragment, view.flow_label, self._serial)
        else:
            prefix = own_header(packet, view, int(Protocol.IPCOMP), len(sealed))
        return prefix + sealed


def make_step(sa: SecurityAssociation, tables: Tables, pool: Pool, tunnel: bool) -> OutboundStep:
    """The step that applies ``sa``; ``tunnel`` is the policy's word where the SA's mode is ``any``."""
    if sa.protocol is Protocol.ESP:
        return EspStep(sa, tables, pool, tunnel)
    return AhStep(sa, tables, tunnel) if sa.protocol is Protocol.AH else IpcompStep(sa, tables, tunnel)
