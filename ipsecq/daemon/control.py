"""The control socket: one JSON object asks, one JSON object answers, over a Unix stream socket.

    {"command": "sysctl-set", "values": {"net.inet.ipsec.dfbit": "1"}}
    {"ok": true, "result": …}          {"ok": false, "error": "…", "code": "sysctl", "exit_status": 1}

A command may answer with a stream: ``{"ok": true, "stream": true}``, then one JSON object a line until one end closes.

Who may: root and the daemon's own user everything, others what is in :data:`READ_ONLY`; the socket's mode lets nobody
in but its owner and the configured group, and SO_PEERCRED says who came.  Clients, sizes and waits are bounded, so a
stuck client holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

from ipsecq.errors import DaemonError, IpsecqError

MAX_CLIENTS: Final = 16
MAX_REQUEST: Final = 1 << 16
MAX_ANSWER: Final = 1 << 26
PATIENCE: Final = 10.0
"""Seconds that a client has to say what it wants, and then to take the answer."""

READER_PATIENCE: Final = 10.0
"""Seconds that the reader of a stream may leave it unread."""

REFUSAL_PATIENCE: Final = 1.0
"""Seconds that a client for whom there is no place has to say what it wants, before it is refused."""

MAX_STREAMS: Final = 8
"""Clients that read a stream; the other places stay free for questions."""

READ_ONLY: Final = frozenset({"status", "interface", "stat", "monitor", "sample", "sysctl-get", "version", "explain"})

Handler = Callable[[str, dict[str, Any]], Awaitable[object]]
"""``handler(command, request) -> result``, something that JSON can say, or a :class:`Stream`; IpsecqError for the
client's eyes."""


@runtime_checkable
class Stream(Protocol):
    """An answer that goes on."""

    async def take(self) -> list[dict[str, Any]]:
        """The next objects, at least one; waits for it."""

    def close(self) -> None:
        """The client is gone."""


