"""ESP in UDP, many datagrams in one system call (UDP_SEGMENT, Linux 4.18).

IKE daemons own the NAT-T port, so these sockets have ports of their own, and our table rewrites the source port of what
they send before connection tracking sees it (:func:`ipsecq.netfilter.compile.compile_ruleset`).  The supervisor opens
them, as the rules name their ports; all workers send through the same.  Nobody ever reads them.

The kernel fills in UDP's checksum, over IPv4, too; the datagrams that go one by one have none there, as RFC 3948 section
2.1 wishes.  Whoever opens ESP ignores it.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from ipsecq.datapath.output import (
    IP_MTU_DISCOVER,
    IP_PMTUDISC_OMIT,
    IP_PMTUDISC_PROBE,
    SEND_BUFFER,
    SO_MARK,
    SO_SNDBUFFORCE,
)
from ipsecq.engine.emit import Burst
from ipsecq.engine.headers import TUNNEL_TTL

SOL_UDP: Final = 17
UDP_SEGMENT: Final = 103
IP_PKTINFO: Final = 8
IPV6_FLOWINFO: Final = 11

_MAX_OPTIONS: Final = 1024
"""Sets of options that are kept ready."""

_LATER: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
"""The kernel has no room now: a drop beats a queue."""

Options = list[tuple[int, int, bytes]]


class UdpSocket(NamedTuple):
    """One of the sockets, as the supervisor describes it to its workers."""

    family: int
    df: bool
    descriptor: int
    port: int


class UdpSockets:
    """The supervisor's part: opens the sockets."""

    def __init__(self, mark_done: int, *, wanted: bool = True) -> None:
        """One for IPv4 with DF, one without, one for IPv6.

        ``sockets`` is empty where the kernel has no UDP_SEGMENT, or nobody has ``wanted`` them.
        """
        self._open: list[socket.socket] = []
        self.sockets: list[UdpSocket] = []
        self.problem = ""
        """Why there are none, in the kernel's words."""
        if not wanted:
            return
        try:
            for family, df in ((socket.AF_INET, False), (socket.AF_INET, True), (socket.AF_INET6, False)):
                one = _socket(family, df, mark_done)
                self._open.append(one)
                self.sockets.append(UdpSocket(family, df, one.fileno(), one.getsockname()[1]))
        except OSError as error:
            if not self.sockets or self.sockets[-1].family != socket.AF_INET:
                self.problem = error.strerror or str(error)
                self.close()  # no IPv6 is no reason

    @property
    def ports(self) -> tuple[int, ...]:
        """Their local ports."""
        return tuple(each.port for each in self.sockets)

    @property
    def descriptors(self) -> list[int]:
        """For workers to inherit."""
        return [each.descriptor for each in self.sockets]

    def close(self) -> None:
        """Close all."""
        for each in self._open:
            each.close()
        self._open.clear()
        self.sockets.clear()


def _socket(family: int, df: bool, mark: int) -> socket.socket:
    one = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        one.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        one.setsockopt(SOL_UDP, UDP_SEGMENT, 0)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
        try:
            one.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER)
        except OSError:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if family == socket.AF_INET:
            one.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TUNNEL_TTL)
            one.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE if df else IP_PMTUDISC_OMIT)
        else:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, TUNNEL_TTL)
        one.bind(("", 0))
    except BaseException:
        one.close()
        raise
    return one


def options(src: bytes, tos: int, flow_label: int, size: int) -> Options:
    """Control messages of a burst from ``src`` (cmsg(3)).

    In this order: size of the datagrams, TOS or traffic class, source, and the flow label if it is not 0.
    """
    made: Options = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    if len(src) == 4:
        made.append((socket.IPPROTO_IP, socket.IP_TOS, struct.pack("=i", tos)))
        made.append((socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, src, bytes(4))))
    else:
        made.append((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("=i", tos)))
        made.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", src, 0)))
        if flow_label:
            made.append((socket.IPPROTO_IPV6, IPV6_FLOWINFO, struct.pack(">I", flow_label)))
    return made


class UdpOutput:
    """A worker's part: sends bursts.  ``errors`` counts by errno what did not go."""

    def __init__(self, sockets: Sequence[UdpSocket]) -> None:
        """``sockets``: inherited from the supervisor."""
        self.errors: dict[int, int] = {}
        self._sockets = {(each.family, each.df): socket.socket(fileno=each.descriptor) for each in sockets}
        self._names: dict[tuple[bytes, int], tuple[str, int] | tuple[str, int, int, int]] = {}
        self._options: dict[tuple[bytes, int, int, int], Options] = {}

    def send(self, burst: Burst) -> int:
        """Send a burst: the number of datagrams that went, -1 when it has to go by another way."""
        if len(burst.dst) == 4:
            sock = self._sockets.get((socket.AF_INET, burst.df))
        else:
            sock = self._sockets.get((socket.AF_INET6, False))
        if sock is None:
            return -1
        name = self._names.get((burst.dst, burst.dport)) or self._name(burst)
        options = self._options.get((burst.src, burst.tos, burst.flow_label, burst.size)) or self._make(burst)
        try:
            sock.sendmsg((burst.data,), options if burst.number > 1 else options[1:], socket.MSG_DONTWAIT, name)
        except OSError as error:
            number = error.errno or 0
            self.errors[number] = self.errors.get(number, 0) + burst.number
            return 0 if number in _LATER else -1
        return burst.number

    def descriptors(self, family: socket.AddressFamily) -> tuple[int, int] | None:
        """The sockets without and with DF (IPv6 has one for both); None where there are none."""
        plain = self._sockets.get((family, False))
        df = self._sockets.get((family, True)) if family == socket.AF_INET else plain
        return (plain.fileno(), df.fileno()) if plain is not None and df is not None else None

    def _name(self, burst: Burst) -> tuple[str, int]:
        if len(self._names) >= _MAX_OPTIONS:
            self._names.clear()
        family = socket.AF_INET if len(burst.dst) == 4 else socket.AF_INET6
        name = self._names[burst.dst, burst.dport] = (socket.inet_ntop(family, burst.dst), burst.dport)
        return name

    def _make(self, burst: Burst) -> Options:
        if len(self._options) >= _MAX_OPTIONS:
            self._options.clear()
        made = options(burst.src, burst.tos, burst.flow_label, burst.size)
        self._options[burst.src, burst.tos, burst.flow_label, burst.size] = made
        return made

    def close(self) -> None:
        """Close this worker's copies."""
        for each in self._sockets.values():
            each.close()
