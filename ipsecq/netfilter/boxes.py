"""Selectors as boxes: products of ranges, cut into products of prefixes that an nft hash map can hold.

A :class:`Shape` says which bits of a packet's fields a map looks at, so all boxes of one shape are disjoint unless
equal and one look-up finds the only candidate: ``ip saddr & 255.255.255.0 . ip daddr & 255.255.255.0 vmap @map``.
Plain hash maps are used rather than interval maps, because kernels before 6.17 show an interval map of concatenations
(pipapo) empty for a moment when a transaction that changes it commits; a packet of that moment would leave in clear.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from ipsecq.numbers import IPPROTO_ANY, IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_TCP, IPPROTO_UDP
from ipsecq.policy.model import Selector

PORT_PROTOCOLS: Final = (IPPROTO_TCP, IPPROTO_UDP, 33, 132, 136)
"""Protocols whose first four octets are two ports: TCP, UDP, DCCP, SCTP, UDP-Lite."""
MOBILITY: Final = 135
MAX_PIECES: Final = 64
"""A selector that needs more map entries than this becomes a rule of its own."""
_ALL_PORTS: Final = (0, 0xFFFF)


class Shape(NamedTuple):
    """Prefix lengths of addresses and ports, and whether the protocol counts."""

    src: int
    dst: int
    protocol: bool
    sport: int
    dport: int

    def fields(self, family: int) -> list[tuple[str, str]]:
        """(expression, type) of each part of the map's key, in order; empty when the shape looks at nothing."""
        ip, kind, bits = ("ip", "ipv4_addr", 32) if family == 4 else ("ip6", "ipv6_addr", 128)
        parts: list[tuple[str, str]] = []
        for name, length in (("saddr", self.src), ("daddr", self.dst)):
            if length == bits:
                parts.append((f"{ip} {name}", kind))
            elif length:
                parts.append((f"{ip} {name} & {address(mask(length, bits), family)}", kind))
        if self.protocol:
            parts.append(("meta l4proto", "inet_proto"))
        for name, length in (("sport", self.sport), ("dport", self.dport)):
            if length:
                parts.append((f"th {name}" + (f" & {mask(length, 16)}" if length < 16 else ""), "inet_service"))
        return parts


class Box(NamedTuple):
    """A product of inclusive ranges of integers.  ``protocol`` is -1 for any; see :class:`Selector` for ICMP."""

    src: tuple[int, int]
    dst: tuple[int, int]
    protocol: int
    sport: tuple[int, int]
    dport: tuple[int, int]

    def overlaps(self, other: Box) -> bool:
        """True when some packet lies in both."""
        return (
            self.src[0] <= other.src[1] and other.src[0] <= self.src[1]
            and self.dst[0] <= other.dst[1] and other.dst[0] <= self.dst[1]
            and (self.protocol == other.protocol or self.protocol < 0 or other.protocol < 0)
            and self.sport[0] <= other.sport[1] and other.sport[0] <= self.sport[1]
            and self.dport[0] <= other.dport[1] and other.dport[0] <= self.dport[1]
        )  # fmt: skip

    def shape(self, bits: int) -> Shape:
        """The shape whose one map entry covers this box, or the smallest box of prefixes around it."""
        return Shape(
            prefix_length(*self.src, bits), prefix_length(*self.dst, bits), self.protocol >= 0,
            prefix_length(*self.sport, 16), prefix_length(*self.dport, 16),
        )  # fmt: skip

    def key(self, shape: Shape, family: int) -> str:
        """The map entry's key in nft's notation."""
        parts: list[str] = []
        for (first, _), length in ((self.src, shape.src), (self.dst, shape.dst)):
            if length:
                parts.append(address(first, family))
        if shape.protocol:
            parts.append(str(self.protocol))
        for (first, _), length in ((self.sport, shape.sport), (self.dport, shape.dport)):
            if length:
                parts.append(str(first))
        return " . ".join(parts)

    def match(self, family: int) -> str:
        """The box as the matches of one nft rule; empty when every packet of the family is in it."""
        ip, bits = ("ip", 32) if family == 4 else ("ip6", 128)
        parts: list[str] = []
        for name, (first, last) in (("saddr", self.src), ("daddr", self.dst)):
            length = prefix_length(first, last, bits)
            if (first, last) == (0, (1 << bits) - 1):
                continue
            if last - first == (1 << bits - length) - 1:
                parts.append(f"{ip} {name} {address(first, family)}/{length}")
            else:
                parts.append(f"{ip} {name} {address(first, family)}-{address(last, family)}")
        if self.protocol >= 0:
            parts.append(f"meta l4proto {self.protocol}")
        if self.protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
            places, high = ("@th,0,8", "@th,8,8"), 255
        elif self.protocol == MOBILITY:
            places, high = ("@th,16,8", ""), 255
        else:
            places, high = ("th sport", "th dport"), 0xFFFF
        for place, (first, last) in zip(places, (self.sport, self.dport), strict=True):
            if place and (first > 0 or last < high):
                parts.append(f"{place} {first}" if first == last else f"{place} {first}-{min(last, high)}")
        return " ".join(parts)


