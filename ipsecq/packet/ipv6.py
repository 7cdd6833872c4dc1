"""IPv6 headers: a new one, and an old one with its extension headers around a new payload (RFC 8200)."""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Final

from ipsecq.packet.buffer import Buffer

_HEADER: Final = Struct(">IHBB16s16s")
_U16: Final = Struct(">H")
MAX_PAYLOAD: Final = 65535


def header(
    src: bytes,
    dst: bytes,
    next_header: int,
    payload_length: int,
    *,
    traffic_class: int = 0,
    flow_label: int = 0,
    hop_limit: int = 64,
) -> bytes:
    """A 40-octet header for a payload of ``payload_length`` octets (at most 65535).

    Numbers out of their field's range raise ``struct.error``.
    """
    return _HEADER.pack(
        0x60000000 | traffic_class << 20 | flow_label, payload_length, next_header, hop_limit, src, dst
    )


def replace_payload(
    packet_header: Buffer, next_header: int, payload_parts: Iterable[Buffer], nexthdr_offset: int
) -> bytes:
    """The packet of this header and its extension headers around the joined parts: length and next header are set.

    ``packet_header`` is the IPv6 header with all headers before the payload; ``nexthdr_offset`` is where the last of
    them names what follows (:attr:`PacketView.nexthdr_offset` for headers up to the upper layer,
    :attr:`PacketView.header_nexthdr` for those up to ``header_length``).  b"" when it would be a jumbogram.
    """
    head = bytearray(packet_header)
    payload = b"".join(payload_parts)
    length = len(head) - 40 + len(payload)
    if length > MAX_PAYLOAD:
        return b""
    _U16.pack_into(head, 4, length)
    head[nexthdr_offset] = next_header
    return bytes(head) + payload
