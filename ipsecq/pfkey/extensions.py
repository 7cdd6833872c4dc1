"""The extensions of RFC 2367 as typed values: each packs its body, and unpacks it with every check.

A *body* is what follows the four octets of length and type.  Integers are in the machine's order but for SPIs and
ports, which are in network order on the wire and in host order here.  Sources: RFC 2367 section 2.3,
``<linux/pfkeyv2.h>``, FreeBSD's ``<net/pfkeyv2.h>``.  What these two add: :mod:`ipsecq.pfkey.xextensions`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, Self

from ipsecq.pfkey import sockaddr
from ipsecq.pfkey.constants import Dialect, aligned
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.secret import Key


class Extension(Protocol):
    """What every extension can do."""

    def pack(self, dialect: Dialect) -> bytes:
        """The body, unpadded; the message writer fills up to whole words."""
        ...

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:
        """The value in ``body`` (its padding included); raises PfkeyError (EINVAL)."""
        ...


def need(body: memoryview, length: int, name: str) -> None:
    """PfkeyError (EINVAL) for a body that is shorter than ``length`` octets."""
    if len(body) < length:
        raise PfkeyError(f"{name} of {len(body) + 4} octets: {length + 4} are needed")


@dataclass(slots=True)
class Sa:
    """``struct sadb_sa``."""

    spi: int
    replay: int = 0
    """As sent: packets for Linux, units of eight packets for FreeBSD."""
    state: int = 0
    auth: int = 0
    encrypt: int = 0
    flags: int = 0

    LAYOUT: ClassVar = struct.Struct("=4s4BI")

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        spi = self.spi.to_bytes(4, "big")
        return self.LAYOUT.pack(spi, self.replay, self.state, self.auth, self.encrypt, self.flags)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, cls.LAYOUT.size, "sadb_sa")
        spi, *rest = cls.LAYOUT.unpack_from(body)
        return cls(int.from_bytes(spi, "big"), *rest)


@dataclass(slots=True)
class LifetimeExt:
    """``struct sadb_lifetime``: limits, or with LIFETIME_CURRENT what was used up; times in seconds.

    ``octets`` is ``sadb_lifetime_bytes``.
    """

    allocations: int = 0
    octets: int = 0
    addtime: int = 0
    usetime: int = 0

    LAYOUT: ClassVar = struct.Struct("=IQQQ")

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return self.LAYOUT.pack(self.allocations, self.octets, self.addtime, self.usetime)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, cls.LAYOUT.size, "sadb_lifetime")
        return cls(*cls.LAYOUT.unpack_from(body))


@dataclass(slots=True)
class Address:
    """``struct sadb_address`` and its sockaddr.  ``address`` has 4 or 16 octets, ``port`` is in host order."""

    address: bytes
    prefix: int
    protocol: int = 0
    port: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return bytes((self.protocol, self.prefix, 0, 0)) + sockaddr.build(self.address, self.port, dialect)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4 + 16, "sadb_address")
        address, port, length = sockaddr.parse(body[4:], dialect)
        if len(body) != aligned(8 + length) - 4:
            raise PfkeyError(f"sadb_address of {len(body) + 4} octets: its family needs {aligned(8 + length)}")
        if body[1] > len(address) * 8:
            raise PfkeyError(f"prefix length {body[1]}: at most {len(address) * 8} for this family")
        return cls(address, body[1], body[0], port)


@dataclass(slots=True)
class KeyExt:
    """``struct sadb_key``."""

    key: Key

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=HH", self.key.bits, 0) + self.key.octets

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_key")
        bits = struct.unpack_from("=H", body)[0]
        if bits % 8:
            raise PfkeyError(f"a key of {bits} bits: whole octets are needed")
        need(body, 4 + bits // 8, "sadb_key")
        return cls(Key(bytes(body[4 : 4 + bits // 8])))


@dataclass(slots=True)
class Identity:
    """``struct sadb_ident``: type, numeric id, and the name without its NUL and padding."""

    type: int
    id: int = 0
    name: bytes = b""

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=HHQ", self.type, 0, self.id) + (self.name + b"\0" if self.name else b"")

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 12, "sadb_ident")
        kind, _, number = struct.unpack_from("=HHQ", body)
        name = bytes(body[12:])
        if name and b"\0" not in name:
            raise PfkeyError("the name in an identity extension has no end (NUL)")
        return cls(kind, number, name.split(b"\0", 1)[0])


@dataclass(slots=True)
class Sensitivity:
    """``struct sadb_sens``: carried, never judged (ipsecq has no labels)."""

    dpd: int = 0
    level: int = 0
    integrity_level: int = 0
    bitmap: bytes = b""
    integrity_bitmap: bytes = b""

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        lengths = len(self.bitmap) // 8, len(self.integrity_bitmap) // 8
        head = struct.pack("=I4BI", self.dpd, self.level, lengths[0], self.integrity_level, lengths[1], 0)
        return head + self.bitmap + self.integrity_bitmap

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 12, "sadb_sens")
        dpd, level, words, integrity_level, integrity_words, _ = struct.unpack_from("=I4BI", body)
        end = 12 + words * 8
        need(body, end + integrity_words * 8, "sadb_sens")
        return cls(dpd, level, integrity_level, bytes(body[12:end]), bytes(body[end : end + integrity_words * 8]))


@dataclass(slots=True)
class Combination:
    """``struct sadb_comb``: one choice of an ACQUIRE's proposal; lengths of keys in bits."""

    auth: int = 0
    encrypt: int = 0
    flags: int = 0
    auth_minbits: int = 0
    auth_maxbits: int = 0
    encrypt_minbits: int = 0
    encrypt_maxbits: int = 0
    soft: LifetimeExt = field(default_factory=LifetimeExt)
    hard: LifetimeExt = field(default_factory=LifetimeExt)

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("=BBHHHHHIIIQQQQQQ")

    def pack(self) -> bytes:
        """The 72 octets of the structure."""
        soft, hard = self.soft, self.hard
        return self.LAYOUT.pack(
            self.auth, self.encrypt, self.flags,
            self.auth_minbits, self.auth_maxbits, self.encrypt_minbits, self.encrypt_maxbits, 0,
            soft.allocations, hard.allocations, soft.octets, hard.octets,
            soft.addtime, hard.addtime, soft.usetime, hard.usetime,
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: memoryview) -> Self:
        """The structure at the start of ``data``, which is long enough."""
        auth, encrypt, flags, amin, amax, emin, emax, _, *limits = cls.LAYOUT.unpack_from(data)
        soft, hard = LifetimeExt(*limits[0::2]), LifetimeExt(*limits[1::2])
        return cls(auth, encrypt, flags, amin, amax, emin, emax, soft, hard)


