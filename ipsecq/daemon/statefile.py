"""The file that says which sequence numbers may have been sent: records that outlive a power cut, and whose they are.

``STATE_DIR/sequences`` holds two copies of a header and, for each SA, two copies of a record; a write always replaces
the older copy, so a torn one leaves its predecessor, whose numbers had not been exceeded.  A record says: every number
of this SA below ``reserved`` may have been used.

The header says whose file it is: machine, inode and birth time of the file itself.  The file is written anew at
every start, so a copy that a backup brought back has another inode or birth time, and is refused.
What cannot be seen from here is a whole disk that was rolled back, inodes included (docs/architecture.md).

    0     header A (512 octets)    512   header B
    4096  record 0 A (64 octets)   4160  record 0 B   4224  record 1 A …
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ipsecq.errors import StateError

MAGIC: Final = b"ipsecqS1"
NAME: Final = "sequences"
HEADER_OCTETS: Final = 512
FIRST_RECORD: Final = 4096
RECORD_OCTETS: Final = 128
HALF: Final = RECORD_OCTETS // 2
GROWTH: Final = 512
"""Records for which disk space is taken at once, so that a full disk stops new SAs, never those that are running."""

FLAG_REFUSING: Final = 1
"""Header: what was sent is not known; SAs without a record must not use counters as IVs."""
FLAG_PASSING: Final = 1
"""Record: a key that a daemon negotiated; such keys never come back, so the record may go after KEEP_DAYS."""
FLAG_REFUSED: Final = 2
"""Record: the numbers cannot be trusted; the SA must not send until the operator resets it."""
KEEP_DAYS: Final = 30

_RECORD = struct.Struct("<32sQQII")
_HEADER = struct.Struct("<8sIIQQQQ32s")


@dataclass(slots=True, frozen=True)
class Header:
    """Whose file it is.  ``serial`` counts writes of the header, ``generation`` starts of the daemon."""

    generation: int
    serial: int
    inode: int
    birth: int
    """Nanoseconds; 0 where the file system keeps no birth time."""
    machine: bytes
    """SHA-256 of /etc/machine-id, or 32 zero octets where there is none."""
    flags: int = 0
    boot: bytes = bytes(16)
    """The boot that it was written in; zero octets where an earlier version wrote it."""

    def pack(self) -> bytes:
        """512 octets, digests included."""
        body = _HEADER.pack(
            MAGIC, 1, self.flags, self.generation, self.serial, self.inode, self.birth, self.machine
        )
        digest = hashlib.sha256(body).digest()
        # Behind what version 1 began with, so that earlier versions go on reading it.
        return (body + digest + self.boot + hashlib.sha256(digest + self.boot).digest()).ljust(HEADER_OCTETS, b"\0")

    @classmethod
    def unpack(cls, octets: bytes) -> Header | None:
        """The header, or None when it was torn or never written."""
        body, digest = octets[: _HEADER.size], octets[_HEADER.size : _HEADER.size + 32]
        if len(octets) < HEADER_OCTETS or hashlib.sha256(body).digest() != digest:
            return None
        magic, version, flags, generation, serial, inode, birth, machine = _HEADER.unpack(body)
        rest = octets[_HEADER.size + 32 :]
        boot = rest[:16] if hashlib.sha256(digest + rest[:16]).digest() == rest[16:48] else bytes(16)
        return cls(generation, serial, inode, birth, machine, flags, boot) if (magic, version) == (MAGIC, 1) else None


@dataclass(slots=True, frozen=True)
class Record:
    """One SA's reservation.  ``day`` is the day (Unix time / 86400) of the last write."""

    fingerprint: bytes
    reserved: int
    serial: int
    flags: int = 0
    day: int = 0

    def pack(self) -> bytes:
        """64 octets, checksum included: never more than one sector of a disk."""
        body = _RECORD.pack(self.fingerprint, self.reserved, self.serial, self.flags, self.day)
        return body + hashlib.sha256(body).digest()[:8]

    @classmethod
    def unpack(cls, octets: bytes) -> Record | None:
        """The record, or None when it was torn or never written."""
        body = octets[: _RECORD.size]
        if len(octets) < HALF or hashlib.sha256(body).digest()[:8] != octets[_RECORD.size : HALF]:
            return None
        return cls(*_RECORD.unpack(body))


