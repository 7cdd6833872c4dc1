"""Sequence leases: no number of an outbound SA is handed out twice, whatever dies in between.

Three marks, each ahead of the one before it: numbers that a worker holds, ``Slot.LEASED`` in the shared table (next
number that nobody holds), ``Slot.RESERVED`` (numbers below it are on the disk as used up).  :meth:`LeaseBook.lease`
moves LEASED by a block under a file lock, and moves the disk first when LEASED would pass RESERVED.

    a worker dies     its block is wasted
    the daemon dies   nothing: the table stays in the run directory, leasing goes on at LEASED
    the machine dies  the reservation is wasted: the next start goes on at what the disk says

The lock is a POSIX record lock of one octet an SA: the kernel drops it when its holder dies, and every store below it
is ordered so that a holder may die between any two of them.

When the disk cannot be trusted (:mod:`ipsecq.daemon.statefile`: a copy, damage, another machine, or behind the shared
table) an SA whose IV is its sequence number refuses to send until the operator says that it has new keys:
``ipsecq state reset SPI``.  Other SAs have random IVs and go on.  A key that is loaded later may have been used before the
loss just as well, so hand-made keys go on being refused until the operator answers for all of them: ``state reset --all``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from ipsecq.daemon.statefile import (
    FLAG_PASSING,
    FLAG_REFUSED,
    FLAG_REFUSING,
    KEEP_DAYS,
    NAME,
    Record,
    StateFile,
    create,
    load,
)
from ipsecq.daemon.table import SharedTable
from ipsecq.errors import StateError
from ipsecq.sa.association import Slot

BLOCK: Final = 4096
"""Numbers that a worker takes at once: one lock in four thousand packets."""
RESERVATION: Final = 1 << 20
"""Numbers that the disk writes off at once: one fdatasync in a million packets, 4,000 crashes without ESN."""
_LOCKS: Final = 1 << 40
"""First octet of the lock range, far behind the file's end; the SA's slot is added."""


class LeaseBook:
    """Leases over one shared table and one state file.  ``problem`` is empty, or says why the file is not trusted."""

    def __init__(self, state: StateFile, table: SharedTable, *, clock: Callable[[], float] = time.time) -> None:
        self.state = state
        self.problem = ""
        self._table = table
        self._words = table.words
        self._clock = clock
        self._records: dict[bytes, int] = {}
        self._next_record = 0
        self._spare: list[int] = []
        """Records that no SA needs any more."""
        self._due: list[tuple[int, bytes, int]] | None = None
        """(slot, fingerprint, reserved) that the table is told when the batch is on the disk; None outside of one."""

    @classmethod
    def open(
        cls, directory: Path, table: SharedTable, machine: bytes, *, clock: Callable[[], float] = time.time
    ) -> LeaseBook:
        """The supervisor's book: read, judge and rewrite the state file.  Raises StateError when it can't be written.

        A file that is not trusted is kept beside the new one under ``sequences.refused``.
        """
        path = directory / NAME
        loaded = load(path, machine)
        if not loaded.problem and loaded.generation < table.generation:
            what = "is older than this boot's daemon left it" if loaded.existed else "is gone since this boot's start"
            loaded.problem = f"{path} {what}"
        if loaded.problem and loaded.existed:
            try:
                path.rename(path.with_name(NAME + ".refused"))
            except OSError as error:
                raise StateError(f"{path}: {error.strerror}: the state directory must be writable") from error
        oldest = int(clock() / 86400) - KEEP_DAYS
        kept: dict[bytes, Record] = {}
        for record in loaded.records:
            before = kept.get(record.fingerprint)
            if record.flags & FLAG_PASSING and record.day < oldest:
                continue
            if before is None or before.reserved < record.reserved:
                kept[record.fingerprint] = record
        refusing = bool(loaded.problem) or loaded.refusing
        generation = max(loaded.generation, table.generation) + 1
        if table.fresh and not table.problem and loaded.boot == table.boot_id:
            table.forgot(f"{path} is of this boot, and the shared table in the run directory was gone")
        records = [] if loaded.problem else list(kept.values())
        state = create(path, machine, generation, records, refusing=refusing, boot=table.boot_id)
        table.generation = generation
        book = cls(state, table, clock=clock)
        if not loaded.problem:
            book._records = {digest: index for index, digest in enumerate(kept)}
        book._next_record = len(book._records)
        table.on_forgotten = book._forgotten
        if refusing:
            book.problem = loaded.problem or f"{path} was refused at an earlier start"
        return book

    @classmethod
    def attach(cls, descriptor: int, table: SharedTable) -> LeaseBook:
        """A worker's book: it leases what the supervisor has enrolled."""
        return cls(StateFile(descriptor), table)

    # -- supervisor ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Enroll, top up, settle or reset many SAs with one wait for the disk.  StateError at the end when it fails.

        No worker may hear of these SAs before the end.  Their reservations are in the table only then: disk first.
        """
        if self._due is not None:
            yield
            return
        due: list[tuple[int, bytes, int]] = []
        self._due = due
        try:
            with self.state.batch():
                yield
        except BaseException:
            due.clear()  # perhaps not on the disk: what the table has is less, and right
            raise
        finally:
            self._due = None
            for slot, digest, reserved in due:
                if self._table.fingerprint_of(slot) == digest:
                    with self._locked(slot):  # a worker may have reserved more
                        self._words[slot + Slot.RESERVED] = max(reserved, self._words[slot + Slot.RESERVED])

    def enroll(self, slot: int, *, counter_iv: bool, passing: bool = False) -> str:
        """Make a slot ready for leases before workers hear of its SA; returns why it must not send, or "".

        ``counter_iv``: the SA's IV is its sequence number, so a repeated number breaks the cipher.  ``passing``: its
        key was just negotiated and cannot have been used before.  Raises StateError when the disk is full.
        """
        words, table = self._words, self._table
        digest = table.fingerprint_of(slot)
        index = self._records.get(digest)
        record = self.state.read(index) if index is not None else None
        if record is not None and record.fingerprint != digest:
            record = None  # of the SA that had this place before
        on_disk = record.reserved if record is not None else 1
        reserved = words[slot + Slot.RESERVED]
        problem = ""
        if record is not None and record.flags & FLAG_REFUSED:
            problem = "refused at an earlier start"
        elif reserved > on_disk:
            problem = "the state file is behind what was sent since boot"
        elif record is None and self.problem and not passing:
            problem = self.problem
        refused = bool(problem) and counter_iv
        table.set_refused(slot, refused)
        if index is None:
            index = self._free_record()
            self._records[digest] = index
        table.set_record(slot, index)
        if words[slot + Slot.LEASED] == 0:
            # RESERVED first: a reader between the two stores sees LEASED 0, which leases nothing.
            words[slot + Slot.RESERVED] = on_disk
            words[slot + Slot.LEASED] = on_disk
        if problem or (passing and record is None):
            # A refusal must outlive this boot, and a repaired record its cause.
            flags = FLAG_REFUSED * refused | FLAG_PASSING * passing
            self._write(slot, max(reserved, on_disk), flags)
        return problem if refused else ""

    def refusal(self, slot: int, spi: int) -> str:
        """The words for an operator about a slot that refuses to send; empty when it may."""
        if not self._table.refused(slot):
            return ""
        problem = self.problem or "the state file was behind what was sent"
        return f"SA 0x{spi:08x} must not send: {problem}; give it new keys, then run: ipsecq state reset 0x{spi:08x}"

    def reset(self, *slots: int) -> None:
        """The operator's word that these SAs have keys that were never used: on disk, then they may send."""
        with self.batch():
            for slot in slots:
                with self._locked(slot):
                    self._write(slot, max(self._words[slot + Slot.RESERVED], self._words[slot + Slot.LEASED], 1), 0)
        for slot in slots:
            self._table.set_refused(slot, False)

    def trust(self) -> None:
        """The operator's word that no key from before the loss is in use or will be: SAs that come need no more resets.

        One that was refused under this directory, and is not there now, stays refused: its record says so.
        """
        header = self.state.header()
        if header is None:
            raise StateError("the state file was damaged while ipsecq was running: restart the daemon")
        if header.flags & FLAG_REFUSING:
            self.state.write_header(replace(header, flags=header.flags & ~FLAG_REFUSING, serial=header.serial + 1))
        self.problem = ""

    def top_up(self, slot: int) -> None:
        """Reserve ahead when half of the reservation is used, so that no worker waits for the disk."""
        words = self._words
        leased = words[slot + Slot.LEASED]
        if leased > 1 and words[slot + Slot.RESERVED] - leased < RESERVATION // 2 and not self._table.refused(slot):
            with self._locked(slot):
                self._reserve(slot, words[slot + Slot.LEASED] + RESERVATION)

    def settle(self, slot: int) -> None:
        """At a clean stop, when no worker lives: the disk gets the exact next number and nothing is wasted."""
        words = self._words
        if words[slot + Slot.LEASED] <= 1 or self._table.record(slot) < 0:
            return
        with self._locked(slot):
            # The table first: RESERVED above the disk would mean a rolled back file to the next start.
            words[slot + Slot.RESERVED] = words[slot + Slot.LEASED]
            self._write(slot, words[slot + Slot.LEASED])

    # -- workers ------------------------------------------------------------------------------------------------------

    def lease(self, slot: int, limit: int) -> tuple[int, int]:
        """The next block of numbers as (first, end), end exclusive; (0, 0) when ``limit``, the last usable, is passed.

        Raises StateError when the SA must not send or the disk cannot take a reservation.
        """
        words = self._words
        if self._table.refused(slot):
            raise StateError("sequence numbers refused: what was sent under this key is not known (ipsecq state reset)")
        limit = min(limit, (1 << 64) - 2)
        with self._locked(slot):
            first = words[slot + Slot.LEASED]
            if first == 0 or first > limit:
                return 0, 0
            end = min(first + BLOCK, limit + 1)
            if end > words[slot + Slot.RESERVED]:
                self._reserve(slot, min(end + RESERVATION, limit + 1))
            words[slot + Slot.LEASED] = end
        return first, end

    # -- records ------------------------------------------------------------------------------------------------------

    def _free_record(self) -> int:
        """A record for a new SA.  StateError when the disk is full."""
        if self._spare:
            return self._spare.pop()
        self.state.make_room(self._next_record + 1)
        self._next_record += 1
        return self._next_record - 1

    def _forgotten(self, digest: bytes) -> None:
        """Thousands of SAs ago this one was deleted: if its key cannot come back, or never sent, its record is free.

        Without that a gateway whose SAs are negotiated anew every hour would fill disk and memory in the end.
        """
        index = self._records.get(digest)
        record = self.state.read(index) if index is not None else None
        mine = record is not None and record.fingerprint == digest
        if index is not None and (record is None or not mine or record.flags == FLAG_PASSING):
            del self._records[digest]
            self._spare.append(index)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _reserve(self, slot: int, reserved: int) -> None:
        """Disk, then table, never back: a holder that died between the two left the disk ahead.  The lock is held."""
        record = self._record(slot)
        if record.reserved < self._words[slot + Slot.RESERVED] and record.serial:
            raise StateError("the state file was changed while ipsecq was running: restart the daemon")
        self._write(slot, max(reserved, record.reserved))

    def _write(self, slot: int, reserved: int, flags: int | None = None) -> None:
        record = self._record(slot)
        flags = record.flags if flags is None else flags
        day = int(self._clock() / 86400)
        self.state.write(
            self._table.record(slot),
            replace(record, reserved=reserved, serial=record.serial + 1, flags=flags, day=day),
        )
        if self._due is None:
            self._words[slot + Slot.RESERVED] = reserved
        else:
            self._due.append((slot, record.fingerprint, reserved))

    def _record(self, slot: int) -> Record:
        """What the disk says about the slot's SA; serial 0: nothing yet."""
        digest = self._table.fingerprint_of(slot)
        record = self.state.read(self._table.record(slot))
        if record is not None and record.fingerprint == digest:
            return record
        # Perhaps a record that was another SA's: the serial goes on, or the old copy would be the newer one.
        return Record(digest, 1, record.serial if record is not None else 0)

    def _locked(self, slot: int) -> _RecordLock:
        return _RecordLock(self.state.descriptor, _LOCKS + slot)


class _RecordLock:
    """An exclusive POSIX lock on one octet; it belongs to the process and goes with it."""

    __slots__ = ("_descriptor", "_start")

    def __init__(self, descriptor: int, start: int) -> None:
        self._descriptor = descriptor
        self._start = start

    def __enter__(self) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX, 1, self._start, os.SEEK_SET)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._start, os.SEEK_SET)