@dataclass(slots=True)
class Proposal:
    """``struct sadb_prop`` with its combinations."""

    replay: int = 0
    combinations: list[Combination] = field(default_factory=list)

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return bytes((self.replay, 0, 0, 0)) + b"".join(each.pack() for each in self.combinations)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_prop")
        size = Combination.LAYOUT.size
        if (len(body) - 4) % size:
            raise PfkeyError(f"a proposal of {len(body) + 4} octets: not a whole number of combinations")
        return cls(body[0], [Combination.unpack(body[at : at + size]) for at in range(4, len(body), size)])


@dataclass(slots=True)
class Algorithm:
    """``struct sadb_alg``: IV length in octets, key lengths in bits."""

    id: int
    ivlen: int = 0
    minbits: int = 0
    maxbits: int = 0

    LAYOUT: ClassVar = struct.Struct("=BBHHH")


@dataclass(slots=True)
class Supported:
    """``struct sadb_supported`` with its algorithms."""

    algorithms: list[Algorithm] = field(default_factory=list)

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        layout = Algorithm.LAYOUT
        return bytes(4) + b"".join(layout.pack(a.id, a.ivlen, a.minbits, a.maxbits, 0) for a in self.algorithms)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_supported")
        layout = Algorithm.LAYOUT
        return cls([Algorithm(*layout.unpack_from(body, at)[:4]) for at in range(4, len(body) - 7, 8)])


@dataclass(slots=True)
class SpiRange:
    """``struct sadb_spirange``: both ends belong to it."""

    min: int
    max: int

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=III", self.min, self.max, 0)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 12, "sadb_spirange")
        return cls(*struct.unpack_from("=II", body))
