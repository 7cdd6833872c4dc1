"""``struct sockaddr`` as PF_KEY messages carry it: Linux's layout and BSD's, which begins with a length octet."""

from __future__ import annotations

import struct
from typing import Final

from ipsecq.pfkey.constants import Dialect
from ipsecq.pfkey.errors import PfkeyError

_LINUX: Final = {2: 4, 10: 16}
_FREEBSD: Final = {2: 4, 28: 16}
_LENGTH: Final = {4: 16, 16: 28}
"""Octets of ``sockaddr_in`` and ``sockaddr_in6`` by the length of the address in them."""

_PORT: Final = struct.Struct("!H")


def build(address: bytes, port: int, dialect: Dialect) -> bytes:
    """A sockaddr_in or sockaddr_in6, unpadded: 16 or 28 octets.  ``port`` in host order."""
    six = len(address) == 16
    if dialect is Dialect.LINUX:
        family = struct.pack("=H", 10 if six else 2)
    else:
        family = bytes((28, 28)) if six else bytes((16, 2))
    head = family + _PORT.pack(port)
    return head + bytes(4) + address + bytes(4) if six else head + address + bytes(8)


def parse(data: memoryview, dialect: Dialect) -> tuple[bytes, int, int]:
    """(address, port in host order, octets taken) of the sockaddr at the start of ``data``.

    Raises :class:`PfkeyError` (EINVAL) when it is cut short, of another family, or (BSD) of a wrong length.
    """
    if len(data) < 4:
        raise PfkeyError(f"a sockaddr of {len(data)} octets: 16 or 28 are needed")
    if dialect is Dialect.LINUX:
        family, families = struct.unpack_from("=H", data)[0], _LINUX
    else:
        family, families = data[1], _FREEBSD
    width = families.get(family)
    if width is None:
        raise PfkeyError(f"address family {family}: only IPv4 and IPv6 are known")
    length = _LENGTH[width]
    if len(data) < length:
        raise PfkeyError(f"a sockaddr of {len(data)} octets: family {family} needs {length}")
    if dialect is Dialect.FREEBSD and data[0] != length:
        raise PfkeyError(f"sa_len {data[0]}: family {family} needs {length}")
    start = 4 if width == 4 else 8
    return bytes(data[start : start + width]), _PORT.unpack_from(data, 2)[0], length


def parse_pair(data: memoryview, dialect: Dialect) -> tuple[bytes, bytes]:
    """Two sockaddrs of one family, one right behind the other, as in ``sadb_x_ipsecrequest``."""
    first, _, length = parse(data, dialect)
    second, _, _ = parse(data[length:], dialect)
    if len(first) != len(second):
        raise PfkeyError("two addresses of different families in one request")
    return first, second
