"""The extensions that KAME, Linux and FreeBSD add to RFC 2367's (``sadb_x_...``; the policy's is ``policyext``).

Rules and sources are those of :mod:`ipsecq.pfkey.extensions`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from ipsecq.pfkey import sockaddr
from ipsecq.pfkey.constants import Dialect, aligned
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import need


@dataclass(slots=True)
class Sa2:
    """``struct sadb_x_sa2``: mode, reqid, and the low 32 bits of the sequence number."""

    mode: int = 0
    reqid: int = 0
    sequence: int = 0

    LAYOUT: ClassVar = struct.Struct("=BBHII")

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return self.LAYOUT.pack(self.mode, 0, 0, self.sequence & 0xFFFFFFFF, self.reqid)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, cls.LAYOUT.size, "sadb_x_sa2")
        mode, _, _, sequence, reqid = cls.LAYOUT.unpack_from(body)
        return cls(mode, reqid, sequence)


@dataclass(slots=True)
class Number:
    """An extension that is one 32-bit number in host order: KMPRIVATE's word, FreeBSD's SA_REPLAY (packets)."""

    value: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=I", self.value)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "the extension")
        return cls(struct.unpack_from("=I", body)[0])


@dataclass(slots=True)
class NatType:
    """``struct sadb_x_nat_t_type``: 2 is RFC 3948, 0 none."""

    type: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return bytes((self.type, 0, 0, 0))

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_x_nat_t_type")
        return cls(body[0])


@dataclass(slots=True)
class NatPort:
    """``struct sadb_x_nat_t_port``: host order here, network order on the wire."""

    port: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("!HH", self.port, 0)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_x_nat_t_port")
        return cls(struct.unpack_from("!H", body)[0])


@dataclass(slots=True)
class NatFragment:
    """``struct sadb_x_nat_t_frag`` of FreeBSD: an MTU override, in octets and host order."""

    length: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=HH", self.length, 0)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_x_nat_t_frag")
        return cls(struct.unpack_from("=H", body)[0])


@dataclass(slots=True)
class SecurityContext:
    """``struct sadb_x_sec_ctx`` of Linux: checked and carried; ipsecq has no security modules to ask."""

    alg: int = 0
    doi: int = 0
    context: bytes = b""

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=BBH", self.alg, self.doi, len(self.context)) + self.context

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_x_sec_ctx")
        alg, doi, length = struct.unpack_from("=BBH", body)
        if len(body) + 4 != aligned(8 + length):
            raise PfkeyError(f"a security context of {length} octets in {len(body) + 4}")
        return cls(alg, doi, bytes(body[4 : 4 + length]))


@dataclass(slots=True)
class KmAddress:
    """``struct sadb_x_kmaddress`` of Linux: where key management talks from and to (SADB_X_MIGRATE)."""

    local: bytes
    remote: bytes
    reserved: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        pair = sockaddr.build(self.local, 0, dialect) + sockaddr.build(self.remote, 0, dialect)
        return struct.pack("=I", self.reserved) + pair

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 4, "sadb_x_kmaddress")
        local, remote = sockaddr.parse_pair(body[4:], dialect)
        return cls(local, remote, struct.unpack_from("=I", body)[0])


AF_OF: Final = {4: 2, 16: 10}


@dataclass(slots=True)
class Filter:
    """``struct sadb_x_filter`` of Linux: which SAs a dump means; addresses have 16 octets, IPv4 uses the first four."""

    src: bytes
    dst: bytes
    family: int = 0
    src_prefix: int = 0
    dst_prefix: int = 0

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        return struct.pack("=16s16sHBB", self.src, self.dst, self.family, self.src_prefix, self.dst_prefix)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        need(body, 36, "sadb_x_filter")
        value = cls(*struct.unpack_from("=16s16sHBB", body))
        if max(value.src_prefix, value.dst_prefix) > 128:
            raise PfkeyError(f"filter prefixes {value.src_prefix}, {value.dst_prefix}: at most 128")
        return value

    def matches(self, src: bytes, dst: bytes) -> bool:
        """Is an SA between these packed addresses meant?"""
        if self.family and self.family != AF_OF[len(src)]:
            return False
        return _same_prefix(self.src, src, self.src_prefix) and _same_prefix(self.dst, dst, self.dst_prefix)


def _same_prefix(one: bytes, other: bytes, bits: int) -> bool:
    bits = min(bits, len(other) * 8)
    shift = len(other) * 8 - bits
    return int.from_bytes(one[: len(other)], "big") >> shift == int.from_bytes(other, "big") >> shift
