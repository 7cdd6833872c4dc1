"""Addresses, prefixes, ports and protocols of setkey(8), between text and the packed forms inside."""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache
from typing import Final

from ipsecq.numbers import (
    IPPROTO_ANY,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_IPV4,
    IPPROTO_IPV6,
    IPPROTO_TCP,
    IPPROTO_UDP,
)
from ipsecq.policy.model import Selector
from ipsecq.policy.setpolicy import decimal

UPPER_PROTOCOLS: Final = {
    "ip": IPPROTO_ANY,
    "any": IPPROTO_ANY,
    "icmp": IPPROTO_ICMP,
    "ip4": IPPROTO_IPV4,
    "tcp": IPPROTO_TCP,
    "udp": IPPROTO_UDP,
    "ip6": IPPROTO_IPV6,
    "gre": IPPROTO_GRE,
    "esp": 50,
    "ah": 51,
    "icmp6": IPPROTO_ICMPV6,
    "ospf": 89,
    "ipcomp": 108,
    "sctp": 132,
}
"""Upper-layer protocols that have a name here whatever /etc/protocols says."""

_UPPER_NAMES: Final = {number: name for name, number in UPPER_PROTOCOLS.items()}
ICMP: Final = (IPPROTO_ICMP, IPPROTO_ICMPV6)


@lru_cache(1024)
def parse_address(text: str) -> bytes:
    """Pack an address; ValueError, with the reason, for a name, a zone or nonsense.

    The same address in neighbouring lines is one object, here and in the workers that get it pickled.
    """
    if "%" in text:
        raise ValueError("an address without a zone")
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise ValueError("an IPv4 or IPv6 address (names are not resolved)") from None


def format_address(packed: bytes) -> str:
    """Return the text of a packed address."""
    return str(ipaddress.ip_address(packed))


@lru_cache(1024)
def prefix_range(address: bytes, length: int) -> tuple[bytes, bytes]:
    """Return the first and the last address of a prefix; host bits are cleared.  ValueError for a bad length."""
    bits = len(address) * 8
    if not 0 <= length <= bits:
        raise ValueError(f"a prefix length from 0 to {bits}")
    host = (1 << bits - length) - 1
    value = int.from_bytes(address, "big")
    return (value & ~host).to_bytes(len(address), "big"), (value | host).to_bytes(len(address), "big")


def range_prefix(first: bytes, last: bytes) -> int | None:
    """Return the prefix length of an address range, or None when it is no prefix."""
    low, high = int.from_bytes(first, "big"), int.from_bytes(last, "big")
    host = (low ^ high).bit_length()
    return len(first) * 8 - host if high - low == (1 << host) - 1 else None


def format_range(first: bytes, last: bytes) -> str:
    """Return ``address``, ``address/prefix`` or ``first-last``."""
    length = range_prefix(first, last)
    if length is None:
        return f"{format_address(first)}-{format_address(last)}"
    return format_address(first) + ("" if first == last else f"/{length}")


def parse_port(text: str) -> tuple[int, int]:
    """Return the range of ``any``, ``22``, ``22-80`` or a service name; ValueError for anything else.

    0 alone is any, as in KAME; ``0-0`` means port 0.
    """
    if text.lower() in ("any", "0"):
        return 0, 65535
    low, dash, high = text.partition("-")
    if low.isascii() and low.isdigit() and (not dash or (high.isascii() and high.isdigit())):
        first, last = decimal(low), decimal(high or low)
        if first <= last <= 65535:
            return first, last
        raise ValueError("ports from 0 to 65535, the lower one first")
    try:
        port = socket.getservbyname(text)
    except (OSError, ValueError):
        raise ValueError("a port, a range of ports, a service of /etc/services, or any") from None
    return port, port


def format_port(first: int, last: int) -> str:
    """Return ``any``, ``22`` or ``22-80``; port 0 alone is ``0-0``."""
    if (first, last) == (0, 65535):
        return "any"
    return f"{first}" if first == last and first else f"{first}-{last}"


def parse_icmp(text: str) -> tuple[int, int, int, int]:
    """Return the ranges of type and code of ``135,0``: 0 and ``any`` take all, ``0-0`` is the number 0; ValueError."""
    kind, _, code = text.partition(",")
    values: list[int] = []
    for part in (kind, code or "any"):
        low, dash, high = part.partition("-")
        if part.lower() in ("any", "0"):
            values += (0, 65535)
        elif low.isascii() and low.isdigit() and (not dash or (high.isascii() and high.isdigit())):
            first, last = decimal(low), decimal(high or low)
            if not first <= last <= 255:
                raise ValueError("type and code from 0 to 255")
            values += (first, last)
        else:
            raise ValueError("TYPE,CODE in numbers, such as 135,0")
    return values[0], values[1], values[2], values[3]


def parse_upper(text: str) -> int:
    """Return the number of an upper-layer protocol: a number, a name of ours or of /etc/protocols; ValueError."""
    name = text.lower()
    if name.isascii() and name.isdigit():
        if decimal(name) > 255:
            raise ValueError("a protocol number from 0 to 255")
        return decimal(name)
    if name in UPPER_PROTOCOLS:
        return UPPER_PROTOCOLS[name]
    try:
        return socket.getprotobyname(text)
    except (OSError, ValueError):
        raise ValueError("an upper-layer protocol (a name of /etc/protocols, a number, or any)") from None


def format_upper(protocol: int) -> str:
    """Return the name of an upper-layer protocol, or its number."""
    return _UPPER_NAMES.get(protocol, str(protocol))


def format_selector(selector: Selector) -> str:
    """Return ``src_range dst_range upperspec`` as spdadd takes them."""
    src = format_range(selector.src_first, selector.src_last)
    dst = format_range(selector.dst_first, selector.dst_last)
    sport = format_port(selector.sport_first, selector.sport_last)
    dport = format_port(selector.dport_first, selector.dport_last)
    upper = format_upper(selector.protocol)
    if selector.protocol in ICMP:
        # 0 is KAME's way to say any here.
        kind = f" {sport},{dport}".replace("any", "0") if selector.has_ports else ""
        return f"{src} {dst} {upper}{kind}"
    return f"{src}[{sport}] {dst}[{dport}] {upper}"
