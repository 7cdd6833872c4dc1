"""The one message of rtnetlink(7) that ioctls cannot say: an address with a scope and without a prefix route."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import Final

RTM_NEWADDR: Final = 20
NLM_F_REQUEST: Final = 1
NLM_F_ACK: Final = 4
NLM_F_CREATE: Final = 0x400
NLM_F_EXCL: Final = 0x200
IFA_ADDRESS: Final = 1
IFA_LOCAL: Final = 2
RT_SCOPE_HOST: Final = 254


def add_host_address(index: int, address: bytes) -> None:
    """Give the device ``index`` a packed address with a full-length prefix and host scope; fine when it has it."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    body = struct.pack("=BBBBI", family, len(address) * 8, 0, RT_SCOPE_HOST, index)
    for kind in (IFA_LOCAL, IFA_ADDRESS):
        body += struct.pack("=HH", 4 + len(address), kind) + address
    flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    message = struct.pack("=IHHII", 16 + len(body), RTM_NEWADDR, flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
        route.send(message)
        answer = route.recv(65536)
    code = -int.from_bytes(answer[16:20], sys.byteorder, signed=True)
    if code not in {0, errno.EEXIST}:
        raise OSError(code, os.strerror(code))
