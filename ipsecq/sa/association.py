"""One security association, as PF_KEY describes it (RFC 2367 section 3.1), and its words in shared memory.

:class:`SecurityAssociation` is the description: what ``add`` or SADB_ADD said.  What changes with every packet
(sequence numbers, the replay window, byte counts) lives outside the object, in a :class:`Slot`: a run of 64-bit words
that workers, supervisor and the state file share.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.secret import NO_KEY, Key


@dataclass(slots=True, frozen=True)
class Lifetime:
    """Limits of an SA (SADB_EXT_LIFETIME_*); 0 means no limit.

    ``addtime`` and ``usetime`` are seconds from creation and from first use, ``bytes`` counts the octets that
    the transform protects.
    """

    allocations: int = 0
    bytes: int = 0
    addtime: int = 0
    usetime: int = 0


@dataclass(slots=True, frozen=True)
class NatTraversal:
    """UDP encapsulation (RFC 3948) of an ESP SA: ports in host order, original addresses where IKE gave them."""

    sport: int = 4500
    dport: int = 4500
    original_src: bytes | None = None
    original_dst: bytes | None = None
    rebind: bool = False
    """Follow a peer whose port or address changes, after authentication (never set: never followed)."""


@dataclass(slots=True)
class SecurityAssociation:
    """What ``add`` of setkey(8) or SADB_ADD says about one SA.  Addresses are packed: 4 or 16 octets.

    Algorithm names are those of setkey(8) in lower case (``aes-gcm-16``, ``hmac-sha2-256``, ``deflate``); the
    registry in :mod:`ipsecq.crypto` knows them.  ``encryption_key`` of a counter-mode or AEAD algorithm ends with its
    salt, as in PF_KEY and setkey(8).
    """

    protocol: Protocol
    spi: int
    """SPI of ESP and AH; the CPI of IPComp."""
    src: bytes
    dst: bytes
    mode: Mode = Mode.ANY
    reqid: int = 0
    encryption: str | None = None
    encryption_key: Key = NO_KEY
    authentication: str | None = None
    authentication_key: Key = NO_KEY
    compression: str | None = None
    replay_window: int = 0
    """Size in packets (bits); 0 turns the check off."""
    esn: bool = False
    natt: NatTraversal | None = None
    soft: Lifetime = Lifetime()
    hard: Lifetime = Lifetime()
    tfc_pad: int = 0
    """Pad ESP tunnel payloads to this many octets (RFC 4303 section 2.7); 0 is off."""
    ah_align: int = 0
    """Fill AH over IPv4 up to a multiple of this many octets; 0 is RFC 4302's 4, Linux peers without ``align4`` need 8."""
    seq: int = 0
    """``sadb_msg_seq`` of the creator; setkey's ``-u`` uses reqid."""
    pid: int = 0
    created: float = 0.0
    """Unix time, seconds; the caller's clock."""
    state: SaState = SaState.MATURE
    flags: int = 0
    """Linux SADB_SAFLAGS_*."""
    label: str = ""
    """Where the SA came from: ``file:line`` or ``pfkey:pid``; for people."""
    slot: int = -1
    """Index of the first word of its :class:`Slot` in the shared table; the supervisor assigns it."""

    @property
    def family(self) -> int:
        """4 or 6: the family of the outer addresses."""
        return 4 if len(self.dst) == 4 else 6

    @property
    def key(self) -> SaKey:
        """The inbound look-up key: (destination, protocol, SPI)."""
        return SaKey(self.dst, int(self.protocol), self.spi)


class SaKey(NamedTuple):
    """RFC 4301 section 4.1: what identifies an SA for an arriving packet."""

    dst: bytes
    protocol: int
    spi: int


class Slot(IntEnum):
    """Word offsets of an SA's slot in the shared table (unsigned 64-bit, native order).

    The worker that serves the SA is the only writer of all but ``LEASED`` and ``RESERVED``, which the
    sequence lease (``daemon/leases.py``) changes under a file lock.
    """

    FINGERPRINT = 0
    """First eight octets of a digest over (protocol, SPI, destination, keys): whose numbers these are."""
    LEASED = 1
    """Next sequence number that no worker has leased yet."""
    RESERVED = 2
    """Numbers below this are on disk as used up; leases never pass it."""
    SEQUENCE = 3
    """Last sequence number sent; inbound: highest one authenticated (the window's right edge, ESN's 64 bits)."""
    PACKETS = 4
    BYTES = 5
    FIRST_USE = 6
    """Unix time in seconds of the first packet; 0 before it."""
    LAST_USE = 7
    BADAUTH = 8
    REPLAY = 9
    DROPS = 10
    """All other drops that can be laid at this SA's door."""
    STATE = 11
    """:class:`ipsecq.numbers.SaState` as the workers last judged it (soft limit: DYING, hard: DEAD)."""
    WINDOW = 16
    """First word of the replay bitmap (RFC 6479)."""


SLOT_HEADER_WORDS: Final = 16


def slot_words(replay_window: int) -> int:
    """Words that an SA with this replay window (in bits) needs: header and an RFC 6479 ring one word larger."""
    if replay_window <= 0:
        return SLOT_HEADER_WORDS
    words = 1
    while words < (replay_window + 63) // 64 + 1:
        words *= 2
    return SLOT_HEADER_WORDS + words
