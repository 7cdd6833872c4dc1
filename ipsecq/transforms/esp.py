"""ESP (RFC 4303): header, padding, trailer and ICV around the ciphers of :mod:`ipsecq.crypto`.

The transform knows no addresses, no replay window and no SA: the engine hands it a sequence number and gets octets.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, NamedTuple

from ipsecq.counters import Counter
from ipsecq.crypto.cipher import EspCipher

Buffer = bytes | bytearray | memoryview

ESP_HEADER: Final = 8
"""Octets of SPI and sequence number."""

_HDROPS: Final = int(Counter.ESP_HDROPS)
_BADILEN: Final = int(Counter.ESP_BADILEN)
_BADAUTH: Final = int(Counter.ESP_BADAUTH)
_BADENC: Final = int(Counter.ESP_BADENC)

OpenRun = Callable[[Sequence[Buffer], int, bytes], list[bytes]]

_PAD: Final = bytes(range(1, 256))
"""RFC 4303 section 2.4: the padding octets are 1, 2, 3, …"""

_OCTET: Final = [bytes((octet,)) for octet in range(256)]

_pack_header: Final = struct.Struct(">II").pack
_pack_sequence: Final = struct.Struct(">Q").pack
_unpack_header: Final = struct.Struct(">II").unpack_from


def header(packet: Buffer, offset: int) -> tuple[int, int] | None:
    """SPI and low sequence number of the ESP packet at ``offset``; None when the buffer ends before them."""
    return _unpack_header(packet, offset) if len(packet) - offset >= ESP_HEADER else None


class Group(NamedTuple):
    """Neighbours among opened packets that have equal length and equal trailers."""

    plaintexts: list[bytes]
    """With their trailers."""
    end: int
    """Length of each payload."""
    next_header: int


@cache
def _trailers(align: int) -> list[bytes]:
    """Padding and pad length by (payload length mod alignment): only the next header is added per packet."""
    return [_PAD[:pad] + bytes((pad,)) for pad in (-(length + 2) % align for length in range(align))]


class EspTransform:
    """One SA's ESP.  ``spi`` is a host-order int."""

    __slots__ = (
        "_align", "_fixed", "_minimum", "_open", "_open_run", "_seal", "_trailers",
        "cipher", "esn", "iv_length", "random_length", "spi",
    )  # fmt: skip

    def __init__(self, spi: int, cipher: EspCipher, *, esn: bool = False) -> None:
        self.spi = spi
        self.cipher = cipher
        self.esn = esn
        self.iv_length = cipher.iv_length
        self.random_length = 0 if cipher.iv_is_counter else cipher.iv_length
        """Random octets that :meth:`seal` needs from its caller; 0 when the sequence number makes the IV."""
        self._align = max(4, cipher.block)
        self._fixed = ESP_HEADER + cipher.iv_length + cipher.icv_length
        self._minimum = self._fixed + self._align
        self._seal = cipher.seal
        self._open = cipher.open
        self._open_run: OpenRun = getattr(cipher, "open_run", self._open_each)
        self._trailers = _trailers(self._align)

    MAX_TRAILER: Final = 18
    """Octets of padding, pad length and next header at most, with blocks of 16 octets."""

    def trailer(self, payload_length: int, next_header: int) -> bytes:
        """Padding, pad length and next header behind a payload of this many octets."""
        return self._trailers[payload_length % self._align] + _OCTET[next_header]

    def sealed_length(self, payload_length: int) -> int:
        """Octets from SPI to ICV for a payload of this many octets, TFC padding counted as payload."""
        return self._fixed + (payload_length + 1 + self._align) // self._align * self._align

    def max_payload(self, available: int) -> int:
        """The longest payload whose sealed length is at most ``available``; negative when not even an empty one fits."""
        return (available - self._fixed) // self._align * self._align - 2

    def seal(
        self, payload: Buffer, next_header: int, sequence: int, iv: bytes = b"", prefix: Buffer = b"", fill: int = 0
    ) -> bytes:
        """``prefix`` and the ESP packet of ``payload``, in one allocation.

        ``sequence`` is the full 64-bit number (32 bits without ESN).  ``iv`` is ``random_length`` random octets
        for CBC; counter modes make it from ``sequence`` when it is empty, and one that is given must never repeat.

        A payload of less than ``fill`` octets gets TFC padding up to that (RFC 4303 section 2.7).  The receiver must
        find the payload's own end: use it in tunnel mode, where the inner IP header says it.
        """
        length = len(payload)
        if length < fill:
            payload = b"".join((payload, bytes(fill - length)))
            length = fill
        low = sequence & 0xFFFFFFFF
        return self._seal(
            prefix,
            _pack_header(self.spi, low),
            iv or (_pack_sequence(sequence) if self.iv_length else b""),
            b"".join((payload, self._trailers[length % self._align], _OCTET[next_header])),
            (sequence >> 32).to_bytes(4, "big") if self.esn else b"",
        )

    def open(self, packet: Buffer, offset: int, sequence: int) -> tuple[int, int, bytes]:
        """Authenticate and decrypt the ESP packet that starts at ``offset`` and ends with the buffer.

        ``sequence`` is the full number that the replay window derived.  Returns ``(0, next header, payload)``, or
        ``(drop Counter, 0, b"")``: ESP_HDROPS too short, ESP_BADILEN not whole blocks, ESP_BADAUTH, ESP_BADENC padding
        that RFC 4303 section 2.4 doesn't allow.  Raises nothing.
        """
        length = len(packet) - offset
        if length < self._minimum:
            return _HDROPS, 0, b""
        if (length - self._fixed) % self._align:
            return _BADILEN, 0, b""
        plaintext = self._open(packet, offset, (sequence >> 32).to_bytes(4, "big") if self.esn else b"")
        if plaintext is None:
            return _BADAUTH, 0, b""
        pad = plaintext[-2]
        end = len(plaintext) - 2 - pad
        if end < 0 or plaintext[end:-2] != _PAD[:pad]:
            return _BADENC, 0, b""
        return 0, plaintext[-1], plaintext[:end]

    def fits(self, length: int) -> bool:
        """Whether an ESP packet of ``length`` octets has room for all of its parts, and whole blocks."""
        return length >= self._minimum and not (length - self._fixed) % self._align

    def open_run(self, packets: Sequence[Buffer], offset: int, sequence: int) -> list[Group]:
        """Open packets that all start at ``offset`` and have one high half of the sequence number, ``sequence``'s.

        Those up to the first that :meth:`open` would refuse are in the groups, in order; each has passed :meth:`fits`.
        """
        high = (sequence >> 32).to_bytes(4, "big") if self.esn else b""
        groups: list[Group] = []
        members: list[bytes] = []
        length, trailer = -1, b""
        for plaintext in self._open_run(packets, offset, high):
            if len(plaintext) == length and plaintext.endswith(trailer):
                members.append(plaintext)
                continue
            length = len(plaintext)
            pad = plaintext[-2]
            end = length - 2 - pad
            if end < 0 or plaintext[end:-2] != _PAD[:pad]:
                break
            trailer = plaintext[end:]
            members = [plaintext]
            groups.append(Group(members, end, plaintext[-1]))
        return groups

    def _open_each(self, packets: Sequence[Buffer], offset: int, high: bytes) -> list[bytes]:
        """``open_run`` of a cipher that has none."""
        opened: list[bytes] = []
        for packet in packets:
            plaintext = self._open(packet, offset, high)
            if plaintext is None:
                break
            opened.append(plaintext)
        return opened
