"""The shared table: SA slots in memory that supervisor and workers map together, and that outlive the daemon.

One sparse file in the run directory (a tmpfs, so it lives as long as the boot) is mapped by all processes and seen as
unsigned 64-bit words.  The supervisor alone allocates; workers write the words of the slots that they serve
(:class:`ipsecq.sa.association.Slot`).  Every block names its SA by fingerprint, so a daemon that starts again finds
replay windows, byte counts and sequence numbers of the SAs that it is given again.

Blocks of deleted SAs are kept until their space is needed: ``setkey -F; setkey -f FILE`` must not open the replay
window of the same keys.

    page 0            header words (below)
    word 512 …        blocks: 8 words (size, state, fingerprint, state-file record, flags), then the slot
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ipsecq.counters import COUNTERS_WORDS
from ipsecq.errors import DaemonError
from ipsecq.sa.association import SLOT_HEADER_WORDS, SecurityAssociation, Slot, slot_words

MAGIC: Final = int.from_bytes(b"ipsecqT1", sys.byteorder)
CAPACITY_WORDS: Final = 1 << 27
"""1 GiB of address space; memory is taken only for pages in use (192 octets an SA without a window)."""
FIRST_BLOCK: Final = 512
BLOCK_HEADER: Final = 8
RETIRED_LIMIT: Final = 4096
"""Blocks of deleted SAs that are kept for their return before the oldest is used again."""

_H_MAGIC, _H_CAPACITY, _H_USED, _H_BOOT, _H_GENERATION = 0, 1, 2, 3, 5
_B_SIZE, _B_STATE, _B_FINGERPRINT, _B_RECORD, _B_FLAGS = -8, -7, -6, -2, -1
_USED, _RETIRED = 1, 2

FLAG_REFUSED: Final = 1
"""The SA must not take sequence numbers: what was sent under its key is not known."""


def fingerprint(sa: SecurityAssociation) -> bytes:
    """32 octets that name an SA's numbers: SHA-256 over protocol, SPI, destination, algorithms and keys.

    Each part is preceded by its length, so two different SAs cannot be spelled alike.
    """
    digest = hashlib.sha256(b"ipsecq SA 1")
    for part in (
        bytes([sa.protocol]),
        sa.spi.to_bytes(4, "big"),
        sa.dst,
        (sa.encryption or "").encode(),
        sa.encryption_key.octets,
        (sa.authentication or "").encode(),
        sa.authentication_key.octets,
        (sa.compression or "").encode(),
    ):
        digest.update(len(part).to_bytes(4, "big"))
        digest.update(part)
    return digest.digest()


class SharedTable:
    """The mapped file.  ``words`` is a memoryview of unsigned 64-bit words; a slot is the index of its first word."""

    def __init__(self, descriptor: int, *, allocator: bool) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self.words: memoryview = memoryview(self._map).cast("Q")
        self._by_fingerprint: dict[bytes, int] = {}
        self._retired: OrderedDict[int, None] = OrderedDict()
        self._free: dict[int, list[int]] = {}
        self.on_forgotten: Callable[[bytes], object] = lambda digest: None
        """Called with the fingerprint of a deleted SA that is known here no longer."""
        self.fresh = False
        """Nothing in it is from an earlier daemon of this boot."""
        self.problem = ""
        """Why replay windows that this boot's daemon had are forgotten; empty: they are not, or there were none."""
        if allocator:
            self._recover()

    @classmethod
    def open(cls, path: Path, boot_id: bytes, *, capacity: int = CAPACITY_WORDS) -> SharedTable:
        """Map the file at ``path``, keeping what the same boot left there; create or replace it otherwise.

        ``boot_id`` is 16 octets.  Raises :class:`DaemonError` when the file cannot be made.  What was lost with a file
        that is damaged is said in :attr:`problem`.
        """
        damage = ""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            descriptor = -1
        except OSError as error:
            raise DaemonError(f"shared table {path}: {error.strerror}; remove it or run as its owner") from error
        if descriptor >= 0:
            damage, matches = _judge(descriptor, boot_id, capacity)
            if matches:
                return cls(descriptor, allocator=True)
            os.close(descriptor)
        table = cls(_create(path, boot_id, capacity), allocator=True)
        table.fresh = True
        if damage:
            table.forgot(f"{path} {damage}")
        return table

    @classmethod
    def attach(cls, descriptor: int) -> SharedTable:
        """Map an inherited descriptor in a worker, which never allocates."""
        return cls(descriptor, allocator=False)

    # -- allocation (supervisor) -------------------------------------------------------------------------------------

    def allocate(self, digest: bytes, replay_window: int) -> int:
        """The slot of the SA with this fingerprint: the one it had, or a zeroed one.  Raises DaemonError when full.

        When the window's size changed, counters and the highest sequence number go with the SA and every number up
        to it counts as received: a smaller memory must not forget a packet.  No worker may know the old slot then.
        """
        need = slot_words(replay_window)
        slot = self._by_fingerprint.get(digest)
        if slot is not None and self._room(slot) == _rounded(need):
            self._retired.pop(slot, None)
            self.words[slot + _B_STATE] = _USED
            return slot
        if slot is not None:
            # Its block must not be taken to make room for itself.
            self._retired.pop(slot, None)
        fresh = self._take(_rounded(need) + BLOCK_HEADER)
        words = self.words
        words[fresh : fresh + _rounded(need)] = memoryview(bytes(8 * _rounded(need))).cast("Q")
        words[fresh + _B_RECORD] = words[fresh + _B_FLAGS] = 0
        if slot is not None:
            words[fresh : fresh + SLOT_HEADER_WORDS] = words[slot : slot + SLOT_HEADER_WORDS]
            words[fresh + _B_RECORD] = words[slot + _B_RECORD]
            words[fresh + _B_FLAGS] = words[slot + _B_FLAGS]
            if words[slot + Slot.SEQUENCE]:
                for index in range(fresh + Slot.WINDOW, fresh + need):
                    words[index] = 0xFFFFFFFFFFFFFFFF
            self._forget(slot)
        words[fresh + _B_FINGERPRINT : fresh + _B_FINGERPRINT + 4] = memoryview(digest).cast("Q")
        words[fresh + Slot.FINGERPRINT] = int.from_bytes(digest[:8], "big")
        words[fresh + _B_STATE] = _USED
        self._by_fingerprint[digest] = fresh
        return fresh

    def fits(self, digest: bytes, replay_window: int) -> bool:
        """False when the SA has a slot of another size that workers may use: :meth:`allocate` must not move it yet."""
        slot = self._by_fingerprint.get(digest)
        return slot is None or slot in self._retired or self._room(slot) == _rounded(slot_words(replay_window))

    def retire(self, slot: int, *, counts: bool = False) -> None:
        """Give a deleted SA's slot back.  Call it only when every worker has acknowledged the deletion.

        Should the SA come back, it starts with its lifetime's counts at zero (unless ``counts``), but with its window
        and its numbers.
        """
        words = self.words
        for word in () if counts else range(slot + Slot.PACKETS, slot + Slot.STATE + 1):
            words[word] = 0
        words[slot + _B_STATE] = _RETIRED
        self._retired[slot] = None
        while len(self._retired) > RETIRED_LIMIT:
            self._part_with(next(iter(self._retired)))

    def fingerprint_of(self, slot: int) -> bytes:
        """The 32 octets that :meth:`allocate` was given for this slot."""
        return self.words[slot + _B_FINGERPRINT : slot + _B_FINGERPRINT + 4].tobytes()

    # -- words of the block header ----------------------------------------------------------------------------------

    def record(self, slot: int) -> int:
        """Index of the SA's record in the state file, or -1."""
        return self.words[slot + _B_RECORD] - 1

    def set_record(self, slot: int, record: int) -> None:
        """Remember where the SA's reservation is kept."""
        self.words[slot + _B_RECORD] = record + 1

    def refused(self, slot: int) -> bool:
        """True when the SA must not send (see :data:`FLAG_REFUSED`)."""
        return bool(self.words[slot + _B_FLAGS] & FLAG_REFUSED)

    def set_refused(self, slot: int, refused: bool) -> None:
        """Set or lift the refusal; workers see it with their next lease."""
        self.words[slot + _B_FLAGS] = FLAG_REFUSED if refused else 0

    @property
    def generation(self) -> int:
        """Highest generation of the state file that this boot has seen; 0 before the first."""
        return self.words[_H_GENERATION]

    @generation.setter
    def generation(self, value: int) -> None:
        self.words[_H_GENERATION] = value

    @property
    def boot_id(self) -> bytes:
        """The boot that it belongs to, 16 octets."""
        return self.words[_H_BOOT : _H_BOOT + 2].tobytes()

    def forgot(self, why: str) -> None:
        """What a daemon of this boot kept here is lost."""
        self.problem = (
            f"{why}: replay windows of this boot are forgotten, packets may be taken a second time; give SAs new keys"
        )

    @property
    def used_octets(self) -> int:
        """Octets that the header and all blocks take."""
        return self.words[_H_USED] * 8

    def close(self) -> None:
        """Unmap.  Views that others still hold keep the mapping alive until they go."""
        self.words.release()
        self._map.close()
        os.close(self.descriptor)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _room(self, slot: int) -> int:
        return self.words[slot + _B_SIZE] - BLOCK_HEADER

    def _take(self, size: int) -> int:
        """Index of the slot of a block of ``size`` words: a free one of that size, or new space."""
        if bucket := self._free.get(size):
            return bucket.pop()
        words, start = self.words, self.words[_H_USED]
        if start + size > words[_H_CAPACITY]:
            for slot in self._retired:
                if self.words[slot + _B_SIZE] == size:
                    self._part_with(slot)
                    return self._free[size].pop()
            raise DaemonError(
                f"shared table is full ({words[_H_CAPACITY] * 8} octets): delete SAs or use smaller replay windows"
            )
        try:
            # Take the memory now: on a full tmpfs a later write to the mapping would be a SIGBUS in a worker.
            os.posix_fallocate(self.descriptor, start * 8, size * 8)
        except OSError as error:
            raise DaemonError(f"shared table: {error.strerror}; make the run directory's file system larger") from error
        slot = start + BLOCK_HEADER
        words[slot + _B_SIZE] = size
        words[slot + _B_STATE] = 0
        # Last: a crash before this line leaves no trace, one after it a free block.
        words[_H_USED] = start + size
        return slot

    def _part_with(self, slot: int) -> None:
        """Give the block of a deleted SA to others: should the SA come back, it is a new one here."""
        self.on_forgotten(self.fingerprint_of(slot))
        self._forget(slot)

    def _forget(self, slot: int) -> None:
        self._retired.pop(slot, None)
        self.words[slot + _B_STATE] = 0
        self._by_fingerprint.pop(self.fingerprint_of(slot), None)
        self._free.setdefault(self.words[slot + _B_SIZE], []).append(slot)

    def _recover(self) -> None:
        """After a start: every block waits for its SA to be given again."""
        words, position, end = self.words, FIRST_BLOCK, self.words[_H_USED]
        while position < end:
            slot = position + BLOCK_HEADER
            size = words[slot + _B_SIZE]
            if size < BLOCK_HEADER + SLOT_HEADER_WORDS or position + size > end:
                raise DaemonError(f"shared table is damaged at word {position}: remove the file and start again")
            if words[slot + _B_STATE]:
                self._by_fingerprint[self.fingerprint_of(slot)] = slot
                words[slot + _B_STATE] = _RETIRED
                self._retired[slot] = None
            else:
                self._free.setdefault(size, []).append(slot)
            position += size


