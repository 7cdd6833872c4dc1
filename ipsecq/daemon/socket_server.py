"""Where programs ask for policies of their sockets: a SOCK_SEQPACKET Unix socket that is open to everybody.

A request is one datagram of JSON with the socket itself beside it (SCM_RIGHTS), the answer one datagram:

    {"op": "set", "policy": "out ipsec esp/transport//require"}     {"errno": 0}
    {"op": "get", "direction": "out"}                               {"errno": 0, "policy": "out entrust"}
                                                                    {"errno": 13, "error": "bypass needs privilege: …"}

Who asks is SO_PEERCRED's user.  Root and the daemon's own user are privileged; so is who can show a second descriptor,
a Unix datagram socket with SO_DEBUG set, which only CAP_NET_ADMIN can do.  (What /proc says of a process id proves nothing:
by now it may be a setuid program.)  ``"privileged": false`` gives that up, and root may name another ``"user"`` for
whom it asks, as ``ipsecq exec`` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections import Counter
from pathlib import Path
from typing import Any, Final

from ipsecq.daemon.control import peer_user
from ipsecq.daemon.log import LOGGER
from ipsecq.daemon.sockets import SocketPolicies
from ipsecq.errors import DaemonError, IpsecqError, SpdError
from ipsecq.numbers import Direction

log: Final = logging.getLogger(f"{LOGGER}.sockets")

MAX_CLIENTS: Final = 256
MAX_CLIENTS_OF_USER: Final = 32
MAX_REQUEST: Final = 4096
IDLE_SECONDS: Final = 30.0
_DESCRIPTORS: Final = 2
_SPACE: Final = socket.CMSG_SPACE(_DESCRIPTORS * struct.calcsize("i"))


class SocketServer:
    """The daemon's end.  Nothing here blocks; one request of a client at a time, bounded clients for each user."""

    def __init__(self, path: Path, policies: SocketPolicies) -> None:
        self._path, self._policies = path, policies
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._clients: dict[asyncio.Task[None], int] = {}

    def start(self) -> None:
        """Listen.  DaemonError; the caller holds the lock of the run directory, so an old socket is nobody's."""
        try:
            self._path.unlink(missing_ok=True)
            self._listener.bind(str(self._path))
            self._path.chmod(0o666)
            self._listener.listen(64)
        except OSError as error:
            raise DaemonError(f"socket {self._path}: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop, and remove the socket."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        self._path.unlink(missing_ok=True)
        tasks = list(self._clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        user = peer_user(client)
        users = Counter(self._clients.values())
        if len(self._clients) >= MAX_CLIENTS or (user and users[user] >= MAX_CLIENTS_OF_USER):
            with contextlib.suppress(OSError):
                client.send(_answer(errno.ENOBUFS, error="too many programs ask at the same time: try again"))
            client.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(client, user))
        self._clients[task] = user
        task.add_done_callback(self._clients.pop)

    async def _serve(self, client: socket.socket, user: int) -> None:
        with client, contextlib.suppress(OSError, TimeoutError):
            while True:
                await asyncio.wait_for(_readable(client), IDLE_SECONDS)
                data, ancillary, _, _ = client.recvmsg(MAX_REQUEST + 1, _SPACE, socket.MSG_CMSG_CLOEXEC)
                descriptors = _descriptors(ancillary)
                try:
                    if not data:
                        return
                    answer = await self._handle(data, descriptors, user)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
                client.send(answer)

    async def _handle(self, data: bytes, descriptors: list[int], user: int) -> bytes:
        try:
            request = _request(data, descriptors)
            privileged = (user in (0, os.geteuid()) or _proven(descriptors)) and request.get("privileged") is not False
            owner = request.get("user", user)
            if owner != user and (user != 0 or type(owner) is not int):
                raise SpdError("only root asks for others", errno.EPERM)
            with _socket(descriptors[0]) as sock:
                if request["op"] == "get":
                    return _answer(0, policy=self._policies.get(sock, Direction[str(request["direction"]).upper()]))
                await self._policies.set(sock, str(request["policy"]), privileged=privileged, user=owner)
            return _answer(0)
        except SpdError as error:
            return _answer(error.errno, error=str(error))
        except (KeyError, TypeError, ValueError):
            return _answer(errno.EINVAL, error="a request that makes no sense: are two versions mixed?")
        except IpsecqError as error:
            log.error("%s", error)  # the message says it all
            return _answer(errno.ENOBUFS, error="the policy could not be put into force: the daemon's log says why")
        except OSError as error:
            return _answer(error.errno or errno.EINVAL, error=str(error.strerror))


def _request(data: bytes, descriptors: list[int]) -> dict[str, Any]:
    request = json.loads(data) if len(data) <= MAX_REQUEST else None
    if not isinstance(request, dict) or request.get("op") not in ("set", "get"):
        raise ValueError("request")
    if not descriptors:
        raise SpdError("a request without a socket", errno.EBADF)
    return request


@contextlib.contextmanager
def _socket(descriptor: int) -> Any:
    """The socket behind a descriptor, which stays open."""
    try:
        sock = socket.socket(fileno=os.dup(descriptor))
    except OSError as error:
        raise SpdError(f"no socket: {error.strerror}", error.errno or errno.ENOTSOCK) from None
    with sock:
        yield sock


def _proven(descriptors: list[int]) -> bool:
    """A second descriptor shows CAP_NET_ADMIN."""
    if len(descriptors) < _DESCRIPTORS:
        return False
    try:
        with _socket(descriptors[1]) as proof:
            return bool(
                proof.family == socket.AF_UNIX
                and proof.type == socket.SOCK_DGRAM
                and proof.getsockopt(socket.SOL_SOCKET, socket.SO_DEBUG)
            )
    except (SpdError, OSError):
        return False


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found += [number for (number,) in struct.iter_unpack("i", data[: len(data) & ~3])]
    return found


def _answer(number: int, **values: str) -> bytes:
    return json.dumps({"errno": number, **values}).encode()


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock.fileno(), tell)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
