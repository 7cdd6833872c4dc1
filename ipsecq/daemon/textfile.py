"""Reading what an operator wrote, without waiting for anybody: regular files of a bounded size, nothing else."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from ipsecq.errors import ConfigError

LIMIT: Final = 256 << 20
"""Octets of one file: a million SAs or policies of 250 octets, ten times what a gateway is measured with."""
_CHUNK: Final = 1 << 20

_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def read_text(path: Path, limit: int = LIMIT) -> str:
    """The whole file.  ConfigError, one line, when it is no regular file, too long, unreadable or not UTF-8."""
    try:
        # Without O_NONBLOCK the open of a FIFO waits for a writer, for ever; a regular file takes no notice.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
            if kind == stat.S_IFDIR:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if kind != stat.S_IFREG:
                found = _KINDS.get(kind, "something else")
                raise ConfigError(f"cannot be read: expected a regular file, found {found}", file=str(path))
            octets = bytearray()
            while chunk := os.read(descriptor, _CHUNK):
                octets += chunk
                if len(octets) > limit:
                    raise ConfigError(f"cannot be read: expected at most {limit} octets", file=str(path))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    try:
        text = octets.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("cannot be read: expected UTF-8 text", file=str(path)) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text files
