"""The policy extension (``sadb_x_policy``) and the list of ipsecrequests that follows it in the same extension.

It is also, without a message around it, the value of the socket options IP_IPSEC_POLICY and IPV6_IPSEC_POLICY, and
what ipsec_set_policy(3) makes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final, Self

from ipsecq.pfkey import sockaddr
from ipsecq.pfkey.constants import Dialect, Ext, aligned
from ipsecq.pfkey.errors import PfkeyError

_POLICY: Final = struct.Struct("=HBBII")
_LINUX_REQUEST: Final = struct.Struct("=HHBBHII")
_FREEBSD_REQUEST: Final = struct.Struct("=HHBBH")


@dataclass(slots=True)
class Request:
    """``struct sadb_x_ipsecrequest``: one transform.  Addresses (4 or 16 octets) are None where none were sent."""

    protocol: int
    mode: int
    level: int = 0
    reqid: int = 0
    src: bytes | None = None
    dst: bytes | None = None

    def pack(self, dialect: Dialect) -> bytes:
        """The structure and its sockaddrs; its length field counts octets in both dialects."""
        tail = b""
        if self.src is not None and self.dst is not None:
            tail = sockaddr.build(self.src, 0, dialect) + sockaddr.build(self.dst, 0, dialect)
        if dialect is Dialect.LINUX:
            length = aligned(_LINUX_REQUEST.size + len(tail))
            head = _LINUX_REQUEST.pack(length, self.protocol, self.mode, self.level, 0, self.reqid, 0)
        else:
            length = aligned(_FREEBSD_REQUEST.size + len(tail))
            head = _FREEBSD_REQUEST.pack(length, self.protocol, self.mode, self.level, self.reqid & 0xFFFF)
        return (head + tail).ljust(length, b"\0")

    @classmethod
    def unpack(cls, data: memoryview, dialect: Dialect) -> tuple[Self, int]:
        """(the request at the start of ``data``, octets taken); raises PfkeyError (EINVAL)."""
        layout = _LINUX_REQUEST if dialect is Dialect.LINUX else _FREEBSD_REQUEST
        if len(data) < layout.size:
            raise PfkeyError(f"an ipsecrequest cut short at {len(data)} octets")
        length, protocol, mode, level, *rest = layout.unpack_from(data)
        reqid = rest[1] if dialect is Dialect.LINUX else rest[0]
        if length < layout.size or length > len(data):
            raise PfkeyError(f"sadb_x_ipsecrequest_len {length}: between {layout.size} and {len(data)} here")
        request = cls(protocol, mode, level, reqid)
        # A KAME client sends the pair in transport mode too; one that has no addresses sends the bare structure.
        if length > layout.size:
            request.src, request.dst = sockaddr.parse_pair(data[layout.size : length], dialect)
        return request, length


@dataclass(slots=True)
class PolicyExt:
    """``struct sadb_x_policy``: IPSEC_POLICY_*, IPSEC_DIR_*, id, priority, and the transforms in written order."""

    type: int = 0
    direction: int = 0
    id: int = 0
    priority: int = 0
    requests: list[Request] = field(default_factory=list)

    def pack(self, dialect: Dialect) -> bytes:  # noqa: D102
        head = _POLICY.pack(self.type, self.direction, 0, self.id, self.priority)
        return head + b"".join(request.pack(dialect) for request in self.requests)

    @classmethod
    def unpack(cls, body: memoryview, dialect: Dialect) -> Self:  # noqa: D102
        if len(body) < _POLICY.size:
            raise PfkeyError(f"sadb_x_policy of {len(body) + 4} octets: {_POLICY.size + 4} are needed")
        kind, direction, _, number, priority = _POLICY.unpack_from(body)
        requests = []
        at = _POLICY.size
        while at < len(body):
            request, length = Request.unpack(body[at:], dialect)
            requests.append(request)
            at += length
        return cls(kind, direction, number, priority, requests)

    def to_option(self, dialect: Dialect = Dialect.LINUX) -> bytes:
        """The value of a socket option: the extension with its length and type."""
        body = self.pack(dialect)
        return struct.pack("=HH", (len(body) + 4) // 8, Ext.POLICY) + body

    @classmethod
    def from_option(cls, value: bytes, dialect: Dialect = Dialect.LINUX) -> Self:
        """Inverse of :meth:`to_option`; raises PfkeyError (EINVAL).

        The extension type is not looked at, as in Linux: Debian's iked leaves a wrong number there.
        """
        if len(value) < 16:
            raise PfkeyError(f"a policy of {len(value)} octets: 16 are needed")
        words = struct.unpack_from("=H", value)[0]
        if words * 8 > len(value) or words < 2:
            raise PfkeyError(f"a policy of {words} words in {len(value)} octets")
        return cls.unpack(memoryview(value)[4 : words * 8], dialect)
