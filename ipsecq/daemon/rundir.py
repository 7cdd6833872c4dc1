"""The directories of a daemon, and the lock that lets one daemon have them."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Final

from ipsecq.errors import DaemonError

PATIENCE: Final = 5.0
"""Seconds that workers of a daemon that was killed may take to be gone; the kernel kills them with it."""


class RunLock:
    """One daemon for a run directory.

    Workers inherit ``descriptor``, and with it the lock: a daemon that starts after a crash waits until the last worker
    of its predecessor is gone, so that a replay window never has two writers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.descriptor = -1

    def __enter__(self) -> RunLock:
        self.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(self.descriptor)
                    raise DaemonError(f"{self._path}: another ipsecq serves this run directory; stop it first") from None
                time.sleep(0.02)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def make_directory(path: Path, mode: int) -> None:
    """Make it if it isn't there.  Raises DaemonError."""
    try:
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        raise DaemonError(f"{path}: {error.strerror}; make it, or run as root") from error
