"""Packets that are too long for the way behind the tunnel: ICMP errors to their senders, and fragments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ipsecq.counters import Counter, Fate
from ipsecq.engine.bundle import Bundle
from ipsecq.engine.emit import Emissions
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IP_MAXPACKET, IPPROTO_TCP, IPV4_LEAST_MTU, IPV6_MIN_MTU
from ipsecq.packet import icmp
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.fragments import fragment
from ipsecq.packet.view import PacketView

TELL_SECONDS: Final = 1.0
"""Between two ICMPv6 "packet too big" to one TCP sender about one destination."""

TELL_AGAIN_SECONDS: Final = 60.0
"""The same to a sender that perhaps sends fragments that fit: a connected socket hears of each error as EMSGSIZE."""

MAX_TOLD: Final = 4096
"""Pairs of addresses whose last "packet too big" is remembered."""

_DONE: Final = int(Fate.DONE)

SourceFor = Callable[[bytes], bytes]
"""``source_for(dst) -> address``: our own address towards ``dst``, the source of the ICMP errors that we send."""


class Oversize:
    """What :class:`ipsecq.engine.outbound.Outbound` does with them, and whom it has told."""

    def __init__(self, tables: Tables, source_for: SourceFor) -> None:
        self._sysctl = tables.sysctl
        self._counters = tables.counters
        self._source_for = source_for
        self._piece = PacketView()
        self._told: dict[tuple[bytes, bytes], tuple[int, float]] = {}
        self._identification = int.from_bytes(tables.random(4), "big")

    def send(
        self, bundle: Bundle, packet: Buffer, view: PacketView, now: float, emit: Emissions, mtu: int, length: int
    ) -> int:
        """A packet that would leave longer than ``mtu``: an ICMP error, or fragments, or both.

        An IPv4 sender that forbids fragmentation (DF) is told the tunnel's MTU and the packet is dropped.  An IPv6 sender
        is told, too, now and then, but its packet goes on: connection tracking may have put it together out of
        fragments that did fit, and nothing tells the two apart.  Such a packet is taken apart again before it enters the
        tunnel, since no router behind it may; TCP, which nobody fragments, is not.  Else the finished datagram is
        fragmented; or, where its header must have DF (``dfbit`` 1) or it would exceed IP's limit, the packet is, before.
        """
        header = view.header_length
        room = bundle.largest(mtu, header)
        if view.version == 4 and view.dont_fragment:
            self._tell_mtu(packet, view, max(room, IPV4_LEAST_MTU), emit)
            return Counter.IP_TOOBIG
        if view.version == 6 and view.length > IPV6_MIN_MTU:
            room6 = max(room, IPV6_MIN_MTU)
            if self._may_tell(view, room6, now):
                self._tell_mtu(packet, view, room6, emit)
        if view.fragment_word & 0x3FFF and not bundle.first.tunnel:
            return Counter.IP_FRAGMENT
        knobs = self._sysctl.v4
        df = knobs.dfbit == 1 and len(bundle.dst) == 4 and bundle.tunnels
        joined = view.version == 6 and view.protocol != IPPROTO_TCP and view.length > IPV6_MIN_MTU
        before = length > IP_MAXPACKET or df or joined
        self._identification += 1
        if before and bundle.first.tunnel and (joined or view.version == 4):
            identification = self._identification if joined else view.identification
            # IPv6 links carry 1280 octets, whatever the tunnel has to do for it.
            size = max(room, IPV6_MIN_MTU) if joined and not df else room
            pieces = fragment(memoryview(packet)[: view.length], size, identification)
            self._counters[Counter.OUT_FRAGMENTED] += 1
            for piece in pieces:
                self._piece.load(piece)
                result = bundle.apply(piece, self._piece, now, emit)
                if isinstance(result, int):
                    return result
                if len(result) <= mtu:
                    emit.wire.append(result)
                else:
                    emit.wire.extend(self._cut(result, mtu))
            return _DONE if pieces else Counter.IP_TOOBIG
        if length > IP_MAXPACKET or df:
            return Counter.IP_TOOBIG
        result = bundle.apply(packet, view, now, emit)
        if isinstance(result, int):
            return result
        if len(result) <= mtu:  # compressed, and that was enough
            emit.wire.append(result)
            return _DONE
        self._counters[Counter.OUT_FRAGMENTED] += 1
        emit.wire.extend(self._cut(result, mtu))
        return _DONE

    def _cut(self, datagram: bytes, mtu: int) -> list[bytes]:
        """Fragments of a finished datagram.  In IPv4 they keep its identification: AH covers that."""
        own = datagram[0] >> 4 == 4
        identification = int.from_bytes(datagram[4:6], "big") if own else self._identification & 0xFFFFFFFF
        return fragment(datagram, mtu, identification)

    def _tell_mtu(self, packet: Buffer, view: PacketView, mtu: int, emit: Emissions) -> None:
        """Send the sender an ICMP "fragmentation needed" or ICMPv6 "packet too big"."""
        error = icmp.too_big(memoryview(packet)[: view.length], mtu, self._source_for(view.src))
        if error:
            self._counters[Counter.OUT_TOOBIG_SENT] += 1
            emit.wire.append(error)

    def _may_tell(self, view: PacketView, mtu: int, now: float) -> bool:
        """True for a pair of addresses when the MTU has changed, or what was told is forgotten or was not heard."""
        pair = (view.src, view.dst)
        pause = TELL_SECONDS if view.protocol == IPPROTO_TCP else TELL_AGAIN_SECONDS
        told, then = self._told.get(pair, (0, 0.0))
        if told == mtu and now - then < pause:
            return False
        if len(self._told) >= MAX_TOLD:
            self._told.clear()
        self._told[pair] = mtu, now
        return True
