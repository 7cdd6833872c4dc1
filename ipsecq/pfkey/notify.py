"""What the supervisor of ``ipsecq exec`` does with the system calls that it is asked about.

``socket(AF_KEY, SOCK_RAW, PF_KEY_V2)`` returns a socket that is connected to the daemon; ``setsockopt`` and ``getsockopt``
of a per-socket policy are handed to a hook.  Everything else never gets here
(:func:`ipsecq.pfkey.seccomp.filter_program`), but for what is sent through PF_KEY sockets: a kernel has queued its reply
before ``send`` returns, and programs rely on it; racoon reads without waiting.  Our daemon answers when all its workers
have the change, which takes longer.  So the supervisor sends the message itself, and lets the call return when the
daemon, asked for anything on another connection, has answered there: its answers come in the order of the questions.

The filter knows PF_KEY sockets by their numbers.  A duplicate, or what another process got, has another; for those
``poll`` is left.  OpenBSD's iked, whose parent hands its socket to a child, waits for one millisecond, and gives up its
IKE SA when there is no reply; such a poll begins when the reply is there.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from ipsecq.pfkey import seccomp, sending
from ipsecq.pfkey.constants import PF_KEY_V2
from ipsecq.pfkey.seccomp import Listener, Notification
from ipsecq.pfkey.socketpolicy import OptionRequest
from ipsecq.pfkey.watch import DaemonWatch


class OptionHook(Protocol):
    """What serves the two options: :class:`ipsecq.pfkey.socketpolicy.SocketPolicies` is one."""

    def __call__(self, request: OptionRequest) -> int:
        """Set a per-socket policy; an errno, or 0."""

    def get(self, request: OptionRequest) -> tuple[int, bytes]:
        """(errno, the policy of the direction that the request's value names)."""


_OPTION_LIMIT: Final = 4096
"""Octets of a policy option: four transforms with IPv6 ends need 320."""
_INT: Final = 0xFFFFFFFF
_PATIENCE: Final = 5.0
"""Seconds that a short poll of a PF_KEY socket may be put off: workers under load, and a ruleset to load."""
_SEND_PATIENCE: Final = 30.0
"""Seconds that a send through a PF_KEY socket may take: a daemon that has stopped must not stop the program for ever."""
_QUESTION: Final = bytes(16)
"""A header of no version: it is refused, when all before it are answered."""
_UINT: Final = struct.Struct("=I")
_POLICY_SIZE: Final = 16
"""``struct sadb_x_policy``."""
_POLLFD: Final = struct.Struct("=ihh")
_CAP_NET_ADMIN: Final = 12


@dataclass(slots=True)
class _Waiting:
    """A call that returns, or begins, when ``socket`` has something to read, and at ``deadline`` at the latest."""

    socket: socket.socket
    notification: Notification
    deadline: float
    sent: int | None = None
    """What a send returns, octets; None for a poll, which begins."""


class Responder:
    """Answers notifications of one listener.  ``complain(text)`` gets one line when the daemon cannot be reached."""

    def __init__(
        self,
        listener: Listener,
        pfkey_path: Path,
        option_hook: OptionHook | None = None,
        complain: Callable[[str], None] | None = None,
        *,
        keys: range = range(0),
    ) -> None:
        """``keys``: the numbers that PF_KEY sockets get, as the filter knows them."""
        self.listener, self.path, self.option_hook = listener, pfkey_path, option_hook
        self._complain = complain or (lambda text: print(text, file=sys.stderr, flush=True))
        self._complained = ""
        self._arch = seccomp.architecture()
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._watch = DaemonWatch(self._epoll)
        self._keys = keys
        self._waiting: dict[int, _Waiting] = {}
        """Calls that have not returned, by the descriptor that tells when."""

    def fileno(self) -> int:
        """Readable when :meth:`serve` has something to do."""
        return self._epoll.fileno()

    def timeout(self) -> float | None:
        """Seconds after which :meth:`serve` has something to do in any case; None: nothing waits."""
        if not self._waiting:
            return None
        return max(0.0, min(each.deadline for each in self._waiting.values()) - time.monotonic())

    def serve(self) -> bool:
        """Do what is due, without waiting; False when no process has the filter any more."""
        for descriptor, events in self._epoll.poll(0):
            if descriptor != self.listener.fileno():
                asked = self._watch.ended(descriptor)
                if asked is None:
                    self._begin(descriptor)
                elif asked:
                    self._complain("ipsecq exec: the daemon has ended, so have its PF_KEY sockets: SIGTERM to the program")
            elif events & select.EPOLLIN:
                self.serve_one()
            else:
                return False
        now = time.monotonic()
        for descriptor in [each for each, waiting in self._waiting.items() if waiting.deadline <= now]:
            self._begin(descriptor)
        return True

    def close(self) -> None:
        """Give up: calls that wait fail, as do later ones."""
        for descriptor in list(self._waiting):
            self._begin(descriptor)
        self._watch.close()
        self._epoll.close()
        self.listener.close()

    def serve_one(self) -> None:
        """Take the next notification and answer it; nothing raised for what the program does or fails to do."""
        notification = self.listener.receive()
        if notification is None:
            return
        if notification.call == self._arch.socket:
            self._socket(notification)
        elif notification.call == self._arch.setsockopt:
            self.listener.answer(notification, self._setsockopt(notification))
        elif notification.call == self._arch.getsockopt:
            self.listener.answer(notification, self._getsockopt(notification))
        elif notification.call == self._arch.poll:
            self._poll(notification)
        elif notification.call in self._arch.sends:
            self._send(notification)
        else:
            self.listener.answer(notification, errno.ENOSYS)

    def _poll(self, notification: Notification) -> None:
        """Put off a short poll of a PF_KEY socket until there is something to read; any other goes on at once."""
        made = self._polled(notification)
        if made is None:
            self.listener.go_on(notification)
            return
        self._wait(_Waiting(made, notification, time.monotonic() + _PATIENCE))

    def _wait(self, waiting: _Waiting) -> None:
        self._waiting[waiting.socket.fileno()] = waiting
        self._epoll.register(waiting.socket.fileno(), select.EPOLLIN)

    def _send(self, notification: Notification) -> None:
        """Send a message in the program's place; the call returns when the reply to it is there."""
        sent = self._pass_on(notification)
        if sent is None:
            self.listener.go_on(notification)
            return
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            asking.connect(str(self.path))
            asking.send(_QUESTION, socket.MSG_NOSIGNAL)
        except OSError:
            # No daemon any more, or it has no room: as good as it gets.
            asking.close()
            self.listener.answer(notification, value=sent)
            return
        self._wait(_Waiting(asking, notification, time.monotonic() + _SEND_PATIENCE, sent))

    def _pass_on(self, notification: Notification) -> int | None:
        """Octets sent; None: the kernel is to do what was asked for, and to say what is wrong with it."""
        try:
            data = sending.octets(notification, self._arch)
        except (OSError, struct.error):
            return None
        made = self._own_socket(notification, notification.arguments[0] & _INT) if data is not None else None
        if made is None or data is None:
            return None
        with made:
            try:
                return made.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                return None

    def _polled(self, notification: Notification) -> socket.socket | None:
        address, _, timeout = notification.arguments[:3]
        thread = notification.thread
        try:
            descriptor, events, _ = _POLLFD.unpack(seccomp.read_memory(thread, address, _POLLFD.size))
            if self._arch.poll_has_timespec and not _is_short(seccomp.read_memory(thread, timeout, 16)):
                return None
        except (OSError, struct.error):
            return None  # the kernel will tell the program
        return self._own_socket(notification, descriptor) if descriptor >= 0 and events & select.POLLIN else None

    def _own_socket(self, notification: Notification, descriptor: int) -> socket.socket | None:
        """A duplicate of the program's descriptor, if that is a PF_KEY socket and the program still waits."""
        try:
            duplicate = seccomp.duplicate_descriptor(notification.thread, descriptor)
        except OSError:
            return None
        try:
            made = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            return None
        try:
            ours = made.family == socket.AF_UNIX and made.getpeername() == str(self.path)
        except OSError:
            ours = False
        if ours and self.listener.is_valid(notification):
            return made
        made.close()
        return None

    def _begin(self, descriptor: int) -> None:
        waiting = self._waiting.pop(descriptor)
        self._epoll.unregister(descriptor)
        waiting.socket.close()
        if waiting.sent is None:
            self.listener.go_on(waiting.notification)
        else:
            self.listener.answer(waiting.notification, value=waiting.sent)

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
                self._watch.add(made, notification.thread)
                made.setblocking(not kind & socket.SOCK_NONBLOCK)
                self.listener.answer_with_descriptor(
                    notification, made.fileno(), close_on_exec=bool(kind & socket.SOCK_CLOEXEC),
                    number=seccomp.free_descriptor(notification.thread, self._keys),
                )  # fmt: skip

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
        address, length = notification.arguments[3], notification.arguments[4] & _INT
        if length > _OPTION_LIMIT:
            return errno.EINVAL
        return self._option(notification, address, length, self.option_hook)

    def _getsockopt(self, notification: Notification) -> int:
        """KAME's way: the caller's buffer names the direction in a ``sadb_x_policy`` and receives that one's policy."""
        hook = self.option_hook
        if hook is None:
            return errno.ENOPROTOOPT
        address, length_at = notification.arguments[3:5]
        answer = b""

        def get(request: OptionRequest) -> int:
            nonlocal answer
            number, answer = hook.get(request)
            return number

        try:
            (room,) = _UINT.unpack(seccomp.read_memory(notification.thread, length_at, _UINT.size))
            if room < _POLICY_SIZE:
                return errno.EINVAL
            number = self._option(notification, address, _POLICY_SIZE, get)
            if number or not answer:
                return number
            # The caller waits for us, or the option would not have been looked at: this is its memory.
            seccomp.write_memory(notification.thread, address, answer[:room])
            seccomp.write_memory(notification.thread, length_at, _UINT.pack(min(room, len(answer))))
        except (OSError, struct.error):
            return errno.EFAULT
        return 0

    def _option(
        self, notification: Notification, address: int, length: int, hook: Callable[[OptionRequest], int]
    ) -> int:
        descriptor, level, option = notification.arguments[:3]
        try:
            value = seccomp.read_memory(notification.thread, address, length) if length else b""
            user = seccomp.user_of(notification.thread)
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
            return hook(OptionRequest(made, level & _INT, option & _INT, value, privileged, user))

    def _say(self, text: str) -> None:
        if text != self._complained:
            self._complained = text
            self._complain(text)


def _is_short(timespec: bytes) -> bool:
    seconds, nanoseconds = struct.unpack("=qq", timespec)
    return bool(seconds == 0 and 0 < nanoseconds <= seccomp.SHORT_POLL * 1_000_000)
