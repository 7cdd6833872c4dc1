"""The two kernel interfaces of seccomp user notification (seccomp_unotify(2)), by ctypes.

:func:`install` gives the calling process a filter that lets every system call pass but the few that ipsecq serves;
:class:`Listener` is the supervisor's end.  x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import resource
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ipsecq.errors import DaemonError
from ipsecq.pfkey.constants import AF_KEY

IP_IPSEC_POLICY: Final = 16
IPV6_IPSEC_POLICY: Final = 34


@dataclass(slots=True, frozen=True)
class Architecture:
    """What the filter must know of a machine: AUDIT_ARCH_* and numbers of system calls."""

    audit: int
    seccomp: int
    socket: int
    setsockopt: int
    getsockopt: int
    poll: int
    """What the C library's poll(3) calls: poll, or ppoll where there is no such call."""
    poll_has_timespec: bool
    write: int
    writev: int
    sendto: int
    sendmsg: int
    pidfd_getfd: int = 438

    @property
    def sends(self) -> tuple[int, int, int, int]:
        """What sends through a socket."""
        return self.write, self.writev, self.sendto, self.sendmsg


ARCHITECTURES: Final = {
    "x86_64": Architecture(0xC000003E, 317, 41, 54, 55, 7, False, 1, 20, 44, 46),
    "aarch64": Architecture(0xC00000B7, 277, 198, 208, 209, 73, True, 64, 66, 206, 211),
}

SHORT_POLL: Final = 20
"""Milliseconds: a program that waits for its reply no longer than this believes that the kernel answers at once."""

_SELECTABLE: Final = 1024
"""FD_SETSIZE: select(2) takes descriptors below it."""
_KEY_SOCKETS: Final = 64
"""Descriptors of one process that are set aside for PF_KEY sockets."""

_PR_SET_NO_NEW_PRIVS: Final = 38
_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 1 << 3
_WAIT_KILLABLE: Final = 1 << 5
"""Linux 5.19: a signal that doesn't kill leaves a request alone that the supervisor has taken up."""
_CONTINUE: Final = 1
_ADDFD_SETFD: Final = 1 << 0
_ADDFD_SEND: Final = 1 << 1

_NOTIF: Final = struct.Struct("=QII iIQ6Q")
_RESPONSE: Final = struct.Struct("=QqiI")
_ADDFD: Final = struct.Struct("=QIIII")


def _ioctl_number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("!") << 8 | number


_RECEIVE: Final = _ioctl_number(3, 0, _NOTIF.size)
_SEND: Final = _ioctl_number(3, 1, _RESPONSE.size)
_ID_VALID: Final = _ioctl_number(1, 2, 8)
_ADD_DESCRIPTOR: Final = _ioctl_number(1, 3, _ADDFD.size)

_ALLOW: Final = 0x7FFF0000
_NOTIFY: Final = 0x7FC00000


def architecture() -> Architecture:
    """This machine's row; DaemonError where there is none."""
    found = ARCHITECTURES.get(platform.machine())
    if found is None:
        raise DaemonError(f"'ipsecq exec' knows {' and '.join(ARCHITECTURES)}, not {platform.machine()}")
    return found


