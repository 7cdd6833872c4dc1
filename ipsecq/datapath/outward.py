"""What a batch emitted, given to the kernel: datagrams to the network, decapsulated packets to enc0."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Final

from ipsecq.counters import Counter
from ipsecq.datapath.enc0 import Enc0
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.udp import UdpOutput
from ipsecq.engine.emit import Burst, Emissions
from ipsecq.packet.fragments import fragment

BURST: Final = 64
"""Finished datagrams from which on they leave before the batch is done: the far end has a queue, too."""

_DF: Final = 0x40


class Outward:
    """One worker's ways out.  What does not go is counted and lost: a drop beats a queue."""

    def __init__(
        self,
        output: RawOutput,
        udp: UdpOutput | None,
        enc0: Enc0 | None,
        path_mtu: PathMtu,
        counters: MutableSequence[int],
    ) -> None:
        """Without ``udp`` bursts go through ``output``, a datagram at a time."""
        self._output, self._udp, self._enc0 = output, udp, enc0
        self._path_mtu, self._counters = path_mtu, counters
        self._identification = 0

    def send(self, emit: Emissions) -> None:
        """Datagrams and bursts, in their order."""
        wire, start = emit.wire, 0
        for place, burst in emit.bursts:
            if place > start:
                self._send_wire(wire[start:place])
                start = place
            sent = self._udp.send(burst) if self._udp is not None else -1
            if sent < 0:
                self._send_wire(burst.datagrams())
            elif sent < burst.number:
                self._counters[Counter.SEND_FAILED] += burst.number - sent
        if start < len(wire):
            self._send_wire(wire[start:] if start else wire)

    def resend(self, failed: Sequence[Burst | bytes]) -> None:
        """What the fast path could not send: a datagram at a time."""
        for each in failed:
            self._send_wire([each] if isinstance(each, bytes) else each.datagrams())

    def inject(self, emit: Emissions) -> None:
        """Decapsulated packets, in their order."""
        counters, enc0 = self._counters, self._enc0
        count, taken = len(emit.inner) + sum([run.number for _, run in emit.runs]), 0
        if enc0 is not None:
            before = enc0.coalesced
            taken = enc0.write_all(emit.inner, emit.runs)
            counters[Counter.COALESCED] += enc0.coalesced - before
        if count != taken:
            counters[Counter.INJECT_FAILED] += count - taken

    def _send_wire(self, datagrams: list[bytes]) -> None:
        """Send finished datagrams; what a device has become too small for goes in fragments."""
        sent = self._output.send(datagrams)
        if sent != len(datagrams):
            if self._output.too_big:
                sent += self._send_fragments(self._output.too_big)
            self._counters[Counter.SEND_FAILED] += len(datagrams) - sent

    def _send_fragments(self, datagrams: list[bytes]) -> int:
        """Send what a device's MTU refused, in pieces: the MTU shrank since it was asked.  Returns datagrams sent.

        A datagram that must not be fragmented is lost, and the next one finds the new MTU.
        """
        self._path_mtu.invalidate()
        sent = 0
        for datagram in datagrams:
            version4 = datagram[0] < 0x60
            if version4 and datagram[6] & _DF:
                continue
            mtu = self._path_mtu.mtu_of(datagram[16:20] if version4 else datagram[24:40])
            self._identification = (self._identification + 1) & 0xFFFFFFFF
            pieces = fragment(datagram, mtu, self._identification)
            if len(pieces) > 1 and self._output.send(pieces) == len(pieces):
                sent += 1
                self._counters[Counter.OUT_FRAGMENTED] += 1
        return sent
