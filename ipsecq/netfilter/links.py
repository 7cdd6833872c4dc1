"""Links by rtnetlink: which devices there are, and news of them.

Source: Linux ``include/uapi/linux/rtnetlink.h``, ``if_link.h``.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from ipsecq.errors import NetfilterError
from ipsecq.netlink import NLM_F_DUMP, NLMSG_DONE, NLMSG_ERROR, attributes, message, messages
from ipsecq.packet.address import text

_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_RTMGRP_LINK: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFF_UP: Final = 1
_IFF_LOOPBACK: Final = 8
_IFINFO: Final = Struct("=BxHiII")


@dataclass(slots=True, frozen=True)
class Link:
    """One device."""

    index: int
    name: str
    mtu: int
    up: bool
    loopback: bool


@dataclass(slots=True, frozen=True)
class LinkEvent:
    """A device appeared or changed (``link`` is its new state), or went (``gone``)."""

    link: Link
    gone: bool


class LinkWatcher:
    """The links of the current network namespace, kept up to date by :meth:`read`.

    ``fileno`` becomes readable when there is news.  News that the kernel had to throw away (ENOBUFS) is made good by
    listing all links again.
    """

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self.socket.bind((0, _RTMGRP_LINK))
        self.socket.setblocking(False)
        self.links: dict[int, Link] = list_links()
        """By interface index."""

    def fileno(self) -> int:
        """The descriptor, for select and asyncio."""
        return self.socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def read(self) -> list[LinkEvent]:
        """All news since the last call, in order; never blocks.  Messages that change nothing are left out."""
        events: list[LinkEvent] = []
        while True:
            try:
                buffer = self.socket.recv(1 << 17)
            except BlockingIOError:
                return events
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                now = list_links()
                events += [self._note(link, True) for index, link in list(self.links.items()) if index not in now]
                events += [self._note(link, False) for index, link in now.items() if self.links.get(index) != link]
                continue
            for kind, link in _links(buffer):
                gone = kind == _RTM_DELLINK
                if (link.index in self.links) if gone else (self.links.get(link.index) != link):
                    events.append(self._note(link, gone))

    def _note(self, link: Link, gone: bool) -> LinkEvent:
        if gone:
            self.links.pop(link.index, None)
        else:
            self.links[link.index] = link
        return LinkEvent(link, gone)


def list_links() -> dict[int, Link]:
    """All links of the current network namespace, by interface index."""
    found: dict[int, Link] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(10)
        netlink.send(message(_RTM_GETLINK, NLM_F_DUMP, 1, _IFINFO.pack(0, 0, 0, 0, 0)))
        while True:
            try:
                buffer = netlink.recv(1 << 17)
            except TimeoutError:
                raise NetfilterError("rtnetlink did not list the links within 10 s") from None
            for _, link in _links(buffer):
                found[link.index] = link
            if any(kind in (NLMSG_DONE, NLMSG_ERROR) for kind, _, _ in messages(buffer)):
                return found


def _links(buffer: bytes) -> Iterator[tuple[int, Link]]:
    for kind, _, body in messages(buffer):
        if kind not in (_RTM_NEWLINK, _RTM_DELLINK) or len(body) < 16:
            continue
        family, _, index, flags, _ = _IFINFO.unpack_from(body)
        if family != socket.AF_UNSPEC:
            continue  # a bridge port's message (AF_BRIDGE): the device itself stays
        found = dict(attributes(body[16:]))
        name = found.get(_IFLA_IFNAME, b"\0")[:-1].decode(errors="replace")
        mtu = int.from_bytes(found.get(_IFLA_MTU, b""), sys.byteorder)
        yield kind, Link(index, name, mtu, bool(flags & _IFF_UP), bool(flags & _IFF_LOOPBACK))


def is_local(address: bytes) -> bool:
    """True when the packed address belongs to this network namespace: the kernel lets a socket be bound to it."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as trial, contextlib.suppress(OSError):
        trial.bind((text(address), 0))
        return True
    return False
