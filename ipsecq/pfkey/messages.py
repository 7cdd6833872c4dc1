"""A PF_KEYv2 message: the base header and its extensions, parsed with every check and written back.

Nothing but :class:`PfkeyError` leaves :func:`parse`, whatever the octets: a bad header is EINVAL, a length that is not
the datagram's EMSGSIZE, anything wrong with an extension EINVAL, as Linux answers.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, fields
from typing import Final

from ipsecq.pfkey.constants import (
    HEADER_LENGTH,
    MESSAGE_TYPE_MAX,
    PF_KEY_V2,
    Dialect,
    Ext,
    FreeBsdExt,
    LinuxExt,
    aligned,
)
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import (
    Address,
    Extension,
    Identity,
    KeyExt,
    LifetimeExt,
    Proposal,
    Sa,
    Sensitivity,
    SpiRange,
    Supported,
)
from ipsecq.pfkey.policyext import PolicyExt
from ipsecq.pfkey.xextensions import (
    Filter,
    KmAddress,
    NatFragment,
    NatPort,
    NatType,
    Number,
    Sa2,
    SecurityContext,
)

_HEADER: Final = struct.Struct("=BBBBHHII")
_EXTENSION: Final = struct.Struct("=HH")


@dataclass(slots=True)
class Message:
    """One message.  Each extension may be there once (RFC 2367 section 2.2) and is None where it is not."""

    type: int
    satype: int = 0
    errno: int = 0
    seq: int = 0
    pid: int = 0
    reserved: int = 0
    sa: Sa | None = None
    lifetime_hard: LifetimeExt | None = None
    lifetime_soft: LifetimeExt | None = None
    lifetime_current: LifetimeExt | None = None
    src: Address | None = None
    dst: Address | None = None
    proxy: Address | None = None
    key_auth: KeyExt | None = None
    key_encrypt: KeyExt | None = None
    identity_src: Identity | None = None
    identity_dst: Identity | None = None
    sensitivity: Sensitivity | None = None
    proposal: Proposal | None = None
    supported_auth: Supported | None = None
    supported_encrypt: Supported | None = None
    spirange: SpiRange | None = None
    kmprivate: Number | None = None
    policy: PolicyExt | None = None
    sa2: Sa2 | None = None
    natt_type: NatType | None = None
    natt_sport: NatPort | None = None
    natt_dport: NatPort | None = None
    natt_oa: Address | None = None
    """The original source of the SA (Linux's NAT_T_OA, FreeBSD's OAI)."""
    natt_oar: Address | None = None
    """FreeBSD: the original destination of the SA."""
    natt_frag: NatFragment | None = None
    sa_replay: Number | None = None
    new_src: Address | None = None
    new_dst: Address | None = None
    sec_ctx: SecurityContext | None = None
    kmaddress: KmAddress | None = None
    filter: Filter | None = None


_SHARED: Final[dict[int, tuple[str, type[Extension]]]] = {
    Ext.SA: ("sa", Sa),
    Ext.LIFETIME_CURRENT: ("lifetime_current", LifetimeExt),
    Ext.LIFETIME_HARD: ("lifetime_hard", LifetimeExt),
    Ext.LIFETIME_SOFT: ("lifetime_soft", LifetimeExt),
    Ext.ADDRESS_SRC: ("src", Address),
    Ext.ADDRESS_DST: ("dst", Address),
    Ext.ADDRESS_PROXY: ("proxy", Address),
    Ext.KEY_AUTH: ("key_auth", KeyExt),
    Ext.KEY_ENCRYPT: ("key_encrypt", KeyExt),
    Ext.IDENTITY_SRC: ("identity_src", Identity),
    Ext.IDENTITY_DST: ("identity_dst", Identity),
    Ext.SENSITIVITY: ("sensitivity", Sensitivity),
    Ext.PROPOSAL: ("proposal", Proposal),
    Ext.SUPPORTED_AUTH: ("supported_auth", Supported),
    Ext.SUPPORTED_ENCRYPT: ("supported_encrypt", Supported),
    Ext.SPIRANGE: ("spirange", SpiRange),
    Ext.KMPRIVATE: ("kmprivate", Number),
    Ext.POLICY: ("policy", PolicyExt),
    Ext.SA2: ("sa2", Sa2),
    Ext.NAT_T_TYPE: ("natt_type", NatType),
    Ext.NAT_T_SPORT: ("natt_sport", NatPort),
    Ext.NAT_T_DPORT: ("natt_dport", NatPort),
    Ext.NAT_T_OA: ("natt_oa", Address),
}

EXTENSIONS: Final[dict[Dialect, dict[int, tuple[str, type[Extension]]]]] = {
    Dialect.LINUX: {
        **_SHARED,
        LinuxExt.SEC_CTX: ("sec_ctx", SecurityContext),
        LinuxExt.KMADDRESS: ("kmaddress", KmAddress),
        LinuxExt.FILTER: ("filter", Filter),
    },
    Dialect.FREEBSD: {
        **_SHARED,
        FreeBsdExt.NAT_T_OAR: ("natt_oar", Address),
        FreeBsdExt.NAT_T_FRAG: ("natt_frag", NatFragment),
        FreeBsdExt.SA_REPLAY: ("sa_replay", Number),
        FreeBsdExt.NEW_ADDRESS_SRC: ("new_src", Address),
        FreeBsdExt.NEW_ADDRESS_DST: ("new_dst", Address),
    },
}
"""Extension number to (field of :class:`Message`, its class), by dialect."""

_NUMBERS: Final = {
    dialect: {name: int(number) for number, (name, _) in table.items()} for dialect, table in EXTENSIONS.items()
}

# The order of a reply.  Clients go by type, not by place, but scripts that print what they read look like the system's.
_ORDER: Final = {
    Dialect.LINUX: tuple(each.name for each in fields(Message))[6:],
    Dialect.FREEBSD: (
        "sa", "sa2", "sa_replay", "src", "dst", "proxy", "new_src", "new_dst", "key_auth", "key_encrypt",
        "lifetime_current", "lifetime_hard", "lifetime_soft", "identity_src", "identity_dst", "sensitivity",
        "proposal", "supported_auth", "supported_encrypt", "spirange", "kmprivate", "policy",
        "natt_type", "natt_sport", "natt_dport", "natt_oa", "natt_oar", "natt_frag",
    ),
}  # fmt: skip
_POLICY_ORDER: Final = ("src", "dst", "lifetime_hard", "lifetime_soft", "lifetime_current", "policy", "proposal")


def build(message: Message, dialect: Dialect = Dialect.LINUX) -> bytes:
    """The datagram.  Extensions that the dialect has no number for are left out."""
    numbers = _NUMBERS[dialect]
    order = _ORDER[dialect]
    if message.policy is not None and message.sa is None:
        order = _POLICY_ORDER + tuple(name for name in order if name not in _POLICY_ORDER)
    parts = [b""]
    for name in order:
        value: Extension | None = getattr(message, name)
        number = numbers.get(name)
        if value is None or number is None:
            continue
        body = value.pack(dialect)
        length = aligned(len(body) + 4)
        parts.append(_EXTENSION.pack(length // 8, number) + body.ljust(length - 4, b"\0"))
    words = (HEADER_LENGTH + sum(map(len, parts))) // 8
    if words > 0xFFFF:
        raise PfkeyError(f"a message of {words} words: at most 65535 fit its length field", errno.EMSGSIZE)
    parts[0] = _HEADER.pack(
        PF_KEY_V2, message.type, message.errno, message.satype, words, message.reserved, message.seq, message.pid
    )
    return b"".join(parts)


def parse_header(data: bytes | memoryview, dialect: Dialect = Dialect.LINUX, *, reply: bool = False) -> Message:
    """The base header, checked, without a look at the extensions.

    Raises PfkeyError: EMSGSIZE for lengths, EINVAL for version, reserved field and type (a ``reply`` with an errno
    repeats the type that was refused).
    """
    if len(data) < HEADER_LENGTH:
        raise PfkeyError(f"a message of {len(data)} octets: {HEADER_LENGTH} are needed", errno.EMSGSIZE)
    version, kind, number, satype, words, reserved, seq, pid = _HEADER.unpack_from(data)
    if version != PF_KEY_V2:
        raise PfkeyError(f"PF_KEY version {version}: 2 is spoken here")
    if not 0 < kind <= MESSAGE_TYPE_MAX[dialect] and not (reply and number):
        raise PfkeyError(f"message type {kind} is unknown")
    if words * 8 != len(data):
        raise PfkeyError(f"sadb_msg_len {words} words, but {len(data)} octets came", errno.EMSGSIZE)
    if reserved and not reply:
        raise PfkeyError(f"sadb_msg_reserved is {reserved}: it must be 0")
    return Message(kind, satype, number, seq, pid, reserved)


def parse(data: bytes | memoryview, dialect: Dialect = Dialect.LINUX, *, reply: bool = False) -> Message:
    """The message in ``data``; raises PfkeyError and nothing else.

    ``reply``: it comes from the server, whose policy messages hold a count of references in the reserved field.
    """
    message = parse_header(data, dialect, reply=reply)
    view = memoryview(data)
    table = EXTENSIONS[dialect]
    at = HEADER_LENGTH
    seen = 0
    while at < len(view):
        words, number = _EXTENSION.unpack_from(view, at)
        end = at + words * 8
        if not words or end > len(view) or not number:
            raise PfkeyError(f"extension {number} of {words} words at octet {at} of {len(view)}")
        known = table.get(number)
        if known is None:
            # Linux passes over what it does not know, FreeBSD refuses it.
            if dialect is Dialect.FREEBSD:
                raise PfkeyError(f"extension {number} is unknown")
        else:
            if seen >> number & 1:
                raise PfkeyError(f"extension {number} is there twice")
            seen |= 1 << number
            name, kind = known
            setattr(message, name, kind.unpack(view[at + 4 : end], dialect))
        at = end
    return message
