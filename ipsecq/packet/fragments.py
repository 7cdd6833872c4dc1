"""Fragmentation and reassembly of both IP versions.

Sources: RFC 791 section 3.2, RFC 815, RFC 8200 section 4.5, RFC 5722 (overlaps drop the datagram), RFC 6946 (atomic
fragments), RFC 3168 section 5.3 (ECN of a reassembled datagram).
"""

from __future__ import annotations

from bisect import bisect_left
from struct import Struct
from typing import Final

from ipsecq.numbers import IP_MAXPACKET
from ipsecq.packet import ipv4
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.extensions import iter_ipv4_options
from ipsecq.packet.view import FRAGMENT, MF, PacketView

_U16: Final = Struct(">H")
_FRAGMENT_HEADER: Final = Struct(">BxHI")

FRAGMENT_OVERHEAD: Final = 128
"""Octets that a waiting fragment is charged beside its data, so that many tiny ones meet the limit, too."""

_CE: Final = 3
_ECN_NOT_ECT: Final = 1
_ECN_CE: Final = 8


def fragment(packet: Buffer, mtu: int, identification: int) -> list[bytes]:
    """The datagram in pieces of at most ``mtu`` octets, in order; ``[packet]`` when it fits as it is.

    A whole datagram gets ``identification`` (16 bits of it in IPv4, 32 in IPv6); a fragment is cut further and keeps
    its own.  IPv4: DF is not looked at and is clear in the pieces; options go into later pieces by their copied flag.
    IPv6: the fragment header stands behind the per-hop headers.  ``[]`` when the packet is malformed, is a
    fragment that reaches beyond 65535 octets, or the MTU leaves no room for eight octets (IPv6: for the whole header
    chain) in the first piece.
    """
    view = PacketView()
    if not view.load(packet):
        return []
    if view.length <= mtu:
        return [bytes(packet[: view.length])]
    if view.version == 4:
        return _fragment_ipv4(packet, view, mtu, identification & 0xFFFF)
    return _fragment_ipv6(packet, view, mtu, identification & 0xFFFFFFFF)


def _fragment_ipv4(packet: Buffer, view: PacketView, mtu: int, identification: int) -> list[bytes]:
    head = bytearray(packet[: view.header_length])
    if not view.is_fragment:
        _U16.pack_into(head, 4, identification)
    later = _copied_options(head)
    position, end = view.header_length, view.length
    # A fragment whose data end beyond what a datagram can hold: its pieces' offsets would not fit their field.
    if later is None or mtu < len(head) + 8 or view.fragment_offset + end > IP_MAXPACKET:
        return []
    offset, last_word = view.fragment_offset, view.fragment_word & MF
    pieces = []
    while position < end:
        room = mtu - len(head)
        size = end - position if end - position <= room else room & ~7
        word = offset >> 3 | (last_word if position + size == end else MF)
        _U16.pack_into(head, 2, len(head) + size)
        _U16.pack_into(head, 6, word)
        ipv4.fix_checksum(head)
        pieces.append(bytes(head) + packet[position : position + size])
        position += size
        offset += size
        head = later
    return pieces


def _copied_options(head: bytearray) -> bytearray | None:
    """The header of the later fragments: only the options whose copied flag is set (RFC 791 section 3.1)."""
    options = iter_ipv4_options(head)
    if options is None:
        return None
    copied = b"".join(head[o : o + n] for kind, o, n in options if kind & 0x80)
    later = head[:20] + copied + bytes(-len(copied) % 4)
    later[0] = 0x40 | len(later) >> 2
    return later


def _fragment_ipv6(packet: Buffer, view: PacketView, mtu: int, identification: int) -> list[bytes]:
    offset = last_more = 0
    if view.fragment_header:
        place = view.fragment_header
        named_by = _named_by(packet, place)
        position, kind = place + 8, packet[place]
        offset, last_more, identification = view.fragment_offset, int(view.more_fragments), view.identification
    else:
        place, named_by = view.header_length, view.header_nexthdr
        position, kind = place, packet[named_by]
    if offset + view.length - position > IP_MAXPACKET:  # as in IPv4
        return []
    room = mtu - place - 8 & ~7
    # RFC 7112: the first fragment holds all headers, the upper layer's first octets (ports, type) included.
    needed = view.offset - position + min(8, view.length - view.offset)
    if room < 8 or (not offset and room < needed):
        return []
    head = bytearray(packet[:place])
    head[named_by] = FRAGMENT
    pieces = []
    while position < view.length:
        left = view.length - position
        size = left if left <= mtu - place - 8 else room
        more = last_more if size == left else 1
        _U16.pack_into(head, 4, place - 40 + 8 + size)
        pieces.append(
            b"".join(
                (head, _FRAGMENT_HEADER.pack(kind, offset | more, identification), packet[position : position + size])
            )
        )
        position += size
        offset += size
    return pieces


