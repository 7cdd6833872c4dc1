"""Whole IP datagrams onto the network, through raw sockets that never wait.

IPv4 leaves by a raw socket with IP_HDRINCL (raw(7): the kernel writes the checksum, and the identification where it is
0), IPv6 by one with IPV6_HDRINCL, which IPPROTO_RAW implies.  Both carry the mark DONE, so our own rules leave alone
what was processed; every other rule of netfilter's output and postrouting hooks sees the datagrams as usual.  What the
kernel knows of the path to an IPv4 peer does not count here (IP_PMTUDISC_PROBE): whoever made a datagram has asked, and
believes no less than ``min_pmtu``.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import sys
from typing import Final

from ipsecq.datapath.mmsg import SendVector

SO_MARK: Final = 36
SO_SNDBUFFORCE: Final = 32
SEND_BUFFER: Final = 16 << 20
IPV6_HDRINCL: Final = 36
IP_MTU_DISCOVER: Final = 10
IP_PMTUDISC_PROBE: Final = 3
"""Only the device's MTU counts, not what the kernel knows of the path; DF is set where the kernel makes the header."""
IP_PMTUDISC_OMIT: Final = 5
"""The same without DF."""
_FEW: Final = 6
"""Up to so many datagrams a loop of sendto is cheaper (3.6 µs each, of 1400 octets) than filling a vector (3 µs once,
and 3.2 each); with 64 datagrams sendmmsg saves a tenth.  The rest is the kernel's way to the device."""

_MAX_NAMES: Final = 4096
"""Destinations whose socket address is kept; the table starts anew when it is full."""