class CounterPages:
    """One array of :data:`ipsecq.counters.COUNTERS_WORDS` words a worker, in an anonymous shared file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, workers: int) -> CounterPages:
        """Zeroed pages for this many workers; they live as long as a process holds the descriptor."""
        descriptor = os.memfd_create("ipsecq-counters", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, workers * COUNTERS_WORDS * 8)
        return cls(descriptor)

    def page(self, worker: int) -> memoryview:
        """The words of one worker, which is their only writer."""
        return self._words[worker * COUNTERS_WORDS : (worker + 1) * COUNTERS_WORDS]

    def __len__(self) -> int:
        return len(self._words) // COUNTERS_WORDS


def _rounded(words: int) -> int:
    """To whole cache lines of eight words: two workers' slots never share one."""
    return (words + 7) & ~7


def _judge(descriptor: int, boot_id: bytes, capacity: int) -> tuple[str, bool]:
    """(what is wrong with it, is it whole and of this boot).  Nothing is wrong with a file of another boot."""
    octets = os.pread(descriptor, 64, 0)
    if len(octets) < 64:
        return "was cut off", False
    header = memoryview(octets).cast("Q")
    if header[_H_MAGIC] != MAGIC:
        return "was damaged", False
    if header[_H_BOOT : _H_BOOT + 2].tobytes() != boot_id:
        return "", False
    if header[_H_CAPACITY] != capacity:
        return "was of another size", False
    if os.fstat(descriptor).st_size != capacity * 8:
        return "was cut off", False
    whole = FIRST_BLOCK <= header[_H_USED] <= capacity
    return "" if whole else "was damaged", whole


def _create(path: Path, boot_id: bytes, capacity: int) -> int:
    """A new file under its final name once its header is complete (an old one stays with whoever maps it)."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(descriptor, capacity * 8)
        os.posix_fallocate(descriptor, 0, FIRST_BLOCK * 8)
        os.pwrite(descriptor, capacity.to_bytes(8, sys.byteorder) + FIRST_BLOCK.to_bytes(8, sys.byteorder) + boot_id, 8)
        os.pwrite(descriptor, MAGIC.to_bytes(8, sys.byteorder), 0)
        fresh.rename(path)
    except OSError as error:
        raise DaemonError(f"shared table {path}: {error.strerror}; the run directory must be writable") from error
    return descriptor