def key_descriptors() -> range:
    """The numbers that PF_KEY sockets get in the program: the last ones that select(2) and its limit of files allow.

    A filter sees numbers only: by theirs it knows what is sent through a PF_KEY socket.  Empty where the limit is low.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = _SELECTABLE if limit == resource.RLIM_INFINITY else min(limit, _SELECTABLE)
    return range(top - _KEY_SOCKETS, top) if top >= 4 * _KEY_SOCKETS else range(0)


def filter_program(arch: Architecture, keys: range = range(0)) -> bytes:
    """The BPF program: what notifies the supervisor; all else is allowed.

    ``socket(AF_KEY, …)``, ``setsockopt`` and ``getsockopt`` of the two policy options, ``poll`` of one descriptor
    for at most :data:`SHORT_POLL` ms (how long a ppoll waits, the filter cannot see), and what is sent through one of
    the descriptors ``keys``.  A handful of instructions decides.
    """
    send = "send" if keys else "allow"
    poll = "one" if arch.poll_has_timespec else "brief"
    # struct seccomp_data: nr at 0, arch at 4, arguments of 8 octets from 16 on; the kernel itself takes family, level
    # and option as 32-bit ints, so their low halves (little endian on both machines) decide.  A jump names the step
    # to go to; "" is the next one.
    program: list[tuple[str, str, int, str, str]] = [
        ("", "load", 4, "", ""),
        ("", "equal", arch.audit, "", "allow"),
        ("", "load", 0, "", ""),
        ("", "equal", arch.socket, "socket", ""),
        ("", "equal", arch.setsockopt, "option", ""),
        ("", "equal", arch.getsockopt, "option", ""),
        ("", "equal", arch.write, send, ""),
        ("", "equal", arch.sendto, send, ""),
        ("", "equal", arch.writev, send, ""),
        ("", "equal", arch.sendmsg, send, ""),
        ("", "equal", arch.poll, poll, "allow"),
        ("send", "load", 16, "", ""),
        ("", "above", max(keys, default=0), "allow", ""),
        ("", "above", max(keys.start - 1, 0), "notify", "allow"),
        ("brief", "load", 32, "", ""),
        ("", "equal", 0, "allow", ""),
        ("", "above", SHORT_POLL, "allow", ""),  # unsigned: for ever (-1) is above, too
        ("one", "load", 24, "", ""),
        ("", "equal", 1, "notify", "allow"),
        ("socket", "load", 16, "", ""),
        ("", "equal", AF_KEY, "notify", "allow"),
        ("option", "load", 24, "", ""),
        ("", "equal", socket.IPPROTO_IP, "four", ""),
        ("", "equal", socket.IPPROTO_IPV6, "six", "allow"),
        ("four", "load", 32, "", ""),
        ("", "equal", IP_IPSEC_POLICY, "notify", "allow"),
        ("six", "load", 32, "", ""),
        ("", "equal", IPV6_IPSEC_POLICY, "notify", "allow"),
        ("allow", "return", _ALLOW, "", ""),
        ("notify", "return", _NOTIFY, "", ""),
    ]
    codes = {"load": 0x20, "equal": 0x15, "above": 0x25, "return": 0x06}
    places = {label: at for at, (label, *_) in enumerate(program) if label}
    return b"".join(
        struct.pack(
            "=HBBI", codes[code], places[yes] - at - 1 if yes else 0, places[no] - at - 1 if no else 0, operand
        )
        for at, (_, code, operand, yes, no) in enumerate(program)
    )


def install(keys: range = range(0)) -> int:
    """Install the filter in this process, for it and all that it starts; return the listener's descriptor.

    What is sent through ``keys`` notifies if a signal cannot interrupt a call that the supervisor has taken up (Linux
    5.19): the call would be made again, and the message sent twice.

    OSError: EBUSY when a listener is there already, EINVAL or ENOSYS when the kernel has no notification, EPERM or
    EACCES when it is forbidden.  ``no_new_privs`` is set only where the kernel asks for it, that is, not for root.
    """
    arch = architecture()
    libc = ctypes.CDLL(None, use_errno=True)

    def load(flags: int) -> int:
        program = filter_program(arch, keys if flags & _WAIT_KILLABLE else range(0))
        buffer = ctypes.create_string_buffer(program, len(program))
        header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer)))
        listener = int(libc.syscall(arch.seccomp, _SET_MODE_FILTER, flags, header))
        if listener < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return listener

    def load_best() -> int:
        try:
            return load(_NEW_LISTENER | _WAIT_KILLABLE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return load(_NEW_LISTENER)

    try:
        return load_best()
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return load_best()


@dataclass(slots=True, frozen=True)
class Notification:
    """One system call that waits for an answer; ``thread`` is the caller's thread id in our pid namespace."""

    id: int
    thread: int
    call: int
    arguments: tuple[int, ...]