class RawOutput:
    """Sends datagrams of both families.  What could not go is counted by errno and never waits.

    ``too_big`` holds the datagrams that the last :meth:`send` could not send because they are longer than the
    device's MTU (EMSGSIZE): the caller fragments them.  ``errors`` counts the rest by errno: EAGAIN and ENOBUFS are
    overload, EPERM is a netfilter rule of the operator, ENETUNREACH and EHOSTUNREACH a missing route, EDESTADDRREQ an
    IPv6 link-local destination when ``link_scope`` is 0.
    """

    def __init__(self, mark_done: int, *, link_scope: int = 0) -> None:
        """Open the sockets in this network namespace.  ``link_scope``: interface index for link-local destinations."""
        self.too_big: list[bytes] = []
        self.errors: dict[int, int] = {}
        self._scope = link_scope
        self._sockets = [_raw(socket.AF_INET, mark_done), _raw(socket.AF_INET6, mark_done)]
        self._vector = SendVector()
        self._texts: dict[bytes, tuple[str, int]] = {}
        self._names4 = _Names(socket.AF_INET, 0)
        self._names6 = _Names(socket.AF_INET6, link_scope)

    def send(self, datagrams: list[bytes]) -> int:
        """Send all; returns how many the kernel took.  Order is kept within a family."""
        if self.too_big:
            self.too_big = []
        if len(datagrams) <= _FEW:
            return self._send_few(datagrams)
        version4 = [d for d in datagrams if d[0] < 0x60]
        if len(version4) == len(datagrams):
            return self._send4(datagrams)
        return self._send4(version4) + self._send6([d for d in datagrams if d[0] >= 0x60])

    def _send_few(self, datagrams: list[bytes]) -> int:
        sent = 0
        for datagram in datagrams:
            which = datagram[0] >= 0x60
            dst = datagram[24:40] if which else datagram[16:20]
            name = self._texts.get(dst)
            try:
                self._sockets[which].sendto(datagram, name or self._text(dst))
                sent += 1
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    self.too_big.append(datagram)
                else:
                    self._count(error.errno or 0, 1)
        return sent

    def _text(self, dst: bytes) -> tuple[str, int] | tuple[str, int, int, int]:
        """A socket address as Python takes it; OSError (EDESTADDRREQ) for a link-local one without scope."""
        if _link_local(dst):
            if not self._scope:
                raise OSError(errno.EDESTADDRREQ, "link-local destination without an interface")
            return socket.inet_ntop(socket.AF_INET6, dst), 0, 0, self._scope
        if len(self._texts) >= _MAX_NAMES:
            self._texts.clear()
        family = socket.AF_INET if len(dst) == 4 else socket.AF_INET6
        name = self._texts[dst] = (socket.inet_ntop(family, dst), 0)
        return name

    def _send4(self, datagrams: list[bytes]) -> int:
        names = self._names4
        sent = 0
        for start in range(0, len(datagrams), self._vector.count):
            part = datagrams[start : start + self._vector.count]
            names.trim()
            # A dict with __missing__: one look-up a datagram, a sockaddr is made for each new destination only.
            self._vector.load(part, [names[d[16:20]] for d in part], 16)
            sent += self._run(self._sockets[0].fileno(), part)
        return sent

    def _send6(self, datagrams: list[bytes]) -> int:
        names = self._names6
        if not self._scope:
            reachable = [d for d in datagrams if not _link_local(d[24:40])]
            self._count(errno.EDESTADDRREQ, len(datagrams) - len(reachable))
            datagrams = reachable
        sent = 0
        for start in range(0, len(datagrams), self._vector.count):
            part = datagrams[start : start + self._vector.count]
            names.trim()
            self._vector.load(part, [names[d[24:40]] for d in part], 28)
            sent += self._run(self._sockets[1].fileno(), part)
        return sent

    def descriptor(self, family: socket.AddressFamily) -> int:
        """The raw socket of a family."""
        return self._sockets[family == socket.AF_INET6].fileno()

    def _run(self, fd: int, datagrams: list[bytes]) -> int:
        """Send what the vector holds; a datagram that fails is counted and the next one tried."""
        first, total, sent = 0, len(datagrams), 0
        while first < total:
            result = self._vector.send(fd, first, total)
            if result > 0:
                first += result
                sent += result
            elif result == -errno.EMSGSIZE:
                self.too_big.append(datagrams[first])
                first += 1
            elif result == -errno.EAGAIN:
                # The socket buffer is full and stays so for a while: a drop now beats a queue here.
                self._count(errno.EAGAIN, total - first)
                break
            elif result != -errno.EINTR:
                self._count(-result, 1)
                first += 1
        return sent

    def _count(self, number: int, datagrams: int) -> None:
        if datagrams:
            self.errors[number] = self.errors.get(number, 0) + datagrams

    def close(self) -> None:
        """Close both sockets."""
        for each in self._sockets:
            each.close()


class _Names(dict[bytes, int]):
    """Packed address to the address in memory of its sockaddr."""

    def __init__(self, family: int, scope: int) -> None:
        super().__init__()
        self._family, self._scope = family, scope
        # The kernel reads these by address: they live until :meth:`trim`, which nobody calls between load and send.
        self._kept: list[ctypes.Array[ctypes.c_char]] = []

    def trim(self) -> None:
        """Start anew when there are too many."""
        if len(self._kept) >= _MAX_NAMES:
            self.clear()
            self._kept.clear()

    def __missing__(self, packed: bytes) -> int:
        if self._family == socket.AF_INET:
            octets = self._family.to_bytes(2, sys.byteorder) + bytes(2) + packed + bytes(8)
        else:
            scope = (self._scope if _link_local(packed) else 0).to_bytes(4, sys.byteorder)
            octets = self._family.to_bytes(2, sys.byteorder) + bytes(6) + packed + scope
        buffer = ctypes.create_string_buffer(octets, len(octets))
        self._kept.append(buffer)
        address = ctypes.addressof(buffer)
        self[packed] = address
        return address


def _link_local(address: bytes) -> bool:
    """True for fe80::/10."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def _raw(family: int, mark: int) -> socket.socket:
    raw = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    try:
        raw.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
    except OSError:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if family == socket.AF_INET:
        raw.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        raw.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
    else:
        raw.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
    raw.setblocking(False)
    return raw
