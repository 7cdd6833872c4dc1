"""The way out for many equal packets of one flow: small datagrams, acknowledgements, as they come in batches."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from ipsecq.counters import Counter
from ipsecq.engine.bundle import Bundle
from ipsecq.engine.emit import Emissions
from ipsecq.engine.outbound import Outbound
from ipsecq.engine.outbound_esp import EspStep
from ipsecq.numbers import IPPROTO_TCP, IPPROTO_UDP
from ipsecq.packet.buffer import Buffer

MIN_RUN: Final = 4
"""Packets from which on an array is cheaper."""

_OUT_PACKETS: Final = int(Counter.OUT_PACKETS)
_OUT_BYTES: Final = int(Counter.OUT_BYTES)
_FLOW_HIT: Final = int(Counter.FLOW_HIT)

# Version, TOS and length; flags; protocol; addresses and ports (and UDP's length).  In IPv6 the flow label, too.
_READ: Final = {
    (4, IPPROTO_TCP): Struct(">4s2xHxB2x12s").unpack_from,
    (4, IPPROTO_UDP): Struct(">4s2xHxB2x14s").unpack_from,
    (6, IPPROTO_TCP): Struct(">7sx36s").unpack_from,
    (6, IPPROTO_UDP): Struct(">7sx38s").unpack_from,
}


class OutboundRuns(Outbound):
    """An outbound side that takes runs."""

    def process_run(
        self, packets: Sequence[Buffer], unfinished: bool, now: float, emit: Emissions, mark: int = 0
    ) -> int:
        """Do for the first few of ``packets`` what :meth:`process` would do, in one go; returns for how many.

        They are of one known flow and equally long, and all of them are replaced (``Fate.DONE``).  ``unfinished``: their
        TCP or UDP checksums are not filled in.  0: the first one must be taken alone.
        """
        view = self._view
        first = packets[0]
        if not view.load(first) or view.protocol not in {IPPROTO_UDP, IPPROTO_TCP} or view.fragment_word & 0x3FFF:
            return 0
        if view.offset != (20 if view.version == 4 else 40):
            return 0
        if self._generation != self._tables.generation():
            self._forget()
        decision = self._flows.get((view.src, view.dst, view.protocol, view.sport, view.dport, False, mark))
        if not isinstance(decision, Bundle) or not decision.single or not isinstance(decision.first, EspStep):
            return 0
        length = view.length
        if view.length < view.offset + (20 if view.protocol == IPPROTO_TCP else 8):
            return 0
        if decision.sealed_length(length, view.header_length) > self._mtu_of(decision.dst):
            return 0
        if view.protocol == IPPROTO_UDP and int.from_bytes(first[view.offset + 4 : view.offset + 6], "big") != (
            length - view.offset
        ):
            return 0
        members = alike(packets, view.version, view.protocol, length)
        if len(members) < MIN_RUN:
            return 0
        finished = decision.first.apply_equal(members, unfinished, view, now, emit)
        if finished is None:
            return 0
        count = len(members)
        counters = self._counters
        counters[_OUT_PACKETS] += count
        counters[_OUT_BYTES] += count * length
        counters[_FLOW_HIT] += count
        self._collect(finished, emit)
        return count


def alike(packets: Sequence[Buffer], version: int, protocol: int, length: int) -> list[Buffer]:
    """Those of ``packets``, from the first on, that have its addresses, ports, lengths, TOS and DF.

    The first one is of ``length`` octets and has a TCP or UDP header right behind an IP header without options.
    """
    read = _READ[version, protocol]
    start = read(packets[0])
    members: list[Buffer] = []
    for packet in packets:
        if len(packet) < length or read(packet) != start:
            break
        members.append(packet)
    return members
