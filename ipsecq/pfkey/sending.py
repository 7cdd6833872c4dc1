"""What a program sends by ``write``, ``writev``, ``sendto`` or ``sendmsg``, read from its memory."""

from __future__ import annotations

import socket
import struct
from typing import Final

from ipsecq.pfkey import seccomp
from ipsecq.pfkey.seccomp import Architecture, Notification

_LONGEST: Final = 65535 * 8
"""Octets of the longest PF_KEY message: its header counts 8-octet words with 16 bits."""
_PIECES: Final = 1024
"""UIO_MAXIOV."""
_IOVEC: Final = struct.Struct("=QQ")
_MSGHDR: Final = struct.Struct("=QIIQQQQiI")
_PLAIN: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL | socket.MSG_EOR
"""Flags that change nothing about a message on a PF_KEY socket."""


def octets(notification: Notification, arch: Architecture) -> bytes | None:
    """The message; None where the kernel had better look at the call itself (descriptors, odd flags, nothing at all).

    OSError and struct.error where the program's memory isn't what its arguments say.
    """
    _, address, length, flags, _, _ = notification.arguments
    if notification.call == arch.sendmsg:
        _, _, _, pieces, count, _, control, _, _ = _MSGHDR.unpack(
            seccomp.read_memory(notification.thread, address, _MSGHDR.size)
        )
        if control:
            return None
        address, length, flags = pieces, count, length
    elif notification.call != arch.sendto:
        flags = 0
    if flags & 0xFFFFFFFF & ~_PLAIN:
        return None
    if notification.call not in (arch.writev, arch.sendmsg):
        return _read(notification.thread, [(address, length)])
    if not 0 < length <= _PIECES:
        return None
    vector = seccomp.read_memory(notification.thread, address, length * _IOVEC.size)
    return _read(notification.thread, list(_IOVEC.iter_unpack(vector)))


def _read(thread: int, pieces: list[tuple[int, int]]) -> bytes | None:
    total = sum(length for _, length in pieces)
    if not 0 < total <= _LONGEST:
        return None
    data = b"".join(seccomp.read_memory(thread, address, length) for address, length in pieces if length)
    return data if len(data) == total else None
