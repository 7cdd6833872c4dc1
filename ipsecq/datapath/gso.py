"""How large the segments of TCP super-packets are, which NFQUEUE does not tell.

NFQUEUE's messages carry no gso_size.  But the kernel knows it: a super-packet that is requeued to a queue without GSO
comes out of that one in segments, and the first of them is of that size.  So each flow's first super-packet goes that
way, and from time to time another one; those between are cut by what was learned.  This follows the MSS, path MTUs
learned inside the tunnel, time stamps and all else that a sender does, without reading a SYN or an ICMP error.

Until the flow's requeued packets are back, all else of the flow has to take the same way, or it would overtake them:
:attr:`SegmentSizes.diverted`.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from ipsecq.packet.buffer import Buffer

FRESH_SECONDS: Final = 1.0
"""How long a learned size is believed.  A sender that has learned of a smaller path MTU is followed after this at the
latest, mostly at once: its super-packets then are no multiples of the old size."""

MAX_FLOWS: Final = 4096

_TCP: Final = 6
_PSH: Final = 0x08
_sequence: Final = Struct(">I").unpack_from

Flow = bytes | None
"""Addresses and ports of a TCP flow; None stands for all packets that are not TCP or have IP options."""


def flow_of(packet: Buffer) -> Flow:
    """The flow of a whole IP packet."""
    if len(packet) < 40:
        return None
    first = packet[0]
    if first == 0x45:
        return bytes(packet[12:24]) if packet[9] == _TCP else None
    return bytes(packet[8:44]) if first >> 4 == 6 and packet[6] == _TCP and len(packet) >= 60 else None


def _data(packet: Buffer) -> tuple[int, int]:
    """Offset of the TCP header and octets of data, of a packet of a known flow."""
    if packet[0] == 0x45:
        offset, length = 20, packet[2] << 8 | packet[3]
    else:
        offset, length = 40, 40 + (packet[4] << 8 | packet[5])
    return offset, length - offset - (packet[offset + 12] >> 4 << 2)


class SegmentSizes:
    """The segment sizes of one worker's TCP flows."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, tuple[float, int]] = {}
        self._wanted: dict[bytes, int] = {}
        self.diverted: set[Flow] = set()
        """Flows that have packets in the plain queue now."""

    def size_of(self, packet: Buffer, flow: Flow, now: float) -> int:
        """Octets of data in each segment of a super-packet; 0: only the kernel knows."""
        found = self._sizes.get(flow) if flow is not None else None
        if found is None or not 0.0 <= now - found[0] < FRESH_SECONDS:
            return 0
        size = found[1]
        offset, data = _data(packet)
        # A sender cuts at multiples of its size, but where it has no more to send.
        return size if data > size and (not data % size or packet[offset + 13] & _PSH) else 0

    def until(self, flow: Flow) -> float:
        """When the flow's size has to be learned again, Unix seconds."""
        found = self._sizes.get(flow) if flow is not None else None
        return found[0] + FRESH_SECONDS if found is not None else 0.0

    def divert(self, packet: Buffer, flow: Flow, *, whole: bool) -> None:
        """The packet goes to the plain queue; if it is a super-packet (``whole``), its size is to be learned there."""
        self.diverted.add(flow)
        if whole and flow is not None:
            self._wanted.setdefault(flow, _sequence(packet, _data(packet)[0] + 4)[0])

    def learn(self, packet: Buffer, now: float) -> None:
        """Look at a packet that came out of the plain queue."""
        flow = flow_of(packet)
        if flow is None or flow not in self._wanted:
            return
        offset, data = _data(packet)
        if self._wanted[flow] != _sequence(packet, offset + 4)[0]:
            return
        del self._wanted[flow]
        if data > 0:
            if len(self._sizes) >= MAX_FLOWS:
                self._sizes.clear()
            self._sizes[flow] = now, data

    def drained(self) -> None:
        """The plain queue is empty: nothing can be overtaken any more."""
        self.diverted.clear()
        self._wanted.clear()
