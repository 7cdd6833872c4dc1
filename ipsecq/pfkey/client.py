"""A blocking PF_KEY client: for ``ipsecq setkey``, for tests, and over a kernel's socket to compare with af_key."""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ipsecq.errors import DaemonError
from ipsecq.pfkey.constants import AF_KEY, PF_KEY_V2, Dialect, MessageType
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.messages import Message, build, parse
from ipsecq.pfkey.xextensions import Filter

_RECEIVE: Final = 65536 * 8
_CLOSED: Final = "the daemon closed the PF_KEY socket: it has stopped, or does not serve this user (see its log)"
_REPLY_TYPE: Final[dict[int, int]] = {MessageType.X_SPDSETIDX: MessageType.X_SPDADD}
"""Where the type of the reply is not that of the request."""


class PfkeyClient:
    """One PF_KEY socket, and the requests made over it one at a time."""

    def __init__(self, connection: socket.socket, dialect: Dialect = Dialect.LINUX, timeout: float = 30.0) -> None:
        self.socket, self.dialect = connection, dialect
        self.socket.settimeout(timeout)
        self.events: deque[Message] = deque()
        """What came in between: ACQUIREs, EXPIREs and other clients' changes, in order."""
        self._seq = 0

    @classmethod
    def connect(cls, path: Path, dialect: Dialect = Dialect.LINUX, timeout: float = 30.0) -> Self:
        """Connect to the daemon's socket; DaemonError when it cannot be reached."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            hint = "use sudo" if error.errno in (errno.EACCES, errno.EPERM) else "is 'ipsecq run' running?"
            raise DaemonError(f"cannot reach the daemon at {path}: {error.strerror}; {hint}") from error
        return cls(connection, dialect, timeout)

    @classmethod
    def kernel(cls, timeout: float = 30.0) -> Self:
        """The kernel's own PF_KEY; OSError where it has none."""
        return cls(socket.socket(AF_KEY, socket.SOCK_RAW, PF_KEY_V2), Dialect.LINUX, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def send(self, message: Message) -> None:
        """Send, with a fresh sequence number and our pid where the message has none."""
        if not message.seq:
            self._seq += 1
            message.seq = self._seq
        message.pid = message.pid or os.getpid()
        try:
            self.socket.send(build(message, self.dialect))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise DaemonError(_CLOSED) from error

    def receive(self) -> Message:
        """The next message, whatever it is; TimeoutError after the time given, DaemonError when the daemon went."""
        try:
            data = self.socket.recv(_RECEIVE)
        except ConnectionResetError as error:
            raise DaemonError(_CLOSED) from error
        if not data:
            raise DaemonError(_CLOSED)
        return parse(data, self.dialect, reply=True)

    def request(self, message: Message) -> Message:
        """Send, and return the reply; PfkeyError with the errno that the server gave."""
        self.send(message)
        return self._checked(self._reply_to(message))

    def dump(
        self, kind: MessageType = MessageType.DUMP, satype: int = 0, chosen: Filter | None = None
    ) -> Iterator[Message]:
        """The records of DUMP or X_SPDDUMP, as they come; nothing when the database is empty."""
        request = Message(kind, satype, filter=chosen)
        self.send(request)
        while True:
            record = self._reply_to(request, any_seq=True)
            if record.errno == errno.ENOENT:
                return
            yield self._checked(record)
            if record.seq == 0:
                return

    def _reply_to(self, request: Message, *, any_seq: bool = False) -> Message:
        while True:
            message = self.receive()
            if (
                message.type == _REPLY_TYPE.get(request.type, request.type)
                and message.pid == request.pid
                and (any_seq or message.seq == request.seq)
            ) or (message.errno and message.seq == request.seq and message.pid == request.pid):
                return message
            self.events.append(message)

    def _checked(self, reply: Message) -> Message:
        if reply.errno:
            name = MessageType(reply.type).name
            raise PfkeyError(f"SADB_{name}: {os.strerror(reply.errno)}", reply.errno)
        return reply
