"""The messages of rtnetlink(7) that ioctls cannot say: an address with a scope, and what an IPv4 route has of MTU."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
from typing import Final

from ipsecq.netlink import (
    HEADER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    attributes,
    error_number,
    message,
    messages,
)

RTM_NEWADDR: Final = 20
RTM_NEWROUTE: Final = 24
RTM_GETROUTE: Final = 26
RTM_F_FIB_MATCH: Final = 0x2000
RTA_DST: Final = 1
RTA_OIF: Final = 4
RTA_METRICS: Final = 8
RTA_MARK: Final = 16
RTAX_MTU: Final = 2
SIOCGIFMTU: Final = 0x8921
IFA_ADDRESS: Final = 1
IFA_LOCAL: Final = 2
RT_SCOPE_HOST: Final = 254


def add_host_address(index: int, address: bytes) -> None:
    """Give the device ``index`` a packed address with a full-length prefix and host scope; fine when it has it."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    body = struct.pack("=BBBBI", family, len(address) * 8, 0, RT_SCOPE_HOST, index)
    body += attribute(IFA_LOCAL, address) + attribute(IFA_ADDRESS, address)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
        route.send(message(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, 1, body))
        answer = route.recv(65536)
    code = error_number(answer[HEADER:])
    if code not in {0, errno.EEXIST}:
        raise OSError(code, os.strerror(code))


def configured_mtu(dst: bytes, mark: int) -> int:
    """The MTU of the IPv4 route to a packed address as it was configured, or of its device.

    Unlike IP_MTU of ip(7), no ICMP error has a part in it.  Raises OSError when there is no route.
    """
    # Of the entry the route's own MTU; of the whole answer the device, chosen among several next hops.
    entry = _route(dst, mark, RTM_F_FIB_MATCH)
    mtu = dict(attributes(entry.get(RTA_METRICS, b""))).get(RTAX_MTU)
    if mtu is not None:
        return int.from_bytes(mtu, sys.byteorder)
    device = socket.if_indextoname(int.from_bytes(_route(dst, mark, 0).get(RTA_OIF, b""), sys.byteorder))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, SIOCGIFMTU, struct.pack("16si12x", device.encode(), 0))
    return int(struct.unpack_from("16xi", answer)[0])


def _route(dst: bytes, mark: int, flags: int) -> dict[int, bytes]:
    """The attributes of the IPv4 route that a packet with this mark takes."""
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, flags)
    body += attribute(RTA_DST, dst) + attribute(RTA_MARK, mark.to_bytes(4, sys.byteorder))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
        route.send(message(RTM_GETROUTE, 0, 1, body))
        kind, _, answer = next(messages(route.recv(65536)))
    if kind != RTM_NEWROUTE:
        code = error_number(answer)
        raise OSError(code, os.strerror(code))
    return dict(attributes(answer[12:]))  # behind struct rtmsg