class Listener:
    """The supervisor's end: takes notifications and answers them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Readable when a notification waits, hung up when no process has the filter any more."""
        return self._descriptor

    def close(self) -> None:
        """Close: calls that notify fail with ENOSYS from now on."""
        os.close(self._descriptor)

    def receive(self) -> Notification | None:
        """The next notification; None when the caller has gone in the meantime."""
        buffer = bytearray(_NOTIF.size)
        try:
            fcntl.ioctl(self._descriptor, _RECEIVE, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        number, thread, _, call, _, _, *arguments = _NOTIF.unpack(buffer)
        return Notification(number, thread, call, tuple(arguments))

    def is_valid(self, notification: Notification) -> bool:
        """Does the caller still wait?  If not, its thread id may be another's by now."""
        try:
            fcntl.ioctl(self._descriptor, _ID_VALID, struct.pack("=Q", notification.id))
        except OSError:
            return False
        return True

    def answer(self, notification: Notification, number: int = 0, value: int = 0) -> None:
        """Let the call return ``value``, or fail with errno ``number``."""
        response = bytearray(_RESPONSE.pack(notification.id, 0 if number else value, -number, 0))
        try:
            fcntl.ioctl(self._descriptor, _SEND, response)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINPROGRESS):
                raise

    def go_on(self, notification: Notification) -> None:
        """Let the kernel carry out the call as it is (Linux 5.5)."""
        response = bytearray(_RESPONSE.pack(notification.id, 0, 0, _CONTINUE))
        try:
            fcntl.ioctl(self._descriptor, _SEND, response)
        except OSError as error:
            if error.errno == errno.EINVAL:
                self.answer(notification, errno.EINTR)
            elif error.errno not in (errno.ENOENT, errno.EINPROGRESS):
                raise

    def answer_with_descriptor(
        self, notification: Notification, descriptor: int, *, close_on_exec: bool, number: int | None = None
    ) -> None:
        """Put a duplicate of ``descriptor`` into the caller; its number is what the call returns.

        It gets ``number``, which must be free, if the caller may have it; else the lowest that is free.
        """
        flags = os.O_CLOEXEC if close_on_exec else 0
        if number is not None:
            placed = bytearray(
                _ADDFD.pack(notification.id, _ADDFD_SEND | _ADDFD_SETFD, descriptor, number, flags)
            )
            try:
                fcntl.ioctl(self._descriptor, _ADD_DESCRIPTOR, placed)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
            else:
                return
        try:
            # One step (Linux 5.14): the caller cannot be left with a descriptor that no call returned.
            added = bytearray(_ADDFD.pack(notification.id, _ADDFD_SEND, descriptor, 0, flags))
            fcntl.ioctl(self._descriptor, _ADD_DESCRIPTOR, added)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno != errno.EINVAL:
                self.answer(notification, error.errno or errno.EMFILE)
                return
            added = bytearray(_ADDFD.pack(notification.id, 0, descriptor, 0, flags))
            self.answer(notification, value=fcntl.ioctl(self._descriptor, _ADD_DESCRIPTOR, added))


def read_memory(thread: int, address: int, length: int) -> bytes:
    """``length`` octets at ``address`` of another process; OSError when it is gone or may not be read."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(length)


def write_memory(thread: int, address: int, data: bytes) -> None:
    """Put ``data`` at ``address`` of another process; OSError when it is gone or nothing is mapped there."""
    with open(f"/proc/{thread}/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        if memory.write(data) != len(data):
            raise OSError(errno.EFAULT, "cut short")


def free_descriptor(thread: int, numbers: range) -> int | None:
    """The last of ``numbers`` that is free in another process; None where they are, or may soon be, in ordinary use."""
    if not numbers or _is_open(thread, numbers.start - 1):
        return None
    return next((number for number in reversed(numbers) if not _is_open(thread, number)), None)


def _is_open(thread: int, number: int) -> bool:
    """Is this descriptor open there?  Where we may not look, it is."""
    try:
        Path(f"/proc/{thread}/fd/{number}").readlink()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _status(thread: int, name: str, word: int = 1) -> str:
    with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(name):
                return line.split()[word]
    raise ProcessLookupError(errno.ESRCH, f"thread {thread} has no {name}")


def has_capability(thread: int, number: int) -> bool:
    """Has the thread this capability in its effective set?  OSError when it is gone."""
    return bool(int(_status(thread, "CapEff:"), 16) >> number & 1)


def user_of(thread: int) -> int:
    """Effective user id of the thread (fourth is the file system's, second the effective).  OSError when it is gone."""
    return int(_status(thread, "Uid:", 2))


def duplicate_descriptor(thread: int, descriptor: int) -> int:
    """A duplicate of another process's descriptor, for us to close; OSError when that fails."""
    # pidfd_open wants the leader of the thread group, the notification names the thread.
    pidfd = os.pidfd_open(int(_status(thread, "Tgid:")))
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        found = int(libc.syscall(architecture().pidfd_getfd, pidfd, descriptor, 0))
        if found < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        os.set_inheritable(found, False)
        return found
    finally:
        os.close(pidfd)
