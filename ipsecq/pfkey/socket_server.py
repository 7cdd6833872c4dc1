"""The Unix socket of the PF_KEY server: SOCK_SEQPACKET, one datagram a message, as on a real PF_KEY socket.

To be embedded in any event loop: :meth:`PfkeySocketServer.fileno` is one descriptor (an epoll set over listeners and
clients) that is readable whenever :meth:`PfkeySocketServer.on_readable` has something to do.  Nothing here blocks.

A client that reads slowly holds up nobody: its queue is bounded, its own requests wait while the queue is long, dumps
are written as it reads, and news for all (broadcasts, ACQUIRE, EXPIRE) beyond the bound are dropped and counted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipsecq.errors import DaemonError
from ipsecq.pfkey.constants import Dialect
from ipsecq.pfkey.server import Datagrams, PfkeyServer

Barrier = Callable[[Callable[[], None]], None]
"""``barrier(release)``: call ``release`` once all workers have every change made so far; in the order of the calls."""

_BUFFER: Final = 65536 * 8
"""Octets of the longest message that a 16-bit count of 8-octet words can describe, and one word."""
_QUEUE_LIMIT: Final = 4 << 20
"""Octets that may wait for one client."""
_QUEUE_LOW: Final = 64 << 10
"""Below this a dump goes on, and requests are read again."""
MAX_CLIENTS: Final = 128
"""Connections of all users."""
MAX_CLIENTS_USER: Final = 32
"""Connections of one user other than root."""
_TURN: Final = 64
"""Messages read from, and dump records written to, one client before the others have their turn."""
_UCRED: Final = struct.Struct("=iII")


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    id: int
    pid: int
    uid: int
    queue: deque[bytes] = field(default_factory=deque)
    queued: int = 0
    interest: int = select.EPOLLIN
    dropped: int = 0


class PfkeySocketServer:
    """Listeners and connections in front of one :class:`PfkeyServer`."""

    def __init__(self, server: PfkeyServer, barrier: Barrier | None = None) -> None:
        self.server = server
        self.barrier = barrier
        self.dropped = 0
        """Messages not sent because a client's queue was full, over all clients."""
        self._epoll = select.epoll()
        self._listeners: dict[int, tuple[socket.socket, Dialect, int | None, Path]] = {}
        self._connections: dict[int, _Connection] = {}
        self._by_id: dict[int, _Connection] = {}
        self._last_id = 0
        self._buffer = bytearray(_BUFFER)

    def listen(
        self, path: Path, *, mode: int = 0o600, group: int | None = None, dialect: Dialect = Dialect.LINUX
    ) -> None:
        """Open a listener at ``path``.  ``group``: its members are let in too (mode 0660), but see no keys.

        DaemonError when another daemon answers there, or the path cannot be used.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            _unlink_stale(path)
            old = os.umask(0o177)
            try:
                listener.bind(str(path))
            finally:
                os.umask(old)
            if group is not None:
                os.chown(path, -1, group)
            path.chmod(mode | 0o060 if group is not None else mode)
            listener.listen(64)
        except OSError as error:
            listener.close()
            raise DaemonError(f"cannot listen at {path}: {error.strerror}; choose another 'pfkey_socket'") from error
        self._listeners[listener.fileno()] = (listener, dialect, group, path)
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """The descriptor to watch for reading."""
        return self._epoll.fileno()

    def on_readable(self) -> None:
        """Do all that is ready now: accept, read requests, answer, write on.  Never blocks."""
        for fd, events in self._epoll.poll(0, 256):
            if fd in self._listeners:
                self._accept(*self._listeners[fd][:3])
                continue
            connection = self._connections.get(fd)
            if connection is None:
                continue
            if events & select.EPOLLOUT:
                self._pump(connection)
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and fd in self._connections:
                self._read(connection, events)

    def send(self, datagrams: Datagrams) -> None:
        """Send what the server's event methods (acquire, expire, …) returned."""
        touched = set()
        for client_id, data in datagrams:
            connection = self._by_id.get(client_id)
            if connection is None:
                continue
            if connection.queued + len(data) > _QUEUE_LIMIT:
                connection.dropped += 1
                self.dropped += 1
                continue
            connection.queue.append(data)
            connection.queued += len(data)
            touched.add(connection)
        for connection in touched:
            self._pump(connection)

    def close(self) -> None:
        """Close everything and remove the socket files."""
        for connection in list(self._connections.values()):
            self._close(connection)
        for listener, _, _, path in self._listeners.values():
            listener.close()
            path.unlink(missing_ok=True)
        self._listeners.clear()
        self._epoll.close()

    @property
    def clients(self) -> Iterable[tuple[int, int, int, int]]:
        """(client id, pid, uid, messages dropped) of each connection, for status reports."""
        return [(each.id, each.pid, each.uid, each.dropped) for each in self._connections.values()]

    # -- one connection --------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket, dialect: Dialect, group: int | None) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            accepted.setblocking(False)
            pid, uid, _ = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            # The file's mode has let the peer in; without a group nobody but root and ourselves belongs here,
            # whatever somebody did to the mode.
            if (group is None and uid not in (0, os.geteuid())) or self._crowded(uid):
                accepted.close()
                continue
            self._last_id += 1
            connection = _Connection(accepted, self._last_id, pid, uid)
            self._connections[accepted.fileno()] = self._by_id[connection.id] = connection
            self.server.open(connection.id, privileged=uid == 0, dialect=dialect)
            self._epoll.register(accepted.fileno(), connection.interest)

    def _crowded(self, uid: int) -> bool:
        """No room for one more connection of this user."""
        users = [connection.uid for connection in self._connections.values()]
        return len(users) >= MAX_CLIENTS or (uid != 0 and users.count(uid) >= MAX_CLIENTS_USER)

    def _read(self, connection: _Connection, events: int) -> None:
        replies: Datagrams = []
        closed = False
        for _ in range(_TURN):
            try:
                length = connection.socket.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError:
                closed = True
                break
            if not length and events & (select.EPOLLHUP | select.EPOLLERR):
                closed = True
                break
            if not length:
                # An empty datagram looks like the end; a peer that is still there hangs up with EPOLLHUP later.
                closed = _hung_up(connection.socket)
                if closed:
                    break
            replies += self.server.handle(connection.id, bytes(memoryview(self._buffer)[:length]))
            if connection.queued + sum(len(data) for _, data in replies[-2:]) > _QUEUE_LOW:
                break
        if replies:
            if self.barrier is None:
                self.send(replies)
            else:
                self.barrier(lambda: self.send(replies))
        if closed:
            self._close(connection)
        else:
            self._pump(connection)

    def _pump(self, connection: _Connection) -> None:
        """Write the queue, then the next part of a dump, until the socket is full or the turn is over."""
        if connection.socket.fileno() < 0:
            return
        turns = _TURN
        while turns:
            if not connection.queue:
                for data in self.server.more(connection.id, 16):
                    connection.queue.append(data)
                    connection.queued += len(data)
                if not connection.queue:
                    break
            try:
                connection.socket.send(connection.queue[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    self._close(connection)
                    return
                # Longer than the peer's socket takes at all: it would stand in the way of everything behind it.
                connection.dropped += 1
                self.dropped += 1
            connection.queued -= len(connection.queue.popleft())
            turns -= 1
        self._watch(connection)

    def _watch(self, connection: _Connection) -> None:
        interest = select.EPOLLIN if connection.queued <= _QUEUE_LOW else 0
        if connection.queue or self.server.dumping(connection.id):
            interest |= select.EPOLLOUT
        if interest != connection.interest:
            connection.interest = interest
            self._epoll.modify(connection.socket.fileno(), interest)

    def _close(self, connection: _Connection) -> None:
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is None:
            return
        del self._by_id[connection.id]
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        connection.socket.close()
        self.server.close(connection.id)


def _hung_up(peer: socket.socket) -> bool:
    poll = select.poll()
    poll.register(peer.fileno(), select.POLLIN | select.POLLRDHUP)
    return any(events & (select.POLLHUP | select.POLLRDHUP) for _, events in poll.poll(0))


def _unlink_stale(path: Path) -> None:
    """Remove the socket file of a daemon that is gone; leave one that answers, and anything that is no socket."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise DaemonError(f"another daemon answers at {path}: stop it, or choose another 'pfkey_socket'")
