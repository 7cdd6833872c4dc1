"""``ipsecq exec -- PROG ARGS``: run an unmodified program whose PF_KEY sockets come from the daemon.

The program runs in a child, in the same process group and session, with the same files; this process is its
supervisor.  Signals that are sent to the supervisor are passed on, what the terminal sends reaches both anyway, the
program's exit status or fatal signal becomes ours.  Processes that outlive the program (a daemon that goes to the
background) are served by a supervisor in the background until the last of them has ended.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from ipsecq.errors import DaemonError
from ipsecq.pfkey import seccomp
from ipsecq.pfkey.notify import OptionHook, Responder
from ipsecq.pfkey.socketpolicy import SocketPolicies

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
"""Exit statuses of a shell that cannot run a program."""

# Not among them: the stop signals, which must stop us as they stop the program, or the shell would wait for ever.
_FORWARDED: Final = frozenset(
    {
        signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM,
        signal.SIGWINCH, signal.SIGIO, signal.SIGPWR, signal.SIGURG, signal.SIGVTALRM, signal.SIGPROF,
    }
)  # fmt: skip
_SIGINFO: Final = 128
_REASONS: Final = {
    errno.EBUSY: "another supervisor (a container runtime, or 'ipsecq exec') has the one listener that Linux allows; "
    "run it outside of that",
    errno.EINVAL: "this kernel has no seccomp user notification (Linux 5.0), or it is compiled out",
    errno.ENOSYS: "this kernel has no seccomp, or a container's own filter hides it; allow 'seccomp' in its profile",
    errno.EPERM: "a container or security module forbids seccomp; allow 'seccomp' in its profile",
    errno.EACCES: "a container or security module forbids seccomp; allow 'seccomp' in its profile",
}


def run(
    arguments: Sequence[str],
    pfkey_path: Path,
    option_hook: OptionHook | None = None,
    *,
    mark_done: int = 0x01000000,
    mark_mask: int = 0x03000000,
    sockets_path: Path | None = None,
) -> NoReturn:
    """Run the program to its end and end as it did.  DaemonError when seccomp notification cannot be had here.

    Policies of sockets are asked for at ``sockets_path``.  Without it, or while no daemon answers there, a privileged
    program can have its sockets bypass all policies (IKE daemons do that), by the marks given, and set no others.
    """
    seccomp.architecture()
    option_hook = option_hook or SocketPolicies(mark_done, mark_mask, sockets_path)
    keys = seccomp.key_descriptors()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        ours.close()
        _become(arguments, theirs, mask, keys)
    theirs.close()
    try:
        listener = seccomp.Listener(_take_listener(ours))
    except BaseException:
        os.waitpid(child, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    ours.close()
    status = _supervise(child, Responder(listener, pfkey_path, option_hook, keys=keys), mask)
    sys.stdout.flush()
    _end_as(status)


def _become(
    arguments: Sequence[str], supervisor: socket.socket, mask: set[signal.Signals | int], keys: range
) -> NoReturn:
    """In the child: filter, hand over the listener, exec."""
    try:
        descriptor = seccomp.install(keys)
    except OSError as error:
        supervisor.send(struct.pack("=i", error.errno or errno.EINVAL))
        os._exit(NOT_EXECUTABLE)
    supervisor.sendmsg(
        [struct.pack("=i", 0)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    )
    supervisor.close()
    os.close(descriptor)
    # Python ignores SIGPIPE and SIGXFSZ, and what is ignored stays so over exec.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        os.execvp(arguments[0], list(arguments))  # noqa: S606  # this is the command's whole purpose
    except OSError as error:
        os.write(2, f"ipsecq exec: {arguments[0]}: {error.strerror}\n".encode())
        os._exit(NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE)


def _take_listener(ours: socket.socket) -> int:
    data, ancillary, _, _ = ours.recvmsg(4, socket.CMSG_SPACE(4))
    number = struct.unpack("=i", data)[0] if len(data) == 4 else errno.EINVAL
    if number or not ancillary:
        reason = _REASONS.get(number, os.strerror(number))
        raise DaemonError(f"'ipsecq exec' needs seccomp user notification: {os.strerror(number)} ({reason})")
    return int(struct.unpack("=i", ancillary[0][2][:4])[0])


def _supervise(child: int, responder: Responder, mask: set[signal.Signals | int]) -> int:
    """Serve until the program has ended; its wait status.  What outlives it gets a supervisor of its own."""
    signals = _signal_descriptor()
    pidfd = os.pidfd_open(child)
    poll = select.poll()
    for descriptor in (signals, pidfd, responder.fileno()):
        poll.register(descriptor, select.POLLIN)
    served = True
    while True:
        events = dict(poll.poll(_milliseconds(responder) if served else None))
        if signals in events:
            _forward(signals, pidfd)
        if served and not responder.serve():
            # Nobody has the filter any more: the program is about to be reaped.
            poll.unregister(responder.fileno())
            served = False
        if pidfd in events:
            _, status = os.waitpid(child, 0)
            if served:
                _serve_in_background(responder, mask)
            os.close(signals)
            os.close(pidfd)
            responder.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return status


def _serve_in_background(responder: Responder, mask: set[signal.Signals | int]) -> None:
    """The program has ended, processes that it left have not: serve them from a process of its own."""
    poll = select.poll()
    poll.register(responder.listener.fileno(), select.POLLIN)
    if any(events & ~select.POLLIN for _, events in poll.poll(0)):
        return
    if os.fork():
        return
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # Whoever waits for the end of the program's output must not wait for us.
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        poll.unregister(responder.listener.fileno())
        poll.register(responder.fileno(), select.POLLIN)
        while responder.serve():
            poll.poll(_milliseconds(responder))
    finally:
        os._exit(0)


def _milliseconds(responder: Responder) -> float | None:
    timeout = responder.timeout()
    return None if timeout is None else timeout * 1000 + 1


def _signal_descriptor() -> int:
    """A signalfd(2) over the forwarded signals: unlike a handler, it tells who sent one."""
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = ctypes.create_string_buffer(128)  # sigset_t
    libc.sigemptyset(wanted)
    for number in _FORWARDED:
        libc.sigaddset(wanted, int(number))
    descriptor = int(libc.signalfd(-1, wanted, os.O_CLOEXEC | os.O_NONBLOCK))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _forward(signals: int, pidfd: int) -> None:
    with contextlib.suppress(BlockingIOError, ProcessLookupError):
        info = os.read(signals, _SIGINFO)
        number, _, code = struct.unpack_from("=Iii", info)
        # Positive codes are the kernel's: what the terminal sends, it sends to the program as well.
        if code <= 0:
            signal.pidfd_send_signal(pidfd, number)


def _end_as(status: int) -> NoReturn:
    """End with the program's wait status, by the same signal if it was one."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        # The core, if any, is the program's.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.waitstatus_to_exitcode(status))
