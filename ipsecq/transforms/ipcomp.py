"""IPComp (RFC 3173) with DEFLATE (RFC 2394)."""

from __future__ import annotations

import zlib
from typing import Final

from ipsecq.counters import Counter
from ipsecq.crypto import registry
from ipsecq.packet.buffer import Buffer

IPCOMP_HEADER: Final = 4
"""Octets of next header, flags and CPI."""

_HDROPS: Final = int(Counter.IPCOMP_HDROPS)
_INVALID: Final = int(Counter.IPCOMP_INVALID)
_BOMB: Final = int(Counter.IPCOMP_BOMB)

# RFC 2394 allows windows up to 32 KiB and leaves the size to the sender.  Linux inflates with a window of 2 KiB, which
# it needs when its output is in pieces, so no more than that is used; a datagram of 1500 octets loses nothing by it.
_DEFLATE_WINDOW: Final = -11
_INFLATE_WINDOW: Final = -15
_LEVEL: Final = 6


class IpcompTransform:
    """One IPComp association.  ``cpi`` is what goes on the wire (16 bits, host order), ``algorithm`` ``deflate``.

    IPComp keeps no state from one packet to the next (RFC 3173 section 2).  AlgorithmError for another algorithm.
    """

    __slots__ = ("_tail", "cpi", "threshold")

    def __init__(self, cpi: int, algorithm: str = "deflate") -> None:
        self.cpi = cpi
        self.threshold = registry.compression(algorithm).threshold
        """Payloads shorter than this are not compressed."""
        self._tail = b"\0" + (cpi & 0xFFFF).to_bytes(2, "big")

    def seal(self, payload: Buffer, next_header: int) -> bytes | None:
        """IPComp header and compressed ``payload``; None when it must be sent as it is.

        That is so below :attr:`threshold` and when header and result would not be shorter (RFC 3173 section 2.2).
        """
        length = len(payload)
        if length < self.threshold:
            return None
        compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, _DEFLATE_WINDOW)  # copying a kept one costs 0.7 µs more
        body = compressor.compress(payload) + compressor.flush()
        if len(body) + IPCOMP_HEADER >= length:
            return None
        return b"".join((bytes((next_header,)), self._tail, body))

    def open(self, packet: Buffer, limit: int) -> tuple[int, int, bytes]:
        """Decompress ``packet``, which starts with the IPComp header, into at most ``limit`` octets (at least 1).

        Returns ``(0, next header, payload)``, or ``(drop Counter, 0, b"")``: IPCOMP_HDROPS too short, IPCOMP_INVALID no
        DEFLATE, incomplete, empty, or octets behind its end, IPCOMP_BOMB longer than ``limit``.  Raises nothing.  No
        more than ``limit`` + 1 octets are ever produced, and the time is linear in both lengths.
        """
        if len(packet) <= IPCOMP_HEADER:
            return _HDROPS, 0, b""
        inflater = zlib.decompressobj(_INFLATE_WINDOW)
        try:
            payload = inflater.decompress(packet[IPCOMP_HEADER:], limit + 1)
        except zlib.error:
            return _INVALID, 0, b""
        if len(payload) > limit:
            return _BOMB, 0, b""
        if not inflater.eof or inflater.unused_data or not payload:
            return _INVALID, 0, b""
        return 0, packet[0], payload
