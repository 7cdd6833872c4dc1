"""SO_MARK with all of its 32 bits: Python's own int form of the option is signed."""

from __future__ import annotations

import socket
import struct
from typing import Final

SO_MARK: Final = 36


def get_mark(sock: socket.socket) -> int:
    """The socket's mark, 0 to 0xffffffff.  Raises OSError."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_MARK) & 0xFFFFFFFF


def set_mark(sock: socket.socket, mark: int) -> None:
    """Set it.  OSError (EPERM) without CAP_NET_ADMIN or CAP_NET_RAW."""
    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, struct.pack("=I", mark))
