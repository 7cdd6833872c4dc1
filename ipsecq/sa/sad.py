"""The SAD: every security association, found by (destination, protocol, SPI) or by what a policy asks for.

RFC 4301 section 4.4.2 describes the database, RFC 2367 the operations and their errors.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Reversible
from typing import Final

from ipsecq.errors import SadError
from ipsecq.numbers import Protocol, SaState
from ipsecq.sa.association import SaKey, SecurityAssociation

WELL_KNOWN_CPI: Final = {1: "oui", 2: "deflate", 3: "lzs", 4: "lzjh"}
"""CPIs below 64 name the algorithm itself (RFC 3173 section 3.3, IANA ISAKMP registry)."""

MAX_SHARERS: Final = 64
"""SAs over which the flows of one policy are spread at most: more than one gateway has processors."""

_OutboundKey = tuple[int, bytes, bytes, int]
_Bucket = dict[SaKey, SecurityAssociation]


class Sad:
    """All SAs of a gateway (or, in a worker, the ones that it serves).

    Every look-up is a dictionary access; add, update, delete take constant time too.  ``generation`` grows with every
    change, larval SAs included, so that cached bundles know when they are old.
    """

    __slots__ = ("_by_cpi", "_by_key", "_outbound", "generation")

    def __init__(self, associations: Iterable[SecurityAssociation] = ()) -> None:
        self.generation = 0
        self._by_key: dict[SaKey, SecurityAssociation] = {}
        # (protocol, src, dst, reqid) -> SAs in the order in which they became usable; each is entered under
        # reqid 0 as well, where policies without a reqid look.  One SA stands for itself: a dictionary of one is 250 octets.
        self._outbound: dict[_OutboundKey, _Bucket | SecurityAssociation] = {}
        self._by_cpi: dict[tuple[bytes, str], _Bucket] = {}
        for sa in associations:
            self.add(sa)

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[SecurityAssociation]:
        return iter(self._by_key.values())

    def __contains__(self, key: SaKey) -> bool:
        return key in self._by_key

    # -- what the packet path asks ---------------------------------------------------------------------

    def inbound(self, key: tuple[bytes, int, int]) -> SecurityAssociation | None:
        """Return the SA of an arriving packet by (dst, protocol, SPI), if it is MATURE or DYING.

        An IPComp packet with a well-known CPI (below 64, RFC 3173) that no SA has as its own finds the oldest
        IPComp SA to ``dst`` with that algorithm.
        """
        sa = self._by_key.get(key)  # type: ignore[call-overload]  # a plain tuple hashes and compares as SaKey
        if sa is not None:
            state = sa.state
            return sa if state is SaState.MATURE or state is SaState.DYING else None
        if key[1] == Protocol.IPCOMP and key[2] in WELL_KNOWN_CPI:
            return _first_usable(self._by_cpi.get((key[0], WELL_KNOWN_CPI[key[2]]), {}).values())
        return None

    def outbound(
        self, protocol: int, mode: int, src: bytes, dst: bytes, reqid: int = 0, *, oldest: bool = True
    ) -> SecurityAssociation | None:
        """Return the SA that protects a packet from ``src`` to ``dst`` for one transform of a policy, or None.

        ``src`` and ``dst`` are the ends of the transform (in transport mode, the packet's own addresses).  An SA or a
        policy of mode ``any`` goes with every mode; a policy's reqid 0 takes any SA, another one only SAs with
        that reqid.  Only MATURE and DYING SAs send.  ``oldest`` is ``net.key.preferred_oldsa``: the one that became
        usable first, or else the newest, a MATURE one before a DYING one.
        """
        bucket = self._outbound.get((protocol, src, dst, reqid))
        if bucket is None:
            return None
        dying = None
        for sa in _members(bucket) if oldest else reversed(_members(bucket)):
            if mode and sa.mode and sa.mode != mode:
                continue
            state = sa.state
            if state is SaState.MATURE or (oldest and state is SaState.DYING):
                return sa
            if state is SaState.DYING and dying is None:
                dying = sa
        return dying

    def sharers(
        self, protocol: int, mode: int, src: bytes, dst: bytes, reqid: int = 0
    ) -> list[SecurityAssociation]:
        """Return the SAs that may share the flows of one transform, in the order in which they became usable.

        Arguments as for :meth:`outbound`.  The MATURE ones; the DYING ones only when there is no other.
        :data:`MAX_SHARERS` at most: each costs time when a flow is new.
        """
        mature: list[SecurityAssociation] = []
        dying: list[SecurityAssociation] = []
        for sa in _members(self._outbound.get((protocol, src, dst, reqid), {})):
            if mode and sa.mode and sa.mode != mode:
                continue
            if sa.state is not SaState.MATURE:
                dying.append(sa)
            elif len(mature) < MAX_SHARERS:
                mature.append(sa)
            else:
                break
        return mature or dying[:MAX_SHARERS]

    # -- what key management asks ----------------------------------------------------------------------

    def get(self, dst: bytes, protocol: int, spi: int, src: bytes | None = None) -> SecurityAssociation:
        """Return the SA in whatever state; SadError ESRCH when there is none (or ``src`` is given and differs)."""
        sa = self._by_key.get(SaKey(dst, protocol, spi))
        if sa is None or (src is not None and sa.src != src):
            raise SadError(f"no SA with SPI {spi:#x} for this protocol and destination", errno.ESRCH)
        return sa

    def add(self, sa: SecurityAssociation) -> None:
        """Add ``sa``; SadError EEXIST when (destination, protocol, SPI) is taken, by a larval SA too."""
        key = sa.key
        if key in self._by_key:
            raise SadError(f"an SA with SPI {sa.spi:#x} exists for this protocol and destination", errno.EEXIST)
        self._by_key[key] = sa
        self._index(key, sa)
        self.generation += 1

    def update(self, sa: SecurityAssociation) -> SecurityAssociation:
        """Put ``sa`` in the place of the SA with the same key and return the old one; SadError ESRCH without one.

        A larval SA becomes usable by this (SADB_UPDATE after SADB_GETSPI) and counts as new; an SA in use keeps
        its place among the older and newer ones.
        """
        key = sa.key
        old = self.get(sa.dst, sa.protocol, sa.spi)
        self._by_key[key] = sa
        same_place = _usable(old) and _usable(sa) and _outbound_key(old) == _outbound_key(sa)
        if not same_place or old.compression != sa.compression:
            self._unindex(key, old)
        self._index(key, sa)
        self.generation += 1
        return old

    def set_state(self, sa: SecurityAssociation, state: SaState) -> None:
        """Change an SA's state (soft limit: DYING, hard limit: DEAD) and keep the indexes true."""
        was_usable = _usable(sa)
        sa.state = state
        if _usable(sa) and not was_usable:
            self._index(sa.key, sa)
        elif was_usable and not _usable(sa):
            self._unindex(sa.key, sa)
        self.generation += 1

    def withdraw(self, key: SaKey) -> None:
        """Send nothing through this SA any more, but go on receiving: its successor is there.  SadError ESRCH."""
        self._unindex(key, self.get(*key))
        self.generation += 1

    def delete(self, dst: bytes, protocol: int, spi: int, src: bytes | None = None) -> SecurityAssociation:
        """Remove one SA and return it; SadError ESRCH when there is none."""
        sa = self.get(dst, protocol, spi, src)
        self._remove(sa)
        return sa

    def delete_all(self, src: bytes, dst: bytes, protocol: int) -> list[SecurityAssociation]:
        """Remove every SA from ``src`` to ``dst`` of one protocol (``deleteall``); return them, oldest first.

        Larval SAs stay, as in KAME: their negotiation is under way.
        """
        gone = [
            sa
            for sa in self._by_key.values()
            if sa.protocol == protocol and sa.src == src and sa.dst == dst and sa.state is not SaState.LARVAL
        ]
        for sa in gone:
            self._remove(sa)
        return gone

    def flush(self, protocol: int | None = None) -> list[SecurityAssociation]:
        """Remove every SA (of one protocol, if given); return them."""
        gone = [sa for sa in self._by_key.values() if protocol is None or sa.protocol == protocol]
        for sa in gone:
            self._remove(sa)
        return gone

    def dump(self, protocol: int | None = None) -> list[SecurityAssociation]:
        """Return the SAs in the order in which they were added: a snapshot that later changes don't disturb."""
        return [sa for sa in self._by_key.values() if protocol is None or sa.protocol == protocol]

    def in_order(self) -> list[SecurityAssociation]:
        """Return every SA, those that may send in the order in which they became usable: a copy is built in it."""
        usable = [sa for key, bucket in self._outbound.items() if not key[3] for sa in _members(bucket)]
        return usable + [sa for sa in self._by_key.values() if not _usable(sa)]

    def expired_larval(self, now: float, lifetime: float) -> list[SecurityAssociation]:
        """Remove and return the larval SAs older than ``lifetime`` seconds (``net.key.larval_lifetime``)."""
        gone = [
            sa for sa in self._by_key.values() if sa.state is SaState.LARVAL and now - sa.created >= lifetime
        ]
        for sa in gone:
            self._remove(sa)
        return gone

    def copy(self) -> Sad:
        """Return a SAD with the same SAs, for changes that are to be made as a whole or not at all."""
        other = Sad()
        other._by_key = dict(self._by_key)
        other._outbound = {
            key: dict(bucket) if isinstance(bucket, dict) else bucket for key, bucket in self._outbound.items()
        }
        other._by_cpi = {key: dict(bucket) for key, bucket in self._by_cpi.items()}
        other.generation = self.generation
        return other

    # -- indexes ---------------------------------------------------------------------------------------

    def _index(self, key: SaKey, sa: SecurityAssociation) -> None:
        """Enter a usable SA behind the others, or where it is already."""
        if not _usable(sa):
            return
        for outbound_key in _outbound_keys(sa):
            bucket = self._outbound.get(outbound_key)
            if isinstance(bucket, dict):
                bucket[key] = sa
            elif bucket is None or bucket.key == key:
                self._outbound[outbound_key] = sa
            else:
                self._outbound[outbound_key] = {bucket.key: bucket, key: sa}
        if sa.protocol == Protocol.IPCOMP and sa.compression:
            self._by_cpi.setdefault((sa.dst, sa.compression), {})[key] = sa

    def _unindex(self, key: SaKey, sa: SecurityAssociation) -> None:
        for outbound_key in _outbound_keys(sa):
            bucket = self._outbound.get(outbound_key)
            if isinstance(bucket, dict):
                bucket.pop(key, None)
                if not bucket:
                    del self._outbound[outbound_key]
            elif bucket is not None and bucket.key == key:
                del self._outbound[outbound_key]
        if sa.protocol == Protocol.IPCOMP and sa.compression:
            by_cpi = self._by_cpi.get((sa.dst, sa.compression))
            if by_cpi is not None:
                by_cpi.pop(key, None)
                if not by_cpi:
                    del self._by_cpi[sa.dst, sa.compression]

    def _remove(self, sa: SecurityAssociation) -> None:
        key = sa.key
        del self._by_key[key]
        self._unindex(key, sa)
        self.generation += 1


def _usable(sa: SecurityAssociation) -> bool:
    return sa.state is SaState.MATURE or sa.state is SaState.DYING


def _first_usable(associations: Iterable[SecurityAssociation]) -> SecurityAssociation | None:
    for sa in associations:
        if _usable(sa):
            return sa
    return None


def _members(bucket: _Bucket | SecurityAssociation) -> Reversible[SecurityAssociation]:
    """The SAs of a bucket, oldest first."""
    return bucket.values() if isinstance(bucket, dict) else (bucket,)


def _outbound_key(sa: SecurityAssociation) -> _OutboundKey:
    return (int(sa.protocol), sa.src, sa.dst, sa.reqid)


def _outbound_keys(sa: SecurityAssociation) -> tuple[_OutboundKey, ...]:
    """Where policies with the SA's reqid look, and those without any."""
    protocol, src, dst, reqid = own = _outbound_key(sa)
    return ((protocol, src, dst, 0), own) if reqid else (own,)