def boxes(selector: Selector) -> list[Box]:
    """The boxes of a selector: one, or one a protocol when ports narrow a selector of any protocol.

    Empty when no packet can match: ports of a protocol that has none are 0 (as the engine reads them).
    """
    src = int.from_bytes(selector.src_first), int.from_bytes(selector.src_last)
    dst = int.from_bytes(selector.dst_first), int.from_bytes(selector.dst_last)
    sport, dport = (selector.sport_first, selector.sport_last), (selector.dport_first, selector.dport_last)
    protocol = -1 if selector.protocol == IPPROTO_ANY else selector.protocol
    if not selector.has_ports:
        return [Box(src, dst, protocol, _ALL_PORTS, _ALL_PORTS)]
    if protocol < 0:
        return [Box(src, dst, number, sport, dport) for number in PORT_PROTOCOLS]
    if protocol in (*PORT_PROTOCOLS, IPPROTO_ICMP, IPPROTO_ICMPV6):
        return [Box(src, dst, protocol, sport, dport)]
    if dport[0]:
        return []
    if protocol == MOBILITY:
        return [Box(src, dst, protocol, sport, _ALL_PORTS)]
    return [] if sport[0] else [Box(src, dst, protocol, _ALL_PORTS, _ALL_PORTS)]


def pieces(box: Box, bits: int) -> list[Box] | None:
    """The box cut into prefix boxes, one map entry each; None when a rule is the better form.

    Rules are used for ICMP types, for what would take more than MAX_PIECES entries, and for a box that looks at no
    field at all.
    """
    ported = box.protocol in PORT_PROTOCOLS
    if not ported and (box.sport, box.dport) != (_ALL_PORTS, _ALL_PORTS):
        return None
    parts = (
        prefixes(*box.src, bits), prefixes(*box.dst, bits), prefixes(*box.sport, 16), prefixes(*box.dport, 16),
    )  # fmt: skip
    count = 1
    for part in parts:
        count *= len(part)
    if count > MAX_PIECES or not any(box.shape(bits)):
        return None
    if count == 1:
        return [box]
    return [Box(s, d, box.protocol, sp, dp) for s in parts[0] for d in parts[1] for sp in parts[2] for dp in parts[3]]


def prefixes(first: int, last: int, bits: int) -> list[tuple[int, int]]:
    """A range as the fewest aligned power-of-two ranges, at most 2 * bits - 2 of them."""
    if last - first == (1 << bits - prefix_length(first, last, bits)) - 1:
        return [(first, last)]
    found: list[tuple[int, int]] = []
    while first <= last:
        size = first & -first or 1 << bits
        while first + size - 1 > last:
            size >>= 1
        found.append((first, first + size - 1))
        first += size
    return found


def prefix_length(first: int, last: int, bits: int) -> int:
    """Length of the longest prefix that holds the whole range."""
    return bits - (first ^ last).bit_length()


def mask(length: int, bits: int) -> int:
    """A netmask."""
    return (1 << bits) - (1 << bits - length)


def address(value: int, family: int) -> str:
    """An address as text."""
    return str(IPv4Address(value) if family == 4 else IPv6Address(value))