def newest(octets: bytes) -> Record | None:
    """The valid copy with the highest serial of the 128 octets of a record."""
    copies = [record for at in (0, HALF) if (record := Record.unpack(octets[at : at + HALF]))]
    return max(copies, key=lambda record: record.serial, default=None)


def newest_header(octets: bytes) -> Header | None:
    """The valid copy with the highest serial of the first 1024 octets of a file."""
    copies = [Header.unpack(octets[at : at + HEADER_OCTETS]) for at in (0, HEADER_OCTETS)]
    return max((copy for copy in copies if copy), key=lambda copy: copy.serial, default=None)


def _full(error: OSError) -> StateError:
    return StateError(f"state file: {error.strerror}: sequence numbers cannot be reserved")


class StateFile:
    """An open state file.  Locking is the caller's (:mod:`ipsecq.daemon.leases`)."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._unsynced: set[int] | None = None
        """Records of a batch that are not on the disk yet; None outside of a batch."""

    def read(self, index: int) -> Record | None:
        """The record, or None when nothing valid is there."""
        return newest(os.pread(self.descriptor, RECORD_OCTETS, FIRST_RECORD + index * RECORD_OCTETS))

    def write(self, index: int, record: Record) -> None:
        """Replace the older copy and wait until it is on the disk, in a batch until its end.  Raises StateError."""
        try:
            if os.fstat(self.descriptor).st_nlink == 0:
                raise StateError("the state file was replaced while ipsecq was running: restart the daemon")
            if self._unsynced is not None and index in self._unsynced:
                # A power cut that tears both copies of one record would leave nothing of it.
                self._sync()
            place = FIRST_RECORD + index * RECORD_OCTETS + (record.serial & 1) * HALF
            os.pwrite(self.descriptor, record.pack(), place)
            if self._unsynced is None:
                os.fdatasync(self.descriptor)
            else:
                self._unsynced.add(index)
        except OSError as error:
            raise _full(error) from error

    def write_header(self, header: Header) -> None:
        """Replace the older copy of the header and wait for the disk.  Raises StateError."""
        try:
            os.pwrite(self.descriptor, header.pack(), (header.serial & 1) * HEADER_OCTETS)
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise StateError(f"state file: {error.strerror}") from error

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Many records, one wait for the disk: at the end, also when something fails.  Raises StateError.

        Until then nobody may rely on what is written.
        """
        if self._unsynced is not None:  # within another one, which waits
            yield
            return
        self._unsynced = set()
        try:
            yield
        finally:
            try:
                self._sync()
            except OSError as error:
                raise _full(error) from error
            finally:
                self._unsynced = None

    def _sync(self) -> None:
        if self._unsynced:
            os.fdatasync(self.descriptor)
            self._unsynced.clear()

    def header(self) -> Header | None:
        """The newer valid copy of the header."""
        return newest_header(os.pread(self.descriptor, 2 * HEADER_OCTETS, 0))

    def make_room(self, records: int) -> None:
        """Have the disk keep space for this many records.  Raises StateError when it is full."""
        need = FIRST_RECORD + -(-records // GROWTH) * GROWTH * RECORD_OCTETS
        try:
            if os.fstat(self.descriptor).st_size < need:
                os.posix_fallocate(self.descriptor, 0, need)
        except OSError as error:
            raise StateError(f"state file: {error.strerror}: no room for another SA") from error


@dataclass(slots=True)
class Loaded:
    """What a state directory held.  ``problem`` says why it cannot be trusted; empty: it can, or nothing was there."""

    records: list[Record]
    generation: int = 0
    problem: str = ""
    refusing: bool = False
    """An earlier start had refused already and nobody has lifted it."""
    existed: bool = False
    boot: bytes = bytes(16)


def load(path: Path, machine: bytes) -> Loaded:
    """Read and judge the file.  Never raises: what is wrong is in ``problem``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return Loaded([])
    except OSError as error:
        return Loaded([], problem=f"{path} cannot be read ({error.strerror})", existed=True)
    try:
        with os.fdopen(descriptor, "rb") as file:
            octets = file.read()
            status = os.fstat(file.fileno())
            birth = birth_time(file.fileno())
    except OSError as error:
        return Loaded([], problem=f"{path} cannot be read ({error.strerror})", existed=True)
    header = newest_header(octets)
    if header is None:
        return Loaded([], problem=f"{path} is damaged", existed=True)
    loaded = Loaded([], header.generation, refusing=bool(header.flags & FLAG_REFUSING), existed=True, boot=header.boot)
    for at in range(FIRST_RECORD, len(octets), RECORD_OCTETS):
        chunk = octets[at : at + RECORD_OCTETS]
        record = newest(chunk)
        if record is not None:
            loaded.records.append(record)
        elif chunk.strip(b"\0"):
            loaded.problem = f"{path} is damaged at octet {at}"
    if header.machine != machine and header.machine.strip(b"\0") and machine.strip(b"\0"):
        loaded.problem = f"{path} was written on another machine"
    elif header.inode != status.st_ino or (header.birth and birth and header.birth != birth):
        loaded.problem = f"{path} is a copy, perhaps restored from a backup"
    return loaded


def create(
    path: Path, machine: bytes, generation: int, records: list[Record], *, refusing: bool, boot: bytes = bytes(16)
) -> StateFile:
    """Write a new file with these records and put it in the place of the old one, on the disk when this returns."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        state = StateFile(descriptor)
        state.make_room(len(records) + 1)
        flags = FLAG_REFUSING if refusing else 0
        header = Header(generation, 2, os.fstat(descriptor).st_ino, birth_time(descriptor), machine, flags, boot)
        os.pwrite(descriptor, header.pack() + replace(header, serial=1).pack(), 0)
        body = b"".join(record.pack() * 2 for record in records)
        written = 0
        while written < len(body):
            written += os.pwrite(descriptor, body[written:], FIRST_RECORD + written)
        os.fsync(descriptor)
        fresh.rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}: the state directory must be writable and have room") from error
    return state