class ControlServer:
    """The daemon's end."""

    def __init__(self, path: Path, group: str, handler: Handler) -> None:
        self._path = path
        self._group = group
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._streams = 0
        self._closing = False

    async def start(self) -> None:
        """Listen.  Raises DaemonError; the caller holds the lock of the run directory, so an old socket is nobody's."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._path.unlink(missing_ok=True)
            sock.bind(str(self._path))
            if self._group:
                os.chown(self._path, -1, grp.getgrnam(self._group).gr_gid)
                self._path.chmod(0o660)
        except KeyError:
            raise DaemonError(f"[daemon] group: no group {self._group!r} on this system") from None
        except OSError as error:
            raise DaemonError(f"control socket {self._path}: {error.strerror}") from error
        finally:
            os.umask(before)
        self._server = await asyncio.start_unix_server(self._client, sock=sock, limit=MAX_REQUEST)

    async def close(self) -> None:
        """Stop listening, break off with the clients that are still there, and remove the socket."""
        self._closing = True
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio made one for this client
        self._clients.add(task)
        try:
            if len(self._clients) > MAX_CLIENTS:
                answer: bytes | Stream = _refusal(DaemonError("the control socket is busy: try again"))
                # A socket that closes with something unread in it takes the answer away from its client.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFUSAL_PATIENCE):
                        await reader.readline()
            else:
                answer = await self._answer(reader, writer)
            if not isinstance(answer, bytes):
                await self._stream(answer, reader, writer)
                return
            writer.write(answer)
            # Not wait_for: it makes a task, and one that never begins complains when the loop ends with the daemon.
            async with asyncio.timeout(PATIENCE):
                await writer.drain()
        except (OSError, TimeoutError, ValueError):
            # Gone, too slow, or a line without end: nothing is owed to it.
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
            # Python 3.11's streams take the exception of a task that was cancelled, and have it logged as a fault.
            if not self._closing:
                raise
        finally:
            self._clients.discard(task)
            writer.close()

    async def _stream(self, stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the client goes, says anything, or does not read for :data:`READER_PATIENCE`."""
        self._streams += 1
        gone = asyncio.ensure_future(reader.read(1))
        part: asyncio.Future[list[dict[str, Any]]] | None = None
        try:
            writer.write(b'{"ok": true, "stream": true}\n')
            while not gone.done():
                part = asyncio.ensure_future(stream.take())
                await asyncio.wait((gone, part), return_when=asyncio.FIRST_COMPLETED)
                if not part.done():
                    return
                writer.write(b"".join(json.dumps(each).encode() + b"\n" for each in part.result()))
                async with asyncio.timeout(READER_PATIENCE):
                    await writer.drain()
        finally:
            self._streams -= 1
            stream.close()
            begun = [each for each in (gone, part) if each is not None]
            for each in begun:
                each.cancel()
            # Those that are done, too: a reset connection that nobody hears of would be logged as a fault.
            await asyncio.gather(*begun, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | Stream:
        async with asyncio.timeout(PATIENCE):
            line = await reader.readline()
        try:
            request = json.loads(line)
            command = str(request["command"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refusal(DaemonError('expected one JSON object with "command"'))
        user = peer_user(writer.get_extra_info("socket"))
        if command not in READ_ONLY and user not in (0, os.geteuid()):
            return _refusal(DaemonError(f"{command}: only root may"))
        try:
            result = await self._handler(command, request)
            if isinstance(result, Stream):
                if self._streams < MAX_STREAMS:
                    return result
                result.close()
                raise DaemonError(f"{command}: {MAX_STREAMS} clients read already: end one of them")
            answer = json.dumps({"ok": True, "result": result}).encode() + b"\n"
        except IpsecqError as error:
            return _refusal(error)
        if len(answer) > MAX_ANSWER:
            return _refusal(DaemonError("the answer is too long: ask for less with limit and offset"))
        return answer


def _refusal(error: IpsecqError) -> bytes:
    answer = {"ok": False, "error": str(error), "code": error.code, "exit_status": error.exit_status}
    return json.dumps(answer).encode() + b"\n"


def peer_user(sock: Any) -> int:
    """User id of whoever connected (SO_PEERCRED, unix(7))."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


class ControlError(IpsecqError):
    """What the daemon answered, with its own code and exit status."""

    def __init__(self, message: str, code: str, exit_status: int) -> None:
        super().__init__(message)
        self.code, self.exit_status = code, exit_status


def ask(path: Path, command: str, *, timeout: float = 60.0, **arguments: object) -> Any:
    """A command's end: ask the running daemon.

    Raises DaemonError when it can't be reached, ControlError when it refuses.
    """
    octets = bytearray()
    with _connection(path, command, timeout, arguments) as sock:
        while chunk := sock.recv(1 << 18):
            octets += chunk
    return _result(path, octets)


def follow(path: Path, command: str, *, writing_to: int = -1, **arguments: object) -> Iterator[dict[str, Any]]:
    """Ask for a stream and iterate over its objects.

    ``writing_to``: the descriptor that they are printed to: when its reader has gone, nobody waits for the next one.
    Raises as :func:`ask` does, DaemonError also when the daemon ends or drops a reader that is too slow, and
    BrokenPipeError when the reader of ``writing_to`` has gone.
    """
    try:
        with _connection(path, command, 60.0, arguments) as sock:
            lines = _lines(sock, writing_to)
            first = next(lines, b"")
            if b'"stream"' not in first:
                _result(path, first)
            sock.settimeout(None)
            for line in lines:
                yield json.loads(line)
    except _ReaderGone:
        raise BrokenPipeError from None
    raise DaemonError(f"{path}: the daemon has ended, or dropped us as too slow")


class _ReaderGone(Exception):  # noqa: N818  # no error of the connection
    """Nobody reads any more what is printed."""


def _lines(sock: socket.socket, writing_to: int) -> Iterator[bytes]:
    """Lines until the other end closes.  TimeoutError; _ReaderGone by ``writing_to``."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if writing_to >= 0:
        poll.register(writing_to, 0)  # POLLERR and POLLHUP come unasked
    rest = b""
    while True:
        timeout = sock.gettimeout()
        ready = dict(poll.poll(None if timeout is None else timeout * 1000))
        if writing_to in ready:
            raise _ReaderGone
        if not ready:
            raise TimeoutError
        octets = sock.recv(1 << 16)
        if not octets:
            return
        *whole, rest = (rest + octets).split(b"\n")
        yield from whole


@contextlib.contextmanager
def _connection(path: Path, command: str, timeout: float, arguments: dict[str, object]) -> Iterator[socket.socket]:
    """A socket on which the question was asked; whatever goes wrong with it is a DaemonError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            yield sock
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonError(f"no daemon answers at {path}: is ipsecq running (systemctl status ipsecq)?") from None
        except PermissionError:
            raise DaemonError(f"{path}: permission denied: be root or of the group in [daemon] group") from None
        except OSError as error:
            raise DaemonError(f"{path}: {error.strerror or 'the daemon did not answer in time'}") from error


def _result(path: Path, octets: bytes | bytearray) -> Any:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        answer = json.loads(octets)
        if answer["ok"]:
            return answer["result"]
        raise ControlError(str(answer["error"]), str(answer["code"]), int(answer["exit_status"]))
    raise DaemonError(f"{path}: the daemon broke off; its log says why")
