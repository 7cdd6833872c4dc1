"""An outbound SA of ESP made ready for packets (:mod:`ipsecq.engine.outbound_step`): one, or all of a super-packet."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

import numpy as np

from ipsecq.counters import Counter
from ipsecq.crypto import cipher
from ipsecq.engine.accounting import Account
from ipsecq.engine.emit import Burst, Emissions
from ipsecq.engine.headers import OuterHeader, own_header
from ipsecq.engine.outbound_step import outer_header, sequence_of
from ipsecq.engine.padding import Padding
from ipsecq.engine.tables import Pool, Tables
from ipsecq.numbers import IP_MAXPACKET, IPPROTO_IPV4, IPPROTO_IPV6, IPPROTO_UDP, Protocol
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.segments import fill_checksums, lay_out
from ipsecq.packet.view import PacketView
from ipsecq.sa.association import SecurityAssociation, Slot
from ipsecq.sa.sequence import LIMIT_32
from ipsecq.transforms import natt
from ipsecq.transforms.esp import EspTransform

_SEQUENCE: Final = int(Slot.SEQUENCE)
_DROPS: Final = int(Slot.DROPS)
_ESP_OUTPUT: Final = int(Counter.ESP_OUTPUT)
_ESP_OBYTES: Final = int(Counter.ESP_OBYTES)
_ESP_TUNNEL: Final = int(Counter.ESP_TUNNEL)

MAX_BURST: Final = 64
"""Datagrams in one burst (UDP_MAX_SEGMENTS before Linux 6.9)."""
MAX_BURST_OCTETS: Final = 65535 - 48
_head: Final = Struct(">IIQ").pack
"""SPI, low sequence number, IV."""


class EspStep:
    """ESP, transport or tunnel mode, inside UDP if the SA says so."""

    def __init__(self, sa: SecurityAssociation, tables: Tables, pool: Pool, tunnel: bool) -> None:
        self.sa = sa
        self.tunnel = tunnel
        built = cipher.build(sa.encryption or "null", sa.encryption_key, sa.authentication, sa.authentication_key)
        self._transform = EspTransform(sa.spi, built, esn=sa.esn)
        self.padding = Padding(sa.tfc_pad) if tunnel and sa.tfc_pad else None
        self._iv_length = built.iv_length
        self._iv_is_counter = built.iv_is_counter
        self._pool = pool
        self.sequence = sequence_of(sa, tables)
        self._account = Account(sa, tables.words)
        self._words, self._base = tables.words, sa.slot
        self._counters = tables.counters
        self._udp = natt.HEADER_LENGTH if sa.natt else 0
        self._protocol = IPPROTO_UDP if sa.natt else int(Protocol.ESP)
        self._outer = outer_header(sa, self._protocol, tables) if tunnel else None
        self._bursts = sa.natt is not None and sa.natt.sport in tables.burst_ports
        # UDP's checksum, which IPv6 needs (the kernel makes it for bursts), and TFC padding are not made for runs.
        plain = tunnel and self.padding is None and (self._bursts or not (sa.natt and len(sa.dst) == 16))
        self._seal_run: Callable[[int, int, list[Buffer], bool], list[bytes]] | None = (
            getattr(built, "seal_run", None) if plain else None
        )
        self.plain = plain
        """Nothing is done to packets but ESP in tunnel mode: :mod:`ipsecq.datapath.fast` may know the SA."""

    @property
    def cipher(self) -> cipher.EspCipher:
        """The SA's cipher."""
        return self._transform.cipher

    @property
    def outer(self) -> OuterHeader | None:
        """What makes the outer headers in tunnel mode."""
        return self._outer

    @property
    def bursts(self) -> bool:
        """Packets leave in bursts."""
        return self._bursts

    @property
    def limits(self) -> tuple[float, float, float, float, float, float]:
        """See :meth:`ipsecq.engine.accounting.Account.limits`."""
        return self._account.limits()

    def apply_run(
        self, packet: Buffer, view: PacketView, size: int, now: float, emit: Emissions
    ) -> list[bytes] | list[Burst] | None:
        """See :class:`OutboundStep`.  One decision, one account and one array of headers for all segments."""
        outer, transform = self._outer, self._transform
        if outer is None or self._seal_run is None:
            return None
        laid = lay_out(packet, view, size, transform.MAX_TRAILER)
        if laid is None:
            return None
        rows, count, full, last = laid
        inner = (count - 1) * full + last
        first = self._take(inner, count, now, emit)
        if not first:
            return None
        next_header = IPPROTO_IPV4 if view.version == 4 else IPPROTO_IPV6
        trailer, final = transform.trailer(full, next_header), transform.trailer(last, next_header)
        rows[:, full : full + len(trailer)] = np.frombuffer(trailer, np.uint8)
        rows[-1, last : last + len(final)] = np.frombuffer(final, np.uint8)
        octets, width = rows.reshape(-1).data, rows.shape[1]
        plaintexts: list[Buffer] = [
            octets[at : at + full + len(trailer)] for at in range(0, (count - 1) * width, width)
        ]
        at = (count - 1) * width
        plaintexts.append(octets[at : at + last + len(final)])
        return self._seal_all(outer, view, first, plaintexts, full, last)

    def apply_equal(
        self, packets: list[Buffer], unfinished: bool, view: PacketView, now: float, emit: Emissions
    ) -> list[bytes] | list[Burst] | None:
        """The datagrams of packets that are as long as the first one, which ``view`` has loaded, and have its header.

        They are TCP or UDP behind IP headers without options; ``unfinished``: their checksums are not filled in.
        None: one by one, please.
        """
        outer, transform, count, length = self._outer, self._transform, len(packets), view.length
        if outer is None or self._seal_run is None:
            return None
        first = self._take(count * length, count, now, emit)
        if not first:
            return None
        trailer = transform.trailer(length, IPPROTO_IPV4 if view.version == 4 else IPPROTO_IPV6)
        joined = bytearray().join([part for packet in packets for part in (packet[:length], trailer)])
        width = length + len(trailer)
        if unfinished:
            fill_checksums(joined, width, view)
        octets = memoryview(joined)
        plaintexts: list[Buffer] = [octets[at : at + width] for at in range(0, count * width, width)]
        return self._seal_all(outer, view, first, plaintexts, length, length)

    def _take(self, octets: int, count: int, now: float, emit: Emissions) -> int:
        """The first of ``count`` sequence numbers, counted in all accounts; 0: one by one, please."""
        # The last packets before a limit are counted one by one.
        if not self._account.allows(octets, count, now) or not (first := self.sequence.take(count)):
            return 0
        self._account.charge(octets, now, emit, count)
        self._words[self._base + _SEQUENCE] = first + count - 1
        counters = self._counters
        counters[_ESP_TUNNEL] += count
        counters[_ESP_OUTPUT] += count
        counters[_ESP_OBYTES] += octets
        return first

    def _seal_all(
        self, outer: OuterHeader, view: PacketView, first: int, plaintexts: list[Buffer], full: int, last: int
    ) -> list[bytes] | list[Burst]:
        """Datagrams of plaintexts with their trailers: packets of ``full`` octets, the last one of ``last``."""
        count = len(plaintexts)
        sealed = self._seal_run(self.sa.spi, first, plaintexts, self.sa.esn) if self._seal_run is not None else []
        if self._bursts:
            return self._in_bursts(outer, view, first, sealed)
        blob, width = self._heads(outer, view, first, count, full, last)
        return [blob[at : at + width] + body for at, body in zip(range(0, count * width, width), sealed, strict=True)]

    def _in_bursts(self, outer: OuterHeader, view: PacketView, first: int, sealed: list[bytes]) -> list[Burst]:
        """Sealed packets, all of one length but the last, which may be shorter; their numbers count from ``first``."""
        sa, ports = self.sa, self.sa.natt
        if ports is None:
            return []
        spi, size = sa.spi, len(sealed[0]) + 16
        most = min(MAX_BURST, MAX_BURST_OCTETS // size)
        bursts: list[Burst] = []
        for start in range(0, len(sealed), most):
            number = first + start
            parts: list[bytes] = []
            for body in sealed[start : start + most]:
                parts += (_head(spi, number & 0xFFFFFFFF, number), body)
                number += 1
            tos, df, label, identification = outer.fields(view.tos, view.dont_fragment, view.flow_label, first + start)
            bursts.append(
                Burst(
                    sa.src, sa.dst, ports.sport, ports.dport, tos, df, label, identification, size,
                    len(parts) >> 1, b"".join(parts),
                )
            )  # fmt: skip
        return bursts

    def _heads(
        self, outer: OuterHeader, view: PacketView, first: int, count: int, full: int, last: int
    ) -> tuple[bytes, int]:
        """Outer headers up to the IV of ``count`` datagrams, one behind the other, and the length of each."""
        room = self._udp + self._transform.sealed_length(full)
        final = self._udp + self._transform.sealed_length(last)
        heads = outer.build_run(
            count, room, final, view.tos, view.dont_fragment, view.flow_label, first, self._udp + 16
        )
        at = outer.length
        if self.sa.natt is not None:
            heads[:, at : at + 8] = np.frombuffer(natt.wrap(b"", self.sa.natt, room), np.uint8)
            heads[-1, at : at + 8] = np.frombuffer(natt.wrap(b"", self.sa.natt, final), np.uint8)
            at += 8
        numbers = (np.arange(count, dtype=np.uint64) + np.uint64(first)).astype(">u8").view(np.uint8).reshape(count, 8)
        heads[:, at : at + 4] = np.frombuffer(self.sa.spi.to_bytes(4, "big"), np.uint8)
        heads[:, at + 4 : at + 8] = numbers[:, 4:]
        heads[:, at + 8 : at + 16] = numbers
        return heads.tobytes(), at + 16

    def sealed_length(self, length: int, header: int) -> int:
        """See :class:`OutboundStep`."""
        if self._outer is not None:
            return self._outer.length + self._udp + self._transform.sealed_length(length)
        return header + self._udp + self._transform.sealed_length(length - header)

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """See :class:`OutboundStep`."""
        outer = self._outer
        header = 0 if outer is not None else view.header_length
        inner = filled = view.length - header
        padding = self.padding
        if padding is not None and padding.fill > inner:
            filled = padding.fill
        behind = self._udp + self._transform.sealed_length(filled)
        if behind + (outer.length if outer is not None else header) > IP_MAXPACKET:
            return Counter.ESP_TOOBIG
        if not self._account.charge(inner, now, emit):
            return Counter.ESP_EXPIRED
        sequence = self.sequence.take(1)
        if not sequence:
            self._words[self._base + _DROPS] += 1
            # Nothing above SEQUENCE was given out and none is left: the numbers ran out, or the lease was refused.
            exhausted = not self.sa.esn and self._words[self._base + _SEQUENCE] >= LIMIT_32
            return Counter.ESP_WRAP if exhausted else Counter.ESP_NOSEQ
        self._words[self._base + _SEQUENCE] = sequence
        counters = self._counters
        if outer is not None:
            next_header = IPPROTO_IPV4 if view.version == 4 else IPPROTO_IPV6
            prefix = outer.build(behind, view.tos, view.dont_fragment, view.flow_label, sequence)
            counters[_ESP_TUNNEL] += 1
        else:
            next_header = packet[view.header_nexthdr]
            prefix = own_header(packet, view, self._protocol, behind)
        if self.sa.natt is not None:
            prefix = natt.wrap(prefix, self.sa.natt, behind)
        iv = sequence.to_bytes(8, "big") if self._iv_is_counter else self._pool.take(self._iv_length)
        counters[_ESP_OUTPUT] += 1
        counters[_ESP_OBYTES] += inner
        payload = packet if not header and view.length == len(packet) else memoryview(packet)[header : view.length]
        sealed = self._transform.seal(payload, next_header, sequence, iv, prefix, filled)
        if self._udp and prefix[0] >= 0x60:  # UDP's checksum may be 0 in IPv4 only
            return natt.finish(sealed)
        return sealed
