"""The messages of nfnetlink_queue, as octets: what a queue is told, and where a packet message keeps its parts.

Source: Linux ``include/uapi/linux/netfilter/nfnetlink_queue.h``, ``net/netfilter/nfnetlink_queue.c``.
Headers of netlink are in native order, what is in the attributes in network order.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from ipsecq import netlink

NFQNL_MSG_PACKET: Final = 0x300
NFQNL_MSG_VERDICT: Final = 0x301
NFQNL_MSG_CONFIG: Final = 0x302
NFQNL_MSG_VERDICT_BATCH: Final = 0x303

NFQA_VERDICT_HDR: Final = 2
NFQA_MARK: Final = 3
NFQA_IFINDEX_INDEV: Final = 5
NFQA_IFINDEX_OUTDEV: Final = 6
NFQA_PAYLOAD: Final = 10
NFQA_CAP_LEN: Final = 13
NFQA_SKB_INFO: Final = 14

NFQA_SKB_CSUMNOTREADY: Final = 1
"""The transport checksum holds the pseudo header's sum only: somebody has to complete it."""
NFQA_SKB_GSO: Final = 2
"""A super-packet of several segments."""
NFQA_SKB_CSUM_NOTVERIFIED: Final = 4

NFQA_CFG_PARAMS: Final = 2
NFQA_CFG_QUEUE_MAXLEN: Final = 3
NFQA_CFG_MASK: Final = 4
NFQA_CFG_FLAGS: Final = 5
NFQNL_COPY_PACKET: Final = 2

NFQA_CFG_F_FAIL_OPEN: Final = 1
NFQA_CFG_F_CONNTRACK: Final = 2
NFQA_CFG_F_GSO: Final = 4
NFQA_CFG_F_UID_GID: Final = 8
NFQA_CFG_F_SECCTX: Final = 16

NF_DROP: Final = 0
NF_ACCEPT: Final = 1
NF_QUEUE: Final = 3

PAYLOAD_MAX: Final = 0xFFFF - 4
"""Longest payload of one message: the 16-bit length of the attribute counts its own header."""

_ATTRIBUTE: Final = Struct("=HH")
_FIRST: Final = 20
"""Offset of the first attribute: netlink header and nfgenmsg."""


def message(kind: int, flags: int, sequence: int, queue: int, attributes: bytes) -> bytes:
    """One message for a queue."""
    return netlink.message(kind, flags, sequence, netlink.genmsg(0, queue) + attributes)


def be32(value: int) -> bytes:
    """32 bits in network order."""
    return value.to_bytes(4, "big")


class Attributes(NamedTuple):
    """What :func:`walk` found in a packet message."""

    cookie: int
    """The packet id exactly as the kernel wrote it (network order read natively); verdicts echo it."""
    hook: int
    mark: int
    indev: int
    outdev: int
    info: int
    captured: int
    """Full length of a packet that did not fit (NFQA_CAP_LEN), else 0."""
    start: int
    end: int
    """Where the payload lies in the message; equal when there is none."""


def walk(buffer: memoryview, size: int) -> Attributes | None:
    """Read a packet message attribute by attribute; None when its lengths don't add up.

    The slow and careful way: once for each layout that the kernel uses, see :class:`Layout`.
    """
    if size < _FIRST + 12:
        return None
    found: dict[int, tuple[int, int]] = {}
    offset = _FIRST
    while offset + 4 <= size:
        length, kind = _ATTRIBUTE.unpack_from(buffer, offset)
        if length < 4 or offset + length > size:
            return None
        found[kind & 0x3FFF] = (offset + 4, offset + length)
        offset += (length + 3) & ~3
    if found.get(1, (0, 0)) != (24, 31):
        return None

    def number(kind: int) -> int:
        start, end = found.get(kind, (0, 0))
        return int.from_bytes(buffer[start : start + 4], "big") if end - start == 4 else 0

    start, end = found.get(NFQA_PAYLOAD, (0, 0))
    cookie = int(_COOKIE.unpack_from(buffer, 24)[0])
    return Attributes(
        cookie, buffer[30], number(NFQA_MARK), number(NFQA_IFINDEX_INDEV), number(NFQA_IFINDEX_OUTDEV),
        number(NFQA_SKB_INFO), number(NFQA_CAP_LEN), start, end,
    )  # fmt: skip


_COOKIE: Final = Struct("=I")


class Layout:
    """The order of attributes in one kind of packet message, learned from a first message.

    The kernel writes the same few attributes in the same order for every packet of a hook, the payload last.  One
    ``unpack_from`` reads all headers and values up to the payload, one comparison of all headers proves that the
    message is laid out like the first: a third of a walk's cost.  The comparison is complete, so no packet's content
    can pass for an attribute.
    """

    __slots__ = ("expected", "info", "mark", "start", "unpack_from")

    def __init__(self, buffer: memoryview, size: int) -> None:
        """Learn from a message that :func:`walk` took; ValueError when it has no payload or an unusual attribute."""
        # Type of the message, cookie, hook, an octet of padding; then header and first word of each attribute; then the
        # type of the payload.  So what must be equal stands at even places, what varies at odd ones.
        form = "=4xH18xIxxBB"
        places: dict[int, int] = {}
        offset, index = _FIRST + 12, 5
        while True:
            if offset + 4 > size:
                raise ValueError("no payload")
            length, kind = _ATTRIBUTE.unpack_from(buffer, offset)
            if kind == NFQA_PAYLOAD:
                break
            if length < 8 or kind == NFQA_CAP_LEN:
                raise ValueError(f"attribute {kind} of {length} octets")
            padded = (length + 3) & ~3
            form += f"II{padded - 8}x"
            places[kind] = index
            offset, index = offset + padded, index + 2
        if offset + length != size:
            raise ValueError("something behind the payload")
        unpack = Struct(form + "xxH")
        self.unpack_from = unpack.unpack_from
        self.expected: tuple[int, ...] = unpack.unpack_from(buffer)[::2]
        self.start = offset + 4
        """Where the payload starts; it ends where the message ends."""
        self.mark = places.get(NFQA_MARK, 0)
        """Place of a value among the fields, 0 where the layout has none.  Values are in network order."""
        self.info = places.get(NFQA_SKB_INFO, 0)
