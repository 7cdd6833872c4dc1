"""Totals by pair of addresses that never go back: what SAs counted stays when they are replaced or deleted.

A pair is (source, destination) of SAs: a peer and a direction.  An SA joins with its slot, whose words its worker counts
in; when the slot is about to be used for something else, its counts are added to the pair's past.  The event loop
writes, the threads of the metrics server read, so both hold the lock, for a few milliseconds at ten thousand SAs.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

import numpy as np

from ipsecq.sa.association import Slot

COUNTED: Final = (Slot.PACKETS, Slot.BYTES, Slot.BADAUTH, Slot.REPLAY, Slot.DROPS)
"""The words that are summed, in the order of :attr:`PairTotal.counts`."""
_COLUMNS: Final = np.array([*COUNTED, Slot.LAST_USE], dtype=np.int64)
OTHERS: Final = (b"", b"")
"""The pair that stands for all that have no record of their own."""

Counts = tuple[int, int, int, int, int]
_NOTHING: Final[Counts] = (0, 0, 0, 0, 0)


@dataclass(slots=True, frozen=True)
class PairTotal:
    """What all SAs from ``src`` to ``dst`` have counted, those that are gone included, and when one was last used."""

    src: bytes
    dst: bytes
    counts: Counts
    sas: int
    last_use: int


@dataclass(slots=True)
class _Record:
    past: Counts = _NOTHING
    slots: int = 0
    last_use: int = 0


@dataclass(slots=True)
class _Member:
    pair: tuple[bytes, bytes]
    before: Counts = _NOTHING
    """What the slot had counted when it joined this pair."""


class PairLedger:
    """``words`` is the shared table, ``limit`` how many pairs have totals of their own; the rest is :data:`OTHERS`."""

    def __init__(self, words: memoryview, limit: int) -> None:
        self.lock = threading.RLock()
        """To be held over a change that takes several calls and must look like one."""
        self._words, self._limit = words, limit
        self._records: dict[tuple[bytes, bytes], _Record] = {OTHERS: _Record()}
        self._members: dict[int, _Member] = {}

    def join(self, slot: int, src: bytes, dst: bytes) -> None:
        """An SA from ``src`` to ``dst`` counts in ``slot`` from now on, or goes on under other addresses."""
        with self.lock:
            pair = self._pair(src, dst)
            member = self._members.get(slot)
            if member is None:
                self._members[slot] = _Member(pair)
            elif member.pair == pair:
                return
            else:
                self._close(slot, member)
                self._members[slot] = _Member(pair, self._counts(slot))
            self._records[pair].slots += 1

    def leave(self, slot: int, *, moves: bool = False) -> None:
        """The slot is about to be zeroed (``moves``: its counts go on in another one, which joins next)."""
        with self.lock:
            member = self._members.pop(slot, None)
            if member is None:
                return
            if moves:
                self._records[member.pair].slots -= 1
            else:
                self._close(slot, member)

    def totals(self) -> list[PairTotal]:
        """All pairs, in the order in which they came; :data:`OTHERS` only when it has something."""
        with self.lock:
            pairs = list(self._records)
            place = {pair: at for at, pair in enumerate(pairs)}
            sums = np.zeros((len(pairs), len(COUNTED)), dtype=np.uint64)
            latest = np.array([self._records[pair].last_use for pair in pairs], dtype=np.uint64)
            if self._members:
                self._add_members(place, sums, latest)
            found = []
            for pair, row, last_use in zip(pairs, sums.tolist(), latest.tolist(), strict=True):
                record = self._records[pair]
                counts = tuple(map(sum, zip(record.past, row, strict=True)))
                if pair != OTHERS or record.slots or any(counts):
                    found.append(PairTotal(*pair, counts, record.slots, last_use))  # type: ignore[arg-type]
            return found

    def _add_members(self, place: dict[tuple[bytes, bytes], int], sums: np.ndarray, latest: np.ndarray) -> None:
        members = self._members
        slots = np.fromiter(members, dtype=np.int64, count=len(members))
        rows = np.fromiter((place[member.pair] for member in members.values()), dtype=np.int64, count=len(members))
        # A view of the table only while it is needed: the table cannot be unmapped under one.
        gathered = np.frombuffer(self._words, dtype=np.uint64)[slots[:, None] + _COLUMNS]
        np.add.at(sums, rows, gathered[:, : len(COUNTED)])
        np.maximum.at(latest, rows, gathered[:, len(COUNTED)])
        for member in members.values():
            if member.before is not _NOTHING:
                sums[place[member.pair]] -= np.array(member.before, dtype=np.uint64)

    def _pair(self, src: bytes, dst: bytes) -> tuple[bytes, bytes]:
        """The pair that ``src`` and ``dst`` count under; room is made by those that have no SA any more."""
        pair = (src, dst)
        if pair in self._records:
            return pair
        if len(self._records) > self._limit:
            idle = next((each for each, record in self._records.items() if not record.slots and each != OTHERS), None)
            if idle is None:
                return OTHERS
            self._add(self._records[OTHERS], self._records.pop(idle).past)
        self._records[pair] = _Record()
        return pair

    def _close(self, slot: int, member: _Member) -> None:
        record = self._records[member.pair]
        record.slots -= 1
        record.last_use = max(record.last_use, self._words[slot + Slot.LAST_USE])
        counts = self._counts(slot)
        self._add(record, tuple(now - then for now, then in zip(counts, member.before, strict=True)))  # type: ignore[arg-type]

    @staticmethod
    def _add(record: _Record, counts: Counts) -> None:
        record.past = tuple(map(sum, zip(record.past, counts, strict=True)))  # type: ignore[assignment]

    def _counts(self, slot: int) -> Counts:
        words = self._words
        return tuple(words[slot + word] for word in COUNTED)  # type: ignore[return-value]
