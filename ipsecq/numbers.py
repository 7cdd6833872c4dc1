"""Assigned numbers that more than one room needs: IP protocols, PF_KEY modes, policy codes.

Sources: IANA protocol numbers, RFC 2367, KAME's ``netipsec/ipsec.h``, Linux's ``<linux/ipsec.h>``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

IPPROTO_ICMP: Final = 1
IPPROTO_IPV4: Final = 4
IPPROTO_TCP: Final = 6
IPPROTO_UDP: Final = 17
IPPROTO_IPV6: Final = 41
IPPROTO_GRE: Final = 47
IPPROTO_ICMPV6: Final = 58
IPPROTO_NONE: Final = 59
IPPROTO_ANY: Final = 255
"""``IPSEC_ULPROTO_ANY``: a selector that takes every upper-layer protocol."""

NATT_PORT: Final = 4500
IPV4_MIN_MTU: Final = 576
IPV4_LEAST_MTU: Final = 68
"""What every link carries whole (RFC 791 section 3.2); a sender is never asked for less."""
IPV6_MIN_MTU: Final = 1280
IP_MAXPACKET: Final = 65535
"""The longest packet that a 16-bit length can say (<netinet/ip.h>)."""


class Protocol(IntEnum):
    """The three protocols of ipsec(4), by IP protocol number."""

    ESP = 50
    AH = 51
    IPCOMP = 108


class Mode(IntEnum):
    """``IPSEC_MODE_*``."""

    ANY = 0
    TRANSPORT = 1
    TUNNEL = 2


class Direction(IntEnum):
    """``IPSEC_DIR_*``: which way a policy looks."""

    IN = 1
    OUT = 2


class Action(IntEnum):
    """``IPSEC_POLICY_*``: what a policy does.  ENTRUST and BYPASS exist for sockets only."""

    DISCARD = 0
    NONE = 1
    IPSEC = 2
    ENTRUST = 3
    BYPASS = 4


class Level(IntEnum):
    """``IPSEC_LEVEL_*`` of one transform of a policy."""

    DEFAULT = 0
    USE = 1
    REQUIRE = 2
    UNIQUE = 3


class SaState(IntEnum):
    """``SADB_SASTATE_*`` (RFC 2367 section 3.2)."""

    LARVAL = 0
    MATURE = 1
    DYING = 2
    DEAD = 3
