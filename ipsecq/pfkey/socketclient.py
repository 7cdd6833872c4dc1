"""Asking the daemon for the policy of a socket: the client behind :func:`ipsecq.set_policy`.

The protocol is described in :mod:`ipsecq.daemon.socket_server`.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any, Final, Protocol

from ipsecq.errors import DaemonError

DEFAULT_PATH: Final = Path("/run/ipsecq/sockets")
TIMEOUT: Final = 30.0
"""Seconds: the daemon answers when all its workers and the kernel's rules have the policy."""
_BUFFER: Final = 1 << 16


class HasFileno(Protocol):
    """A socket, or what wraps one."""

    def fileno(self) -> int:
        """The descriptor."""


def ask(path: Path, sock: HasFileno | int, **request: object) -> dict[str, Any]:
    """One request about ``sock``, and the answer.

    OSError with the daemon's errno and reason when it refuses; DaemonError when it cannot be reached; TypeError when
    ``sock`` is neither a descriptor nor has one.
    """
    descriptor = sock if isinstance(sock, int) else _descriptor(sock)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC))
        connection.settimeout(TIMEOUT)
        descriptors = [descriptor]
        proof = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC))
        with contextlib.suppress(PermissionError):
            # Only CAP_NET_ADMIN can set this; the daemon looks at it.
            proof.setsockopt(socket.SOL_SOCKET, socket.SO_DEBUG, 1)
            descriptors.append(proof.fileno())
        try:
            connection.connect(str(path))
        except OSError as error:
            raise DaemonError(f"no daemon answers at {path} ({error.strerror}): is ipsecq running?") from None
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            connection.sendmsg([json.dumps(request).encode()], rights)
            answer = json.loads(connection.recv(_BUFFER))
            number = int(answer["errno"])
        except (TimeoutError, ConnectionError, ValueError, KeyError, TypeError) as error:
            raise DaemonError(f"{path}: the daemon broke off: its log says why") from error
    if number:
        raise OSError(number, str(answer.get("error") or os.strerror(number)))
    return dict(answer)


def _descriptor(sock: HasFileno) -> int:
    fileno = getattr(sock, "fileno", None)
    if not callable(fileno):
        raise TypeError(f"expected a socket or a descriptor, found {type(sock).__name__}")
    return int(fileno())
