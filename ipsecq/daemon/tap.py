"""`ipsecq tap`: a socket of its own, over which root gets a descriptor that the workers write packets to.

The client sends one JSON object over a SOCK_SEQPACKET socket, and gets one back, with a descriptor (SCM_RIGHTS) when it
is not refused; what comes through that is :mod:`ipsecq.pcap.enc`'s.  The capture lasts until the client closes the
connection.  Packets are inner traffic in clear, so nobody but root and the daemon's own user may.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon.control import peer_user
from ipsecq.daemon.messages import Operation
from ipsecq.daemon.pool import WorkerPool
from ipsecq.daemon.taprequest import TapRequest
from ipsecq.errors import DaemonError, IpsecqError
from ipsecq.sysctl import Sysctl

MAX_TAPS: Final = 4
MAX_REQUEST: Final = 1 << 16
BUFFER: Final = 8 << 20
"""Octets that may wait for a reader, all workers together: some milliseconds of a full line."""
SO_SNDBUFFORCE: Final = 32
ATTACH_SECONDS: Final = 2.0
"""How long a client waits for workers that are late: one that starts will join."""


@dataclass(slots=True, eq=False)
class _Client:
    sock: socket.socket
    number: int = 0
    request: TapRequest | None = None


class TapServer:
    """The supervisor's end.  All methods belong to its event loop."""

    def __init__(
        self, path: Path, pool: WorkerPool, sysctl: Sysctl, spawn: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._path, self._pool, self._sysctl, self._spawn = path, pool, sysctl, spawn
        self._clients: set[_Client] = set()
        self._serial = 0
        self._mirror = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)

    def start(self) -> None:
        """Listen; the caller holds the lock of the run directory, so an old socket is nobody's.  DaemonError."""
        before = os.umask(0o177)
        try:
            self._path.unlink(missing_ok=True)
            self._listener.bind(str(self._path))
            self._listener.listen(MAX_TAPS)
        except OSError as error:
            raise DaemonError(f"tap socket {self._path}: {error.strerror}") from error
        finally:
            os.umask(before)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._connected)

    def close(self) -> None:
        """End all captures."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for client in list(self._clients):
            self._end(client)

    def operations(self) -> list[Operation]:
        """For a worker that starts: what is being captured."""
        running = [("tap_attach", client.number, client.request) for client in self._clients if client.request]
        return [*running, ("mirror", True)] if self._mirror else [*running]

    def look(self, device: str) -> None:
        """Does somebody capture on the enc device?  Then, and only then, workers mirror outbound packets there."""
        listening = is_captured(device)
        if listening != self._mirror:
            self._mirror = listening
            self._pool.broadcast([("mirror", listening)])

    def _connected(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            sock.setblocking(False)
            if len(self._clients) >= MAX_TAPS:
                _answer(sock, DaemonError(f"{MAX_TAPS} captures are running: end one"))
                sock.close()
                return
            client = _Client(sock)
            self._clients.add(client)
            asyncio.get_running_loop().add_reader(sock.fileno(), self._readable, client)

    def _readable(self, client: _Client) -> None:
        try:
            octets = client.sock.recv(MAX_REQUEST)
        except OSError:
            octets = b""
        if not octets or client.request is not None:
            self._end(client)
            return
        try:
            if peer_user(client.sock) not in (0, os.geteuid()):
                raise DaemonError("tap: only root may")
            try:
                document = json.loads(octets)
            except (ValueError, RecursionError):
                raise DaemonError("expected one JSON object") from None
            client.request = TapRequest.parse(document, self._sysctl)
        except IpsecqError as error:
            _answer(client.sock, error)
            self._end(client)
            return
        self._begin(client)

    def _begin(self, client: _Client) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                ours.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER)
            except OSError:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            self._serial += 1
            client.number = self._serial
            self._pool.share(client.number, ours.fileno())
        generation = self._pool.broadcast([("tap_attach", client.number, client.request)])
        self._spawn(self._answer_when_attached(client, theirs, generation))

    async def _answer_when_attached(self, client: _Client, theirs: socket.socket, generation: int) -> None:
        """Who has an answer misses no packet from then on."""
        with theirs:
            with contextlib.suppress(DaemonError):
                await self._pool.settled(generation, ATTACH_SECONDS)
            answer = json.dumps({"ok": True, "workers": len(self._pool.workers)}).encode()
            try:
                socket.send_fds(client.sock, [answer], [theirs.fileno()])
            except OSError:
                if client in self._clients:
                    self._end(client)

    def _end(self, client: _Client) -> None:
        self._clients.discard(client)
        asyncio.get_running_loop().remove_reader(client.sock.fileno())
        client.sock.close()
        if client.number:
            self._pool.unshare(client.number)
            self._pool.broadcast([("tap_detach", client.number)])


def _answer(sock: socket.socket, error: IpsecqError) -> None:
    with contextlib.suppress(OSError):
        sock.send(json.dumps({"ok": False, "error": str(error)}).encode())


def is_captured(device: str) -> bool:
    """True while a packet socket that receives (protocol not 0, packet(7)) is bound to the device."""
    try:
        index = str(socket.if_nametoindex(device))
        with Path("/proc/thread-self/net/packet").open() as table:
            next(table)
            # sk RefCnt Type Proto Iface …
            return any((words := line.split())[4] == index and int(words[3], 16) != 0 for line in table)
    except (OSError, StopIteration, IndexError, ValueError):
        return False


class TapClient:
    """A command's end."""

    def __init__(self, path: Path, **request: Any) -> None:
        """Begin a capture.  Raises DaemonError when the daemon can't be reached or refuses."""
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._connection.settimeout(10.0)
        try:
            self._connection.connect(str(path))
            self._connection.send(json.dumps(request).encode())
            octets, descriptors, _, _ = socket.recv_fds(self._connection, MAX_REQUEST, 1)
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonError(f"no daemon answers at {path}: is ipsecq running (systemctl status ipsecq)?") from None
        except PermissionError:
            raise DaemonError(f"{path}: permission denied: only root may see inner traffic") from None
        except OSError as error:
            raise DaemonError(f"{path}: {error.strerror or 'the daemon did not answer in time'}") from error
        answer = json.loads(octets) if octets else {"ok": False, "error": "the daemon broke off; its log says why"}
        if not answer["ok"]:
            raise DaemonError(str(answer["error"]))
        self.packets = socket.socket(fileno=descriptors[0])
        """Messages of :mod:`ipsecq.pcap.enc`; an empty one is the end."""

    def close(self) -> None:
        """End the capture; what waits in ``packets`` can still be read."""
        self._connection.close()
