"""When the daemon ends: whoever holds a PF_KEY socket of it is asked to end, too.

A kernel never goes away, so programs are not made for a PF_KEY socket at its end: iked reads nothing from it for ever,
as fast as it can, and believes in SAs that are gone.  Ended, it is started again by whoever looks after it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_UCRED: Final = struct.Struct("=iII")


@dataclass
class DaemonWatch:
    """The daemons that answered, as pidfds in ``epoll``, and the programs that got sockets from them."""

    epoll: select.epoll
    _daemons: dict[int, tuple[int, dict[int, set[int]]]] = field(default_factory=dict)
    """pidfd of a daemon: its pid, and the programs (by thread group) with the inodes of their sockets."""

    def add(self, made: socket.socket, thread: int) -> None:
        """``made`` is connected to a daemon, and a thread's program is about to get it."""
        pid, _, _ = _UCRED.unpack(made.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        program = _thread_group(thread)
        if program is None:
            return
        programs = next((programs for known, programs in self._daemons.values() if known == pid), None)
        if programs is None:
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                return  # a daemon in another container: its end is not seen from here
            programs = {}
            self._daemons[pidfd] = (pid, programs)
            self.epoll.register(pidfd, select.EPOLLIN)
        for gone in [each for each in programs if not Path(f"/proc/{each}").exists()]:
            del programs[gone]
        programs.setdefault(program, set()).add(os.fstat(made.fileno()).st_ino)

    def ended(self, descriptor: int) -> list[int] | None:
        """The daemon behind this descriptor has ended: the programs that were asked to end; None: not one of ours."""
        found = self._daemons.pop(descriptor, None)
        if found is None:
            return None
        self.epoll.unregister(descriptor)
        os.close(descriptor)
        held = _open_sockets()
        asked = [program for program, inodes in found[1].items() if inodes & held]
        for program in asked:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(program, signal.SIGTERM)
        return asked

    def close(self) -> None:
        """Watch no more."""
        for descriptor in self._daemons:
            os.close(descriptor)
        self._daemons.clear()


def _thread_group(thread: int) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{thread}/status").read_text().splitlines():
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return None


def _open_sockets() -> set[int]:
    """Inodes of all sockets that a process has which we may look into; a program may have handed its socket on."""
    found: set[int] = set()
    for directory in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for entry in os.scandir(directory):
                with contextlib.suppress(OSError):
                    target = os.readlink(entry.path)
                    if target.startswith("socket:["):
                        found.add(int(target[8:-1]))
    return found
