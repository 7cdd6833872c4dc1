"""The way in for many packets at once: ESP in tunnel mode of one SA, as it comes in bulk.

One look-up, one pass over the replay window, one account, and an array of the opened packets in place of a look at each.
Whatever is not as simple as that is left to :meth:`Inbound.process`, and in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

import numpy as np

from ipsecq.counters import FIRST_DROP, Counter
from ipsecq.engine.emit import Emissions
from ipsecq.engine.history import History
from ipsecq.engine.inbound import Inbound, spi_of
from ipsecq.engine.inbound_sa import InboundSa
from ipsecq.engine.tables import Tables
from ipsecq.numbers import IPPROTO_UDP, Protocol
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.coalesce import Run
from ipsecq.packet.rows import MIN_ROWS, unite
from ipsecq.transforms import natt

MIN_RUN: Final = 2
"""Packets of one SA from which on a run is cheaper."""

MAX_DATAGRAM: Final = 16384
"""Octets in which the second datagram of a super-packet is looked for."""

_LAST: Final = (1 << 32) - 1
_SPI_NUMBER: Final = Struct(">II").unpack_from
_PACK: Final = Struct(">II").pack
_U16: Final = Struct(">H").pack_into

_ESP: Final = int(Protocol.ESP)
_IN_PACKETS: Final = int(Counter.IN_PACKETS)
_IN_BYTES: Final = int(Counter.IN_BYTES)
_IN_DELIVERED: Final = int(Counter.IN_DELIVERED)


class InboundRuns(Inbound):
    """An inbound side that takes runs.  With ``unite`` packets that follow one another come out as one."""

    def __init__(self, tables: Tables, *, unite: bool = False) -> None:
        super().__init__(tables)
        self._unite = unite

    def process_run(self, packets: Sequence[Buffer], now: float, emit: Emissions) -> int:
        """Do for the first few of ``packets`` what :meth:`process` would do, in one go; returns for how many.

        They are ESP in tunnel mode of one SA, and all of them are finished: delivered (``emit.runs`` if ``unite``, or
        ``emit.inner``) or counted as dropped.  0: the first one must be taken alone.  Raises nothing, whatever the octets.
        """
        view, tables = self._view, self._tables
        if not view.load(packets[0]) or view.fragment_word & 0x3FFF:
            return 0
        if tables.generation() != self._generation:
            self._forget()
        offset, encapsulated, udp = view.offset, 0, view.protocol == IPPROTO_UDP
        if offset != (20 if view.version == 4 else 40) or self._disabled:
            return 0
        if udp:
            offset = natt.esp_offset(packets[0], view, tables.natt_ports)
            encapsulated = view.sport
        elif view.protocol != _ESP:
            return 0
        if offset <= 0 or view.length - offset < 8:
            return 0
        members, numbers = alike(packets, view.version, udp)
        if len(members) < MIN_RUN:
            return 0
        key = (view.dst, _ESP, spi_of(packets[0], _ESP, offset, view.length))
        ready = self._sas.get(key) or self._ready(key)
        if ready is None:
            return 0
        return self._open_run(ready, members, numbers, offset, encapsulated, now, emit)

    def process_super(self, packet: Buffer, now: float, emit: Emissions) -> bool:
        """Do for a UDP super-packet what :meth:`process` would do for each of its datagrams; False: nothing is done.

        Nobody says how large they are, but SPI and next sequence number stand where the next one begins.  A wrong
        guess would fail to authenticate.
        """
        view, tables = self._view, self._tables
        if not view.load(packet) or view.protocol != IPPROTO_UDP or view.fragment_word & 0x3FFF:
            return False
        if tables.generation() != self._generation:
            self._forget()
        offset = natt.esp_offset(packet, view, tables.natt_ports)
        if offset <= 0:
            return False
        spi, number = _SPI_NUMBER(packet, offset)
        key = (view.dst, _ESP, spi)
        ready = self._sas.get(key) or self._ready(key)
        size = _segment(packet, offset, spi, number)
        if ready is None or not size:
            return False
        octets = memoryview(packet)[: view.length]
        places = range(offset, view.length, size)
        if view.length - places[-1] < 8:
            return False
        numbers = list(range(number, number + len(places)))
        if not _consecutive(octets, places, spi, number):
            return False
        pieces: list[Buffer] = [octets[place : place + size] for place in places]
        head, version = bytes(octets[:offset]), view.version
        while len(pieces) >= MIN_RUN:
            done = 0
            if not self._disabled and view.load(packet):
                done = self._open_run(ready, pieces.copy(), numbers, 0, view.sport, now, emit, extra=offset)
            if not done:
                break
            del pieces[:done], numbers[:done]
        for piece in pieces:
            self.process(_datagram(head, version, piece), now, emit)
        return True

    def _open_run(
        self, ready: InboundSa, members: list[Buffer], numbers: list[int], offset: int, encapsulated: int, now: float,
        emit: Emissions, *, extra: int = 0,
    ) -> int:  # fmt: skip
        """Packets of one SA, whose outer header the view has loaded; of them ``extra`` octets are not in the buffers."""
        view, counters = self._view, self._counters
        groups = ready.open_run(members, numbers, view, offset, encapsulated, now, emit)
        count = sum([len(group.plaintexts) for group in groups])
        if not count:
            return 0
        counters[_IN_PACKETS] += count
        counters[_IN_BYTES] += sum(map(len, members[:count])) + extra * count
        outer = view.version, view.tos
        opened = ready.as_tunnel
        tail_used = False
        for index, (plaintexts, end, _) in enumerate(groups):
            if tail_used:
                tail_used = False
                continue
            if not self._unite or len(plaintexts) < MIN_ROWS:
                self._enter_each(plaintexts, end, outer, opened, now, emit)
                continue
            tail = b""
            if index + 1 < len(groups):
                after, length, _ = groups[index + 1]
                tail = after[0][:length] if len(after) == 1 and length <= end else b""
            for first, stop, run in unite(plaintexts, end, tail):
                if run is not None and self._enter_run(run, plaintexts[first][:end], outer, opened, now, emit):
                    tail_used = stop > len(plaintexts)
                else:
                    self._enter_each(plaintexts[first:stop], end, outer, opened, now, emit)
        return count

    def _enter_each(
        self, plaintexts: list[bytes], end: int, outer: tuple[int, int], opened: History, now: float, emit: Emissions
    ) -> None:
        """Deliver packets that came out of a tunnel; ``outer`` is version and TOS of its header."""
        for plaintext in plaintexts:
            fate = self._enter_tunnel(plaintext[:end], *outer, Counter.ESP_INVALID)
            if not isinstance(fate, int):
                fate = self._chain(fate, opened, now, emit)
            if fate >= FIRST_DROP:
                self._counters[fate] += 1
                if self.on_drop is not None:
                    self.on_drop("in", plaintext[:end], fate)

    def _enter_run(
        self, run: Run, first: bytes, outer: tuple[int, int], opened: History, now: float, emit: Emissions
    ) -> bool:
        """Deliver (or drop) a run whose first packet is ``first``; False: each packet has to be looked at."""
        view = self._view
        if self._enter_tunnel(first, *outer, Counter.ESP_INVALID) is not first:
            return False
        if view.protocol == IPPROTO_UDP and view.dport in self._tables.natt_ports:
            return False
        home = self._home(opened)
        verdict = home if home > 0 else self._verdict(opened, now, home)
        if verdict:
            self._counters[verdict] += run.number
            if self.on_drop is not None:
                self.on_drop("in", first, verdict)
        else:
            self._counters[_IN_DELIVERED] += run.number
            into = emit.into(opened[-1].reqid) if home else emit
            into.runs.append((len(into.inner), run))
        return True


def _segment(packet: Buffer, offset: int, spi: int, number: int) -> int:
    """The distance from the ESP packet at ``offset`` to the next one in a super-packet; 0: there is none."""
    if number == _LAST:
        return 0
    start = offset + 16
    found = bytes(packet[start : start + MAX_DATAGRAM]).find(_PACK(spi, number + 1))
    return found + 16 if found >= 0 else 0


def _consecutive(octets: memoryview, places: range, spi: int, number: int) -> bool:
    """Whether ESP of one SA begins at all ``places``, with sequence numbers that count up."""
    if _SPI_NUMBER(octets, places[-1]) != (spi, number + len(places) - 1):
        return False
    full = len(places) - 1
    rows = np.frombuffer(octets, np.uint8, full * places.step, places[0]).reshape(full, places.step)
    heads = np.arange(spi << 32 | number, (spi << 32 | number) + full, dtype=np.uint64).astype(">u8")
    return rows[:, :8].tobytes() == heads.tobytes()


def _datagram(head: bytes, version: int, piece: Buffer) -> bytes:
    """One datagram of a super-packet that began with ``head``: IP, perhaps extension headers, and UDP."""
    datagram = bytearray(head)
    datagram += piece
    length = len(datagram)
    at = len(head) - natt.HEADER_LENGTH
    _U16(datagram, at + 4, length - at)
    _U16(datagram, 2 if version == 4 else 4, length if version == 4 else length - 40)
    return bytes(datagram)


# Length, first octets, addresses and ports and SPI, number; and what else has to be looked at.
_READ: Final = {
    (4, False): Struct(">2sHxxHxBxx12sI").unpack_from,
    (4, True): Struct(">2sHxxHxBxx12sHxx4sI").unpack_from,
    (6, False): Struct(">4sHBx36sI").unpack_from,
    (6, True): Struct(">4sHBx36sHxx4sI").unpack_from,
}


def alike(packets: Sequence[Buffer], version: int, udp: bool) -> tuple[list[Buffer], list[int]]:
    """Those of ``packets``, from the first on, that have its addresses, ports, SPI and TOS, and rising sequence numbers.

    Cut to their lengths; and their numbers.  The first one is a whole datagram with ESP behind headers without options.
    """
    read = _READ[version, udp]
    old = version == 4
    header, extra = (20, 0) if old else (40, 40)
    minimum = header + (16 if udp else 8)
    start = read(packets[0])
    head, protocol, place = start[0], start[3 if old else 2], 4 if old else 3
    same = start[place]
    spi = start[place + 2] if udp else b""
    members: list[Buffer] = []
    numbers: list[int] = []
    before = -1
    for packet in packets:
        size = len(packet)
        if size < minimum:
            break
        fields = read(packet)
        length = fields[1] + extra
        number = fields[-1]
        if (
            fields[place] != same
            or fields[0] != head
            or fields[place - 1] != protocol
            or (old and fields[2] & 0x3FFF)
            or (udp and (fields[place + 1] != length - header or fields[place + 2] != spi))
            or number <= before
            or not minimum <= length <= size
        ):
            break
        before = number
        members.append(packet if size == length else memoryview(packet)[:length])
        numbers.append(number)
    return members, numbers
