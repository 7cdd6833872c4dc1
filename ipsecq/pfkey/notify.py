"""What the supervisor of ``ipsecq exec`` does with the system calls that it is asked about.

``socket(AF_KEY, SOCK_RAW, PF_KEY_V2)`` returns a socket that is connected to the daemon; ``setsockopt`` of a per-socket
policy is handed to a hook.  Everything else never gets here (:func:`ipsecq.pfkey.seccomp.filter_program`).
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ipsecq.pfkey import seccomp
from ipsecq.pfkey.constants import PF_KEY_V2
from ipsecq.pfkey.seccomp import Listener, Notification
from ipsecq.pfkey.socketpolicy import OptionRequest

OptionHook = Callable[[OptionRequest], int]
"""Sets a per-socket policy; returns an errno, or 0 (:class:`ipsecq.pfkey.socketpolicy.SocketPolicies` is one)."""

_OPTION_LIMIT: Final = 4096
"""Octets of a policy option: four transforms with IPv6 ends need 320."""
_INT: Final = 0xFFFFFFFF
_CAP_NET_ADMIN: Final = 12


class Responder:
    """Answers notifications of one listener.  ``complain(text)`` gets one line when the daemon cannot be reached."""

    def __init__(
        self,
        listener: Listener,
        pfkey_path: Path,
        option_hook: OptionHook | None = None,
        complain: Callable[[str], None] | None = None,
    ) -> None:
        self.listener, self.path, self.option_hook = listener, pfkey_path, option_hook
        self._complain = complain or (lambda text: print(text, file=sys.stderr, flush=True))
        self._complained = ""
        self._arch = seccomp.architecture()

    def serve_one(self) -> None:
        """Take the next notification and answer it; nothing raised for what the program does or fails to do."""
        notification = self.listener.receive()
        if notification is None:
            return
        if notification.call == self._arch.socket:
            self._socket(notification)
        elif notification.call == self._arch.setsockopt:
            self.listener.answer(notification, self._setsockopt(notification))
        else:
            self.listener.answer(notification, errno.ENOSYS)

    def _socket(self, notification: Notification) -> None:
        kind, protocol = (argument & _INT for argument in notification.arguments[1:3])
        # The order and the errnos of the kernel's own check.
        if kind & 0xF != socket.SOCK_RAW:
            self.listener.answer(notification, errno.ESOCKTNOSUPPORT)
        elif protocol != PF_KEY_V2:
            self.listener.answer(notification, errno.EPROTONOSUPPORT)
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as made:
                number = self._connect(made)
                if number:
                    self.listener.answer(notification, number)
                    return
                made.setblocking(not kind & socket.SOCK_NONBLOCK)
                self.listener.answer_with_descriptor(
                    notification, made.fileno(), close_on_exec=bool(kind & socket.SOCK_CLOEXEC)
                )

    def _connect(self, made: socket.socket) -> int:
        try:
            made.connect(str(self.path))
        except OSError as error:
            self._say(f"ipsecq exec: cannot reach the daemon at {self.path}: {error.strerror}; run 'ipsecq run' first")
            # What a program without the privilege, or on a kernel without PF_KEY, is told.
            return errno.EPERM if error.errno in (errno.EACCES, errno.EPERM) else errno.EAFNOSUPPORT
        return 0

    def _setsockopt(self, notification: Notification) -> int:
        if self.option_hook is None:
            return errno.ENOPROTOOPT
        descriptor, level, option, address, length = notification.arguments[:5]
        length &= _INT
        if length > _OPTION_LIMIT:
            return errno.EINVAL
        try:
            value = seccomp.read_memory(notification.thread, address, length) if length else b""
            privileged = seccomp.has_capability(notification.thread, _CAP_NET_ADMIN)
            duplicate = seccomp.duplicate_descriptor(notification.thread, descriptor & 0x7FFFFFFF)
        except OSError as error:
            return error.errno if error.errno in (errno.EBADF, errno.EPERM, errno.EACCES) else errno.EFAULT
        try:
            made = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            return errno.ENOTSOCK
        with made:
            # Only now is it sure that memory and descriptor were the caller's, and not those of whoever got its id.
            if not self.listener.is_valid(notification):
                return 0
            if len(value) != length:
                return errno.EFAULT
            return self.option_hook(OptionRequest(made, level & _INT, option & _INT, value, privileged))

    def _say(self, text: str) -> None:
        if text != self._complained:
            self._complained = text
            self._complain(text)
