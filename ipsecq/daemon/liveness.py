"""Which sockets still live, without keeping any of them open.

An epoll set holds no reference to what it watches: the kernel takes an entry out when the last descriptor of the open
file is closed, in whatever process that was, killed or not.  /proc lists the entries with the inodes of their files.
So this is the kernel's own word, also about sockets that sock_diag doesn't list because they are not bound yet.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
from typing import Final

_ENTRY: Final = re.compile(rb"^tfd:.* ino:([0-9a-f]+)", re.MULTILINE)


class Watch:
    """A set of open files that are watched for their end."""

    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, descriptor: int) -> int:
        """Watch the file behind a descriptor, which the caller then closes; its inode.

        The same file may be added again.  OSError when the kernel's limit of watches is reached.
        """
        # The set's key is the open file together with the number: one that is there already is this very file.
        with contextlib.suppress(FileExistsError):
            self._epoll.register(descriptor, 0)
        return os.fstat(descriptor).st_ino

    def alive(self) -> set[int]:
        """Inodes of the files that somebody has open."""
        with open(f"/proc/self/fdinfo/{self._epoll.fileno()}", "rb", buffering=0) as file:
            text = file.readall()
        return {int(match, 16) for match in _ENTRY.findall(text)}

    def close(self) -> None:
        """Forget everything."""
        self._epoll.close()
