"""Which SA a flow gets, said once for packets and for ``ipsecq explain``.

One SA serves all flows of a transform, unless the operator wants several to share them (RFC 9611: an SA that several
processors use has its sequence numbers, its replay window and its order to lose).
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final
from zlib import crc32

from ipsecq.engine.tables import Tables
from ipsecq.policy.model import Transform
from ipsecq.sa.association import SecurityAssociation

_rest: Final = Struct(">BHH").pack


def flow_number(src: bytes, dst: bytes, protocol: int, sport: int, dport: int, fragment: bool = False) -> int:
    """A number of 32 bits by which a flow chooses among SAs.  The pieces of a datagram have no ports."""
    return crc32(b"".join((src, dst, _rest(protocol & 0xFF, *((0, 0) if fragment else (sport, dport))))))


def sharers(tables: Tables, transform: Transform, near: bytes, far: bytes) -> Sequence[SecurityAssociation]:
    """The SAs among which flows between ``near`` and ``far`` choose for one transform: none, one, or several."""
    wanted = int(transform.protocol), int(transform.mode), near, far, transform.reqid
    if tables.parallel_sas:
        return tables.sad.sharers(*wanted)
    sa = tables.sad.outbound(*wanted, oldest=tables.sysctl.key.preferred_oldsa != 0)
    return () if sa is None else (sa,)


def share(sas: Sequence[SecurityAssociation], number: int) -> SecurityAssociation | None:
    """The one of ``sas`` to which flow ``number`` belongs; None of none.

    The highest of one weight a flow and SA (rendezvous hashing): every SA gets an equal share, a flow stays with its SA
    as others come and go, and the flows of one that goes are shared out evenly.
    """
    if len(sas) < 2:
        return sas[0] if sas else None
    return max(sas, key=lambda sa: _weight(sa.spi, number))


def _weight(spi: int, number: int) -> int:
    """32 bits of which each depends on all of both: the finalizer of MurmurHash3.  SPIs may be consecutive numbers."""
    mixed = (spi * 0x9E3779B1 ^ number) & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return mixed ^ mixed >> 16
