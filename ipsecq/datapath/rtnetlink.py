"""The one message of rtnetlink(7) that ioctls cannot say: an address with a scope and without a prefix route."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

from ipsecq.netlink import HEADER, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, attribute, error_number, message

RTM_NEWADDR: Final = 20
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
