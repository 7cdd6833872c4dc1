"""The inbound packets of a batch: runs of one SA at once, super-packets whole, the rest one by one; in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ipsecq.counters import Fate
from ipsecq.datapath.nfqueue import NF_ACCEPT, NF_DROP, NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO
from ipsecq.datapath.queue import Packet
from ipsecq.engine.emit import Emissions
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.checksum import complete

FORWARD: Final = 2
"""NF_INET_FORWARD: from here on (LOCAL_OUT, POST_ROUTING) a packet is on its way out."""

LONE: Final = 8
"""Packets that are taken one by one after one that began no run."""

_HOLD: Final = int(Fate.HOLD)


class InboundEngine(Protocol):
    """:class:`ipsecq.engine.inbound_run.InboundRuns`."""

    def process(self, packet: Buffer, now: float, emit: Emissions) -> int:
        """The fate of one whole IP datagram: a Fate, or the Counter of a drop that the engine has counted."""

    def knows(self, key: tuple[bytes, int, int]) -> bool:
        """Whether there is an SA by destination, protocol and SPI, or key management is about to make one."""

    def process_run(self, packets: Sequence[Buffer], now: float, emit: Emissions) -> int:
        """Finish the first few of ``packets``, all to be dropped at the queue: how many; 0: the first one comes alone."""

    def process_super(self, packet: Buffer, now: float, emit: Emissions) -> bool:
        """Finish a UDP super-packet that is to be dropped at the queue; False: its datagrams must come one by one."""


class Inward:
    """Feeds the inbound engine.

    ``hold(packet, now)`` keeps a packet whose SA is not here yet, ``refuse(hook, now)`` hears of an exception of the
    engine, ``divert(packet)`` gives the verdict for a super-packet that only the kernel can cut.
    """

    def __init__(
        self,
        engine: InboundEngine,
        hold: Callable[[Buffer, float], None],
        refuse: Callable[[int, float], None],
        divert: Callable[[memoryview], int],
    ) -> None:
        self._engine = engine
        self._hold, self._refuse, self._divert = hold, refuse, divert

    def take(self, packets: list[Packet], now: float, emit: Emissions) -> dict[int, int]:
        """Process what is inbound in a batch: place in the batch to verdict."""
        verdicts: dict[int, int] = {}
        places = [place for place, packet in enumerate(packets) if packet[1] < FORWARD]
        payloads = [packets[place][4] for place in places]
        at, lone, count = 0, 0, len(places)
        diverted = False
        while at < count:
            place = places[at]
            info = packets[place][3]
            taken = 0
            try:
                if info & NFQA_SKB_GSO or diverted:
                    # What comes behind a super-packet that the kernel cuts must not overtake it.
                    if diverted or not self._engine.process_super(payloads[at], now, emit):
                        diverted = True
                        verdicts[place] = self._divert(payloads[at])
                    else:
                        verdicts[place] = NF_DROP
                    at += 1
                    continue
                if at >= lone and at + 1 < count:
                    end = self._end(packets, places, at)
                    # ESP does not care for the checksum of the UDP around it, so one that isn't ready is no matter.
                    taken = self._engine.process_run(payloads[at:end], now, emit) if end - at > 1 else 0
                    if not taken:
                        lone = at + LONE
                if not taken:
                    verdicts[place] = self._one(payloads[at], info, now, emit)
                    at += 1
            except Exception:
                self._refuse(packets[place][1], now)
                verdicts[place] = NF_DROP
                at += 1
            for done in places[at : at + taken]:
                verdicts[done] = NF_DROP
            at += taken
        return verdicts

    @staticmethod
    def _end(packets: list[Packet], places: list[int], start: int) -> int:
        """Where the next super-packet is."""
        for at in range(start, len(places)):
            if packets[places[at]][3] & NFQA_SKB_GSO:
                return at
        return len(places)

    def _one(self, packet: memoryview, info: int, now: float, emit: Emissions) -> int:
        """The verdict for one packet."""
        whole = complete(packet) if info & NFQA_SKB_CSUMNOTREADY else packet
        fate = self._engine.process(whole, now, emit)
        if not fate:
            return NF_ACCEPT
        if fate == _HOLD:
            self._hold(whole, now)
        return NF_DROP
