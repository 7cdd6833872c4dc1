"""Numbers of PF_KEYv2: RFC 2367, KAME's extensions, and the two dialects in which they are spoken today.

The names are those of the headers (``<linux/pfkeyv2.h>``, FreeBSD's ``<net/pfkeyv2.h>``).  What differs between the two
is in :class:`Dialect` and :data:`EXTENSIONS`; algorithm numbers are the registry's business
(:mod:`ipsecq.pfkey.algorithms`).
"""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag
from typing import Final

PF_KEY_V2: Final = 2
AF_KEY: Final = 15
HEADER_LENGTH: Final = 16
"""Octets of ``struct sadb_msg``; every length on the wire counts words of eight octets."""


class Dialect(Enum):
    """Whose header file the client was compiled with."""

    LINUX = "linux"
    FREEBSD = "freebsd"


class MessageType(IntEnum):
    """``sadb_msg_type``."""

    RESERVED = 0
    GETSPI = 1
    UPDATE = 2
    ADD = 3
    DELETE = 4
    GET = 5
    ACQUIRE = 6
    REGISTER = 7
    EXPIRE = 8
    FLUSH = 9
    DUMP = 10
    X_PROMISC = 11
    X_PCHANGE = 12
    X_SPDUPDATE = 13
    X_SPDADD = 14
    X_SPDDELETE = 15
    X_SPDGET = 16
    X_SPDACQUIRE = 17
    X_SPDDUMP = 18
    X_SPDFLUSH = 19
    X_SPDSETIDX = 20
    X_SPDEXPIRE = 21
    X_SPDDELETE2 = 22
    X_NAT_T_NEW_MAPPING = 23
    X_MIGRATE = 24


MESSAGE_TYPE_MAX: Final = {Dialect.LINUX: 24, Dialect.FREEBSD: 22}


class SaType(IntEnum):
    """``sadb_msg_satype`` of the protocols that ipsecq has."""

    UNSPEC = 0
    AH = 2
    ESP = 3
    IPCOMP = 9


SATYPE_MAX: Final = {Dialect.LINUX: 9, Dialect.FREEBSD: 12}


class SaFlag(IntFlag):
    """``sadb_sa_flags``.  Linux has the three high bits, KAME and FreeBSD the low ones."""

    PFS = 0x1
    CYCSEQ = 0x40
    """KAME: the sequence number may wrap (refused: an IV would be used twice)."""
    RAWCPI = 0x80
    ESN = 0x400
    """FreeBSD's SADB_X_SAFLAGS_ESN; ipsecq takes it in both dialects, because Linux's PF_KEY has no way to say it."""
    NOPMTUDISC = 0x20000000
    DECAP_DSCP = 0x40000000
    NOECN = 0x80000000


FLAGS_KEPT: Final = {
    Dialect.LINUX: int(SaFlag.ESN | SaFlag.NOPMTUDISC | SaFlag.DECAP_DSCP | SaFlag.NOECN),
    Dialect.FREEBSD: 0x0FFF,
}
"""What a reply repeats of the flags of an SA; FreeBSD's is SADB_KEY_FLAGS_MAX."""

CALG_MAX: Final = 4
ALG_MAX: Final = {Dialect.LINUX: (251, 253), Dialect.FREEBSD: (252, 250)}
"""Highest authentication and encryption number that is not refused with EINVAL before it is looked up."""

UDP_ENCAP_ESPINUDP: Final = 2
"""``sadb_x_nat_t_type_type`` of RFC 3948, the one kind of UDP encapsulation that exists today."""

DIR_FWD: Final = 3
"""Linux's third direction, ``IPSEC_DIR_FWD``: a forwarded packet.  BSD's *in* means those too."""

MANUAL_REQID_MAX: Final = 0x3FFF
"""Reqids up to this one are the operator's; the server draws from above it for ``unique`` without a number."""

SPI_MIN: Final = 0x100
CPI_MAX: Final = 0xEFFF
"""RFC 3173 section 3.3: 256 to 61439 are for negotiated CPIs."""

LARVAL_LIFETIME: Final = 30.0
"""Seconds that an SA of SADB_GETSPI, or an unanswered SADB_ACQUIRE, lives."""


class Ext(IntEnum):
    """Extension types that both dialects share (``SADB_EXT_*`` and ``SADB_X_EXT_*``)."""

    SA = 1
    LIFETIME_CURRENT = 2
    LIFETIME_HARD = 3
    LIFETIME_SOFT = 4
    ADDRESS_SRC = 5
    ADDRESS_DST = 6
    ADDRESS_PROXY = 7
    KEY_AUTH = 8
    KEY_ENCRYPT = 9
    IDENTITY_SRC = 10
    IDENTITY_DST = 11
    SENSITIVITY = 12
    PROPOSAL = 13
    SUPPORTED_AUTH = 14
    SUPPORTED_ENCRYPT = 15
    SPIRANGE = 16
    KMPRIVATE = 17
    POLICY = 18
    SA2 = 19
    NAT_T_TYPE = 20
    NAT_T_SPORT = 21
    NAT_T_DPORT = 22
    NAT_T_OA = 23
    """Linux: the peer's original address.  FreeBSD calls it OAI: the original source of the SA."""


class LinuxExt(IntEnum):
    """Extension types of Linux that mean something else, or nothing, to FreeBSD."""

    SEC_CTX = 24
    KMADDRESS = 25
    FILTER = 26


class FreeBsdExt(IntEnum):
    """Extension types of FreeBSD that mean something else, or nothing, to Linux."""

    NAT_T_OAR = 24
    NAT_T_FRAG = 25
    SA_REPLAY = 26
    NEW_ADDRESS_SRC = 27
    NEW_ADDRESS_DST = 28


def aligned(length: int) -> int:
    """``length`` rounded up to whole words of eight octets."""
    return (length + 7) & ~7