def _named_by(packet: Buffer, place: int) -> int:
    """Offset of the octet that names the extension header at ``place`` of a loaded packet."""
    named_by, offset = 6, 40
    while offset < place:
        named_by = offset
        offset += 8 + (packet[offset + 1] << 3)
    return named_by


def strip_fragment_header(packet: Buffer, view: PacketView) -> bytes:
    """An atomic fragment (RFC 6946) as the whole datagram that it is."""
    place = view.fragment_header
    whole = bytearray(packet[: view.length])
    whole[_named_by(packet, place)] = packet[place]
    del whole[place : place + 8]
    _U16.pack_into(whole, 4, len(whole) - 40)
    return bytes(whole)


class _Partial:
    """A datagram of which something is missing."""

    __slots__ = ("dead", "ecn", "end", "first", "key", "octets", "offsets", "pieces", "received", "since")

    def __init__(self, key: tuple[bytes, bytes, int, int], now: float) -> None:
        self.key = key
        self.since = now
        self.dead = False
        self.end = -1
        self.received = self.octets = self.ecn = 0
        self.first = b""
        self.offsets: list[int] = []
        self.pieces: dict[int, bytes] = {}


class Reassembler:
    """Puts fragments together, within limits that a flood cannot pass.

    ``limit_bytes``       octets held, all datagrams together (:data:`FRAGMENT_OVERHEAD` a fragment included);
    ``limit_datagrams``   datagrams held; beyond either limit the oldest go;
    ``timeout``           seconds that a datagram may wait for its last fragment (RFC 8200: 60);
    ``limit_per_source``  datagrams held of one source address; beyond it new ones are refused, so that one source
                          cannot push out the others'.

    ``counts`` says what became of fragments and datagrams: ``completed``, ``atomic``, ``duplicate`` (ignored), and the
    drops ``malformed``, ``too_long``, ``overlap``, ``inconsistent``, ``ecn``, ``dead`` (a fragment of a datagram that
    was refused before), ``timeout``, ``limit_bytes``, ``limit_datagrams``, ``limit_source``.
    """

    def __init__(
        self, limit_bytes: int, limit_datagrams: int, timeout: float, *, limit_per_source: int = 64
    ) -> None:
        self._limit_bytes = limit_bytes
        self._limit_datagrams = limit_datagrams
        self._limit_per_source = limit_per_source
        self._timeout = timeout
        self._view = PacketView()
        # In the order of their first fragments, so that the oldest is the first.
        self._partials: dict[tuple[bytes, bytes, int, int], _Partial] = {}
        self._sources: dict[bytes, int] = {}
        self.octets = 0
        """Octets held now."""
        self.counts = dict.fromkeys(
            ("completed", "atomic", "duplicate", "malformed", "too_long", "overlap", "inconsistent", "ecn", "dead",
             "timeout", "limit_bytes", "limit_datagrams", "limit_source"), 0,
        )  # fmt: skip

    @property
    def datagrams(self) -> int:
        """Datagrams held now, refused ones that are remembered included."""
        return len(self._partials)

    def add(self, packet: Buffer, now: float) -> bytes | None:
        """The whole datagram when this fragment completes one, else None; what is whole already comes back at once.

        ``now`` is in seconds and only ever grows.
        """
        self.expire(now)
        view = self._view
        if not view.load(packet):
            self.counts["malformed"] += 1
            return None
        if not view.is_fragment:
            if not view.fragment_header:
                return bytes(packet[: view.length])
            self.counts["atomic"] += 1
            return strip_fragment_header(packet, view)

        start, offset = self._data_start(), view.fragment_offset
        size = view.length - start
        if size <= 0 or (view.more_fragments and size & 7):
            self.counts["malformed"] += 1
            return None
        partial = self._find(now)
        if partial is None:
            return None
        if partial.dead:
            self.counts["dead"] += 1
            return None
        # What the datagram's length field will have to hold: of IPv6 all but the 40 octets.
        if (start if view.version == 4 else view.fragment_header - 40) + offset + size > IP_MAXPACKET:
            self._refuse(partial, "too_long")
            return None
        refusal = self._place(partial, offset, bytes(packet[start : view.length]), view.more_fragments)
        if refusal == "duplicate":
            self.counts["duplicate"] += 1
            return None
        if refusal:
            self._refuse(partial, refusal)
            return None
        partial.ecn |= 1 << (view.tos & 3)
        if not offset:
            partial.first = bytes(packet[:start])
        self._charge(partial, size + FRAGMENT_OVERHEAD)
        if partial.dead or partial.received != partial.end:
            return None
        return self._assemble(partial)

    def expire(self, now: float) -> None:
        """Drop the datagrams that waited longer than the timeout."""
        limit = now - self._timeout
        partials = self._partials
        while partials:
            oldest = next(iter(partials.values()))
            if oldest.since > limit:
                return
            if not oldest.dead:
                self.counts["timeout"] += 1
            self._forget(oldest)

    def _data_start(self) -> int:
        view = self._view
        return view.header_length if view.version == 4 else view.fragment_header + 8

    def _find(self, now: float) -> _Partial | None:
        """The datagram that the loaded fragment belongs to, a new one if need be; None when there is no room for it."""
        view = self._view
        # IPv6 identifies without the next header (RFC 8200): only the first fragment's counts.
        key = (view.src, view.dst, view.identification, view.protocol if view.version == 4 else -1)
        partial = self._partials.get(key)
        if partial is not None:
            return partial
        of_source = self._sources.get(view.src, 0)
        if of_source >= self._limit_per_source:
            self.counts["limit_source"] += 1
            return None
        while self._partials and len(self._partials) >= self._limit_datagrams:
            self.counts["limit_datagrams"] += 1
            self._forget(next(iter(self._partials.values())))
        partial = self._partials[key] = _Partial(key, now)
        self._sources[view.src] = self._sources.get(view.src, 0) + 1
        return partial

    @staticmethod
    def _place(partial: _Partial, offset: int, data: bytes, more: bool) -> str:
        """Put the data where they belong; "" or the reason why the datagram must go."""
        end = offset + len(data)
        offsets, pieces = partial.offsets, partial.pieces
        index = bisect_left(offsets, offset)
        if index < len(offsets) and offsets[index] < end:
            # RFC 8200: an exact duplicate is the network's doing and may be ignored.
            same = pieces.get(offset) == data and more == (end != partial.end)
            return "duplicate" if same else "overlap"
        if index and offsets[index - 1] + len(pieces[offsets[index - 1]]) > offset:
            return "overlap"
        if not more:
            if partial.end >= 0 or (offsets and offsets[-1] > offset):
                return "inconsistent"
            partial.end = end
        elif 0 <= partial.end < end:
            return "inconsistent"
        offsets.insert(index, offset)
        pieces[offset] = data
        partial.received += len(data)
        return ""

    def _charge(self, partial: _Partial, octets: int) -> None:
        """Account for a fragment; when that is too much, the oldest datagrams go, at last the fragment's own."""
        partial.octets += octets
        self.octets += octets
        while self.octets > self._limit_bytes:
            oldest = next((p for p in self._partials.values() if p.octets and p is not partial), partial)
            self.counts["limit_bytes"] += 1
            self._forget(oldest)
            if oldest is partial:
                partial.dead = True
                return

    def _refuse(self, partial: _Partial, reason: str) -> None:
        """Drop the datagram, and remember it until its time is up: its other fragments go the same way (RFC 5722)."""
        self.counts[reason] += 1
        partial.dead = True
        self.octets -= partial.octets
        partial.octets = 0
        partial.pieces.clear()
        partial.offsets.clear()
        partial.first = b""

    def _forget(self, partial: _Partial) -> None:
        del self._partials[partial.key]
        self.octets -= partial.octets
        source = partial.key[0]
        left = self._sources[source] - 1
        if left:
            self._sources[source] = left
        else:
            del self._sources[source]

    def _assemble(self, partial: _Partial) -> bytes | None:
        first = bytearray(partial.first)
        if partial.ecn & _ECN_CE and partial.ecn & _ECN_NOT_ECT:
            self._refuse(partial, "ecn")
            return None
        if first[0] >> 4 == 6:
            place = len(first) - 8
            first[_named_by(partial.first, place)] = first[place]
            del first[place:]
            if partial.ecn & _ECN_CE:
                first[1] |= _CE << 4
            length = place - 40 + partial.end
            if length <= IP_MAXPACKET:
                _U16.pack_into(first, 4, length)
        else:
            length = len(first) + partial.end
            if partial.ecn & _ECN_CE:
                first[1] |= _CE
            first[6] &= 0x40  # DF stays, MF goes; the first fragment's offset is zero
            if length <= IP_MAXPACKET:
                _U16.pack_into(first, 2, length)
                ipv4.fix_checksum(first)
        if length > IP_MAXPACKET:  # the first fragment's options made it so
            self._refuse(partial, "too_long")
            return None
        self._forget(partial)
        self.counts["completed"] += 1
        return b"".join((first, *(partial.pieces[offset] for offset in partial.offsets)))
