"""IPv4 headers: a new one, and an old one around a new payload (RFC 791)."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final

from ipsecq.numbers import IP_MAXPACKET
from ipsecq.packet.buffer import Buffer

_HEADER: Final = Struct(">BBHHHBBH4s4s")
_U16: Final = Struct(">H")


def header(
    src: bytes,
    dst: bytes,
    protocol: int,
    payload_length: int,
    *,
    tos: int = 0,
    ttl: int = 64,
    identification: int = 0,
    df: bool = False,
) -> bytes:
    """A 20-octet header with its checksum for a payload of ``payload_length`` octets (at most 65515).

    Numbers out of their field's range raise ``struct.error``.
    """
    length = payload_length + 20
    flags = 0x4000 if df else 0
    # The checksum of the words as they go in; a whole address counts as its words do (see checksum.py).
    total = (
        0x4500 + tos + length + identification + flags + (ttl << 8) + protocol
        + int.from_bytes(src, "big") + int.from_bytes(dst, "big")
    )  # fmt: skip
    checksum = -total % 65535
    return _HEADER.pack(0x45, tos, length, identification, flags, ttl, protocol, checksum, src, dst)


def fix_checksum(head: bytearray) -> None:
    """Compute the checksum of the header that ``head`` is (options included), in place."""
    head[10:12] = b"\0\0"
    _U16.pack_into(head, 10, -int.from_bytes(head, "big") % 65535)


def replace_payload(packet_header: Buffer, protocol: int, payload_parts: Iterable[Buffer]) -> bytes:
    """The datagram of this header, options included, around the joined parts: protocol, length and checksum are set.

    Everything else of the header stays.  b"" when it would be longer than 65535 octets.
    """
    head = bytearray(packet_header)
    payload = b"".join(payload_parts)
    length = len(head) + len(payload)
    if length > IP_MAXPACKET:
        return b""
    _U16.pack_into(head, 2, length)
    head[9] = protocol
    fix_checksum(head)
    return bytes(head) + payload
