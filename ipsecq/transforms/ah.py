"""AH (RFC 4302): an ICV over the whole datagram, but for what routers may change on its way.

Transport and tunnel mode are one thing here: a header goes in front, a payload behind.  What the ICV sees of the header
in front is the work of :func:`immutable`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

from ipsecq.counters import Counter
from ipsecq.crypto.mac import IcvFunction
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.extensions import Part, iter_ipv4_options, iter_ipv6_headers, iter_ipv6_options
from ipsecq.packet.view import DESTINATION_OPTIONS, HOP_BY_HOP, ROUTING

AH_FIXED: Final = 12
"""Octets of AH before the ICV field."""

_HDROPS: Final = int(Counter.AH_HDROPS)
_BADAUTHL: Final = int(Counter.AH_BADAUTHL)
_BADAUTH: Final = int(Counter.AH_BADAUTH)

_KEPT_OPTIONS: Final = frozenset((0, 1, 0x82, 0x85, 0x86, 0x94, 0x95))
"""IPv4 options that no router changes (RFC 4302 appendix A1): EOL, NOP, security, router alert, RFC 1770."""

_SOURCE_ROUTES: Final = frozenset((0x83, 0x89))
_MUTABLE_OPTION: Final = 0x20
"""The bit of an IPv6 option type that says that its data may change en route (RFC 8200 section 4.2)."""
_HOME_ADDRESS: Final = 0xC9

_pack_ah: Final = struct.Struct(">BBHII").pack

_IPV6_MASK: Final = int.from_bytes(b"\xf0\0\0\0\xff\xff\xff\0" + b"\xff" * 32, "big")


@lru_cache(maxsize=64)
def _ipv4_mask(cleartos: bool, offsetmask: int) -> int:
    tos = b"\0" if cleartos else b"\xff"
    word = (offsetmask & 0xFFFF).to_bytes(2, "big")
    return int.from_bytes(b"".join((b"\xff", tos, b"\xff" * 4, word, b"\0\xff\0\0", b"\xff" * 8)), "big")


def immutable(header: Buffer, cleartos: bool = True, offsetmask: int = 0) -> bytes | None:
    """The octets of an IP header, extension headers included, as they enter the ICV; None when it is malformed.

    ``header`` ends where AH starts.  Fields that change en route are zero; those that change in a predictable way have
    the value that they have at the final destination (RFC 4302 section 3.3.3.1).  ``cleartos`` False keeps IPv4's TOS
    and ``offsetmask`` keeps those bits of the word of flags and fragment offset: the knobs ``ah_cleartos`` and
    ``ah_offsetmask`` of ipsec(4), for peers that implement RFC 1826.
    """
    length = len(header)
    if length < 20:
        return None
    version = header[0] >> 4
    if version == 4:
        if (header[0] & 15) << 2 != length:
            return None
        fixed = (int.from_bytes(header[:20], "big") & _ipv4_mask(cleartos, offsetmask)).to_bytes(20, "big")
        return fixed if length == 20 else _ipv4_options(fixed, header)
    if version != 6 or length < 40:
        return None
    fixed = (int.from_bytes(header[:40], "big") & _IPV6_MASK).to_bytes(40, "big")
    return fixed if length == 40 else _ipv6_extensions(fixed, header)


def _ipv4_options(fixed: bytes, header: Buffer) -> bytes | None:
    options = iter_ipv4_options(header)
    if options is None:
        return None
    cooked = bytearray(header)
    cooked[:20] = fixed
    for kind, offset, length in options:
        if kind in _KEPT_OPTIONS:
            continue
        if kind in _SOURCE_ROUTES:
            if length < 3 or (length - 3) % 4:
                return None
            if header[offset + 2] <= length - 3:  # the pointer: not used up yet, the last address is the destination
                cooked[16:20] = header[offset + length - 4 : offset + length]
        cooked[offset : offset + length] = bytes(length)
    return bytes(cooked)


def _ipv6_extensions(fixed: bytes, header: Buffer) -> bytes | None:
    parts = iter_ipv6_headers(header)
    if not parts or parts[-1].offset + parts[-1].length != len(header):
        return None
    cooked = bytearray(header)
    cooked[:40] = fixed
    for part in parts:
        if part.type in {HOP_BY_HOP, DESTINATION_OPTIONS}:
            if not _ipv6_options(cooked, header, part):
                return None
        elif part.type == ROUTING and not _routing_header(cooked, part):
            return None
    return bytes(cooked)


def _ipv6_options(cooked: bytearray, header: Buffer, part: Part) -> bool:
    options = iter_ipv6_options(header, part)
    if options is None:
        return False
    for kind, offset, length in options:
        if kind == _HOME_ADDRESS and part.type == DESTINATION_OPTIONS:
            # RFC 6275 section 11.3.2: the ICV sees the home address as the source.
            if length != 18:
                return False
            care_of = cooked[8:24]
            cooked[8:24] = cooked[offset + 2 : offset + 18]
            cooked[offset + 2 : offset + 18] = care_of
        elif kind & _MUTABLE_OPTION and kind:
            cooked[offset + 2 : offset + length] = bytes(length - 2)
    return True


def _routing_header(cooked: bytearray, part: Part) -> bool:
    """Bring a routing header of type 0 or 2, and the destination, to the last hop's state (RFC 4302 3.3.3.1.2.3)."""
    offset = part.offset
    left = cooked[offset + 3]
    if cooked[offset + 2] not in {0, 2} or not left:
        return True  # other types are covered as they are: nothing tells how they would change
    count, odd = divmod(part.length - 8, 16)
    if odd or left > count:
        return False
    start = offset + 8 + (count - left) * 16
    end = offset + 8 + count * 16
    visited = cooked[24:40] + cooked[start : end - 16]
    cooked[24:40] = cooked[end - 16 : end]
    cooked[start:end] = visited
    cooked[offset + 3] = 0
    return True


