"""Netlink's framing (netlink(7), Linux ``include/uapi/linux/netlink.h``, ``nfnetlink.h``): headers, attributes, answers.

Sans I/O.  Headers are in native order; what is in an attribute is its family's affair.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final

SOL_NETLINK: Final = 270
NETLINK_ADD_MEMBERSHIP: Final = 1
NETLINK_NO_ENOBUFS: Final = 5

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3
NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_EXCL: Final = 0x200
NLM_F_DUMP: Final = 0x300
NLM_F_CREATE: Final = 0x400
NLM_F_APPEND: Final = 0x800
NLA_F_NESTED: Final = 0x8000

HEADER: Final = 16
"""Octets of a message's header."""

_HEADER: Final = Struct("=IHHII")
_GENMSG: Final = Struct(">BBH")
_ATTRIBUTE: Final = Struct("=HH")
_ERROR: Final = Struct("=i")


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One request; ``body`` is padded."""
    return _HEADER.pack(HEADER + len(body), kind, flags | NLM_F_REQUEST, sequence, 0) + body


def genmsg(family: int, resource: int = 0) -> bytes:
    """What every body of nfnetlink begins with; ``resource`` is a queue or a subsystem."""
    return _GENMSG.pack(family, 0, resource)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four octets."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) & 3)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind | NLA_F_NESTED, b"".join(parts))


def string(kind: int, text: str) -> bytes:
    """An attribute that holds a string with its final zero octet."""
    return attribute(kind, text.encode() + b"\0")


def messages(buffer: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(kind, sequence, body) of each message; ends at the first whose length does not fit a header."""
    offset = 0
    while offset + HEADER <= len(buffer):
        length, kind, _, sequence, _ = _HEADER.unpack_from(buffer, offset)
        if length < HEADER:
            return
        yield kind, sequence, buffer[offset + HEADER : offset + length]
        offset += length + 3 & ~3


def attributes(buffer: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, value) of each attribute; ends at the first whose length does not fit."""
    offset = 0
    while offset + 4 <= len(buffer):
        length, kind = _ATTRIBUTE.unpack_from(buffer, offset)
        if length < 4 or offset + length > len(buffer):
            return
        yield kind & 0x3FFF, buffer[offset + 4 : offset + length]
        offset += length + 3 & ~3


def error_number(body: bytes) -> int:
    """The errno in the body of an NLMSG_ERROR; 0 acknowledges."""
    return -int(_ERROR.unpack_from(body)[0])
