"""sock_diag(7): which mark the socket has that gets a packet, and which marks any socket of this namespace has.

Needs CAP_NET_ADMIN: the kernel shows marks to nobody else.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Final

from ipsecq.netfilter.links import is_local
from ipsecq.netlink import NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR, attribute, attributes, error_number, message, messages
from ipsecq.numbers import IPPROTO_TCP, IPPROTO_UDP

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_QUERY: Final = struct.Struct("=BBBBIHH16s16sIII")
_ANSWER_SIZE: Final = 72
"""``struct inet_diag_msg``; attributes follow."""
_BYTECODE: Final = 1
_MARK: Final = 15
_ALL_STATES: Final = 0xFFFFFFFF
_NO_COOKIE: Final = 0xFFFFFFFF
_BUFFER: Final = 1 << 16
_TIMEOUT: Final = 1.0
LOCAL_SECONDS: Final = 2.0
"""For how long an address is believed to be ours, or not."""
_MAX_LOCAL: Final = 4096


class SockDiag:
    """One netlink socket in the network namespace of the thread that makes it.  OSError where there is no sock_diag."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self.socket.settimeout(_TIMEOUT)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def mark_of(self, src: bytes, dst: bytes, protocol: int, sport: int, dport: int, device: int = 0) -> int:
        """The whole mark of the socket that gets a packet of TCP or UDP from ``src`` to ``dst``; 0 without one.

        ``device`` is the index of the device on which the packet arrives, for sockets that are bound to one.  OSError
        when the kernel does not answer.
        """
        family = socket.AF_INET if len(src) == 4 else socket.AF_INET6
        near, far = (dst, dport), (src, sport)
        if protocol == IPPROTO_UDP:
            near, far = far, near  # "src and dst are swapped for historical reasons": udp_diag looks as the packet does
        query = _QUERY.pack(
            family, protocol, 0, 0, _ALL_STATES, socket.htons(near[1]), socket.htons(far[1]),
            near[0].ljust(16, b"\0"), far[0].ljust(16, b"\0"), device, _NO_COOKIE, _NO_COOKIE,
        )  # fmt: skip
        try:
            for answer in self._ask(query):
                return _mark(answer)
        except FileNotFoundError:  # ENOENT: nobody gets it
            return 0
        return 0

    def marks(self, mask: int) -> set[int]:
        """The values of the bits in ``mask`` that sockets of TCP and UDP carry now, those in TIME_WAIT too; not 0.

        Sockets that are neither bound nor connected are not among them.  Raises OSError.
        """
        # Program: if mark & mask == 0 go on to a jump that leads past the end (refused), else to the end (taken).
        program = struct.pack("=BBHIIBBH", 10, 12, 16, 0, mask, 1, 4, 8)
        bytecode = attribute(_BYTECODE, program)
        found: set[int] = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            for protocol in (IPPROTO_TCP, IPPROTO_UDP):
                query = _QUERY.pack(family, protocol, 0, 0, _ALL_STATES, 0, 0, bytes(16), bytes(16), 0, 0, 0)
                found.update(_mark(answer) & mask for answer in self._ask(query + bytecode, NLM_F_DUMP))
        return found

    def _ask(self, query: bytes, dump: int = 0) -> Iterator[bytes]:
        """``inet_diag_msg`` and attributes of each answer.  Raises OSError."""
        self._sequence += 1
        self.socket.send(message(_SOCK_DIAG_BY_FAMILY, dump, self._sequence, query))
        while True:
            for kind, sequence, body in messages(self.socket.recv(_BUFFER)):
                if sequence != self._sequence:
                    continue  # left over from a question that was given up
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    number = error_number(body)
                    if number == errno.ENOENT and dump:
                        return  # no such protocol here, so no such sockets
                    raise OSError(number, "sock_diag")
                yield body
                if not dump:
                    return


def _mark(answer: bytes) -> int:
    return int.from_bytes(dict(attributes(answer[_ANSWER_SIZE:])).get(_MARK, b""), sys.byteorder)


class SocketLookup:
    """:data:`ipsecq.engine.tables.SocketOf` of a worker."""

    def __init__(self, mask: int, device: str) -> None:
        """``mask``: the bits that name policies; ``device``: on which decapsulated packets arrive."""
        self._mask = mask
        self._device = device
        self._index = 0
        self._diag: SockDiag | None = None
        self._local: dict[bytes, tuple[float, bool]] = {}

    def __call__(self, src: bytes, dst: bytes, protocol: int, sport: int, dport: int) -> int:
        """See the class."""
        if not self._is_local(dst):
            return 0
        try:
            if self._diag is None:
                self._diag = SockDiag()
                self._index = socket.if_nametoindex(self._device)
            return self._diag.mark_of(src, dst, protocol, sport, dport, self._index) & self._mask
        except OSError:
            return -1

    def close(self) -> None:
        """Close the socket, if there is one."""
        if self._diag is not None:
            self._diag.close()

    def _is_local(self, address: bytes) -> bool:
        """Listeners on any address would be found for packets that only pass through."""
        now = time.monotonic()
        known = self._local.get(address)
        if known is not None and now < known[0]:
            return known[1]
        local = is_local(address)
        if len(self._local) >= _MAX_LOCAL:
            self._local.clear()
        self._local[address] = now + LOCAL_SECONDS, local
        return local
