"""A bundle: the SAs of one policy for one flow, in the order in which they are applied (RFC 4301 appendix, KAME)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ipsecq.counters import Counter
from ipsecq.engine.emit import Burst, Emissions
from ipsecq.engine.outbound_step import OutboundStep
from ipsecq.numbers import IP_MAXPACKET
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.segments import split
from ipsecq.packet.view import PacketView

_BUNDLED: Final = int(Counter.OUT_BUNDLESA)


class Bundle:
    """The steps for one flow, or for several, innermost first, and what they do to a packet's size."""

    __slots__ = ("_counters", "_largest", "_view", "dst", "first", "single", "steps", "tunnels")

    def __init__(self, steps: tuple[OutboundStep, ...], dst: bytes, counters: memoryview) -> None:
        self.steps = steps
        self.first = steps[0]
        self.single = len(steps) == 1
        self.tunnels = any(step.tunnel for step in steps)
        """The finished datagram has a header of our making."""
        self.dst = dst
        """Where the finished datagram goes: the outermost tunnel's far end, or the packet's own destination."""
        self._view: PacketView | None = None if self.single else PacketView()
        self._largest: dict[tuple[int, int], int] | None = None
        self._counters = counters

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """The finished datagram, or the Counter of the drop.  ``view`` has loaded ``packet``."""
        result = self.first.apply(packet, view, now, emit)
        between = self._view
        if between is None:
            return result
        for step in self.steps[1:]:
            if isinstance(result, int):
                return result
            between.load(result)
            result = step.apply(result, between, now, emit)
        if not isinstance(result, int):
            self._counters[_BUNDLED] += 1
        return result

    def apply_run(
        self, packet: Buffer, view: PacketView, size: int, now: float, emit: Emissions
    ) -> tuple[list[bytes] | list[Burst], int]:
        """The finished datagrams of a super-packet's segments of ``size`` octets of data, in order, and 0.

        Or those up to the first drop, and its Counter.
        """
        if self.single:
            run = self.first.apply_run(packet, view, size, now, emit)
            if run is not None:
                return run, 0
        finished: list[bytes] = []
        piece = PacketView()
        for segment in split(packet, size, view):
            piece.load(segment)
            result = self.apply(segment, piece, now, emit)
            if isinstance(result, int):
                return finished, result
            finished.append(result)
        return finished, 0

    def sealed_length(self, length: int, header: int) -> int:
        """Octets of the finished datagram for a packet of ``length`` whose IP header has ``header`` octets.

        IPComp counts as if nothing could be compressed; TFC padding is left out.
        """
        for step in self.steps:
            length = step.sealed_length(length, header)
            if step.tunnel:
                header = 20 if len(step.sa.dst) == 4 else 40
        return length

    def largest(self, mtu: int, header: int) -> int:
        """The largest packet whose finished datagram fits ``mtu``: the tunnel's MTU for this flow.  May be below 68."""
        if self._largest is None:
            self._largest = {}
        found = self._largest.get((mtu, header))
        if found is None:
            low, high = header, mtu
            while low < high:
                middle = (low + high + 1) // 2
                if self.sealed_length(middle, header) <= mtu:
                    low = middle
                else:
                    high = middle - 1
            if len(self._largest) > 64:  # path MTUs come and go; a peer must not make this grow
                self._largest.clear()
            found = self._largest[mtu, header] = low
        return found


class PaddedBundle(Bundle):
    """A bundle with TFC padding, which fills what the path MTU leaves and no more: alone it never makes a packet too long.

    A class of its own, so that other bundles are not asked for padding with each packet.
    """

    __slots__ = ("_mtu_of", "_padded")

    def __init__(
        self, steps: tuple[OutboundStep, ...], dst: bytes, counters: memoryview, mtu_of: Callable[[bytes], int]
    ) -> None:
        """``mtu_of`` is that of :class:`ipsecq.engine.outbound.Outbound`."""
        super().__init__(steps, dst, counters)
        self._mtu_of = mtu_of
        self._padded = [
            (step.padding, Bundle(steps[place:], dst, counters))
            for place, step in enumerate(steps) if step.padding is not None
        ]  # fmt: skip

    def apply(self, packet: Buffer, view: PacketView, now: float, emit: Emissions) -> bytes | int:
        """See :class:`Bundle`."""
        mtu = min(self._mtu_of(self.dst), IP_MAXPACKET)
        for padding, onward in self._padded:  # an SA may be in several bundles
            padding.fill = min(padding.wanted, onward.largest(mtu, 0))
        return super().apply(packet, view, now, emit)
