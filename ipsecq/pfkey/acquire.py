"""SADB_ACQUIREs that are under way: one for each kind of SA, so that a flood of packets makes one message."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipsecq.pfkey.constants import LARVAL_LIFETIME
from ipsecq.sa.association import SecurityAssociation


@dataclass(slots=True, frozen=True)
class Acquire:
    """One question to key management: an SA of this kind, please."""

    seq: int
    protocol: int
    src: bytes
    dst: bytes
    reqid: int
    expires: float

    @property
    def kind(self) -> tuple[int, bytes, bytes, int]:
        """What makes two questions the same."""
        return (self.protocol, self.src, self.dst, self.reqid)


@dataclass(slots=True)
class Acquires:
    """The questions without an answer yet.  ``lifetime``: seconds after which the same one may be asked again."""

    lifetime: float = LARVAL_LIFETIME
    _last_seq: int = 0
    _by_kind: dict[tuple[int, bytes, bytes, int], Acquire] = field(default_factory=dict)
    _by_seq: dict[int, Acquire] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._by_kind)

    def ask(self, protocol: int, src: bytes, dst: bytes, reqid: int, now: float) -> Acquire | None:
        """A new question, or None while the same one is under way."""
        old = self._by_kind.get((protocol, src, dst, reqid))
        if old is not None:
            if now < old.expires:
                return None
            self._forget(old)
        self._last_seq = self._last_seq % 0xFFFFFFFF + 1
        acquire = Acquire(self._last_seq, protocol, src, dst, reqid, now + self.lifetime)
        self._by_kind[acquire.kind] = self._by_seq[acquire.seq] = acquire
        return acquire

    def failed(self, seq: int) -> Acquire | None:
        """Key management gave up on ``seq``: the question that it answers, which stays until its time is over.

        So the next packets don't ask again at once.
        """
        return self._by_seq.get(seq)

    def answered(self, sa: SecurityAssociation) -> None:
        """An SA is there: the questions that it answers are over."""
        for reqid in {sa.reqid, 0}:
            acquire = self._by_kind.get((int(sa.protocol), sa.src, sa.dst, reqid))
            if acquire is not None:
                self._forget(acquire)

    def ask_again(self, protocol: int) -> None:
        """A key manager has come: what was asked before it came may be asked again at once."""
        for acquire in [each for each in self._by_kind.values() if each.protocol == protocol]:
            self._forget(acquire)

    def expire(self, now: float) -> None:
        """Forget the questions whose time is over."""
        # Insertion order is the order of expiry, as all live equally long.
        for acquire in list(self._by_kind.values()):
            if now < acquire.expires:
                break
            self._forget(acquire)

    def _forget(self, acquire: Acquire) -> None:
        del self._by_kind[acquire.kind], self._by_seq[acquire.seq]
