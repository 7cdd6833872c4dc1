"""A UDP socket that counts what reached it, by the kernel's word: as many as the machine can carry."""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType
from typing import Final

from ipsecq.lab.netns import Namespace

_WAITING: Final = 4096
"""More than wait in a socket's buffer; a flood must not keep :attr:`Sink.arrived` from its end."""


class Sink:
    """A socket that nobody reads: its buffer is full after some hundred datagrams, and each further one is counted."""

    def __init__(self, space: Namespace, address: str, port: int) -> None:
        self._space = space
        self._socket = space.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, port))
        self._socket.setblocking(False)
        self._before = self._counted()

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def arrived(self) -> int:
        """Datagrams that have reached a socket of the namespace since this one is open."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_WAITING):  # InDatagrams counts when they are read
                self._socket.recv(1)
        return self._counted() - self._before

    def _counted(self) -> int:
        text = self._space.run("cat", "/proc/net/snmp").stdout
        names, values = (line.split() for line in text.splitlines() if line.startswith("Udp:"))
        counters = dict(zip(names, values, strict=True))
        return int(counters["InDatagrams"]) + int(counters["RcvbufErrors"])