class AhTransform:
    """One SA's AH.  ``spi`` is a host-order int.

    ``align`` is the multiple of octets that the header is filled up to: 0 is what RFC 4302 section 3.3.3.2.1 says, 4
    for IPv4 and 8 for IPv6, as BSD does.  Linux fills up to 8 for IPv4 too, unless its SA has the flag ``align4``, and
    its PF_KEY cannot set that: 8 is for such a peer.  Both are accepted.
    """

    __slots__ = ("_icv", "_zeros", "align", "esn", "icv_length", "spi")

    def __init__(self, spi: int, icv: IcvFunction, *, esn: bool = False, align: int = 0) -> None:
        self.spi = spi
        self.esn = esn
        self.align = align
        self.icv_length = icv.length
        self._icv = icv
        self._zeros = bytes(icv.length)

    def header_length(self, version: int) -> int:
        """Octets of AH in a datagram of IP version 4 or 6: 24 for a 96-bit ICV."""
        align = self.align or (4 if version == 4 else 8)
        return -(-(AH_FIXED + self.icv_length) // align) * align

    def seal(
        self,
        payload: Buffer,
        next_header: int,
        sequence: int,
        prefix: Buffer,
        *,
        cleartos: bool = True,
        offsetmask: int = 0,
    ) -> bytes | None:
        """The datagram of ``prefix``, AH and ``payload``; None when ``prefix`` is malformed.

        ``prefix`` is the finished IP header, with options and those extension headers that go before AH: it names AH
        (51) as what follows, and its length counts AH (:meth:`header_length`) and the payload.  ``sequence`` is the
        full 64-bit number (32 bits without ESN).
        """
        covered = immutable(prefix, cleartos, offsetmask)
        if covered is None:
            return None
        total = self.header_length(prefix[0] >> 4)
        fixed = _pack_ah(next_header, (total >> 2) - 2, 0, self.spi, sequence & 0xFFFFFFFF)
        padding = bytes(total - AH_FIXED - self.icv_length)
        high = (sequence >> 32).to_bytes(4, "big") if self.esn else b""
        parts = (b"".join((covered, fixed, self._zeros, padding)), payload, high)
        icv = self._icv.compute(parts, sequence.to_bytes(8, "big"))
        return b"".join((prefix, fixed, icv, padding, payload))

    def open(
        self, packet: Buffer, offset: int, sequence: int, *, cleartos: bool = True, offsetmask: int = 0
    ) -> tuple[int, int, bytes]:
        """Authenticate the datagram ``packet``, whose AH is at ``offset`` and which ends with the buffer.

        ``sequence`` is the full number that the replay window derived.  Returns ``(0, next header, what follows AH)``,
        or ``(drop Counter, 0, b"")``: AH_HDROPS too short or malformed headers, AH_BADAUTHL, AH_BADAUTH.  Raises
        nothing.
        """
        start = offset + AH_FIXED
        if len(packet) < start:
            return _HDROPS, 0, b""
        version = packet[0] >> 4
        total = (packet[offset + 1] + 2) << 2
        end = offset + total
        if total != self.header_length(version) and (version != 4 or total != (AH_FIXED + self.icv_length + 7) & ~7):
            return _BADAUTHL, 0, b""
        if len(packet) < end:
            return _BADAUTHL, 0, b""
        covered = immutable(packet[:offset], cleartos, offsetmask)
        if covered is None:
            return _HDROPS, 0, b""
        behind = start + self.icv_length
        # The ICV field counts as zeros; padding and payload follow it in one piece.
        parts = (
            b"".join((covered, packet[offset:start], self._zeros)),
            packet[behind:],
            (sequence >> 32).to_bytes(4, "big") if self.esn else b"",
        )
        if not self._icv.verify(parts, packet[start:behind]):
            return _BADAUTH, 0, b""
        return 0, packet[offset], bytes(packet[end:])