class _Statx(ctypes.Structure):
    """``struct statx`` of <linux/stat.h>, as far as the birth time."""

    _fields_ = (
        ("head", ctypes.c_uint32 * 20),
        ("birth_seconds", ctypes.c_int64),
        ("birth_nanoseconds", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 164),
    )


def birth_time(descriptor: int) -> int:
    """When the file was created, in nanoseconds since 1970; 0 where kernel or file system don't say.

    Unlike the other times of a file it cannot be set, so no backup brings it back.
    """
    at_empty_path, statx_btime, mask_words = 0x1000, 0x800, 0
    result = _Statx()
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return 0
    if statx(descriptor, b"", at_empty_path, statx_btime, ctypes.byref(result)) != 0:
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise OSError(ctypes.get_errno(), "statx")
        return 0
    if not result.head[mask_words] & statx_btime:
        return 0
    return int(result.birth_seconds) * 1_000_000_000 + int(result.birth_nanoseconds)


def machine_identity() -> bytes:
    """SHA-256 of the machine's id; 32 zero octets when it has none (a container, an image not yet booted)."""
    try:
        text = Path("/etc/machine-id").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return bytes(32)
    return hashlib.sha256(text.encode()).digest() if text and text != "uninitialized" else bytes(32)


def boot_identity() -> bytes:
    """16 octets that are new at each boot."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip().replace("-", ""))
