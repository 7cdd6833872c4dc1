"""A UDP echo server as a program, which also opens the kernel's door for ESP in UDP.  Standard library only.

It runs inside User-Mode Linux.  Port 7 answers from the address that was asked, and with the IPv6 destination options
that it was asked with; the sockets on port 4500 exist so that the kernel takes ESP from them (UDP_ENCAP, RFC 3948).
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import sys

PORT = 7
NATT_PORT = 4500
UDP_ENCAP, UDP_ENCAP_ESPINUDP = 100, 2
IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_PKTINFO = 10, 0, 8
IP_XFRM_POLICY, IPV6_XFRM_POLICY, XFRM_POLICY_IN, XFRM_POLICY_ALLOW = 17, 35, 0, 0
FAMILIES = (socket.AF_INET, socket.AF_INET6)


def bound(family: int, port: int) -> socket.socket:
    """A UDP socket of one family on all addresses."""
    end = socket.socket(family, socket.SOCK_DGRAM)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    if family == socket.AF_INET6:
        end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVDSTOPTS, 1)
    else:
        end.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        end.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)  # fragments, never EMSGSIZE
    end.bind(("", port))
    return end


def bypass(end: socket.socket) -> None:
    """Take what arrives here without a look at the SPD, as IKE daemons do: a transport policy means this port, too."""
    selector = struct.pack("=40xH14x", end.family)
    policy = selector + b"\xff" * 32 + bytes(64) + struct.pack("=IIBBBB4x", 0, 0, XFRM_POLICY_IN, XFRM_POLICY_ALLOW, 0, 0)
    if end.family == socket.AF_INET6:
        end.setsockopt(socket.IPPROTO_IPV6, IPV6_XFRM_POLICY, policy)
    else:
        end.setsockopt(socket.IPPROTO_IP, IP_XFRM_POLICY, policy)


def answer(end: socket.socket) -> None:
    """Echo one datagram, from the address that it was sent to."""
    data, control, _, sender = end.recvmsg(65535, 256)
    back = []
    for level, kind, info in control:
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            back.append((level, kind, bytes(4) + info[8:12] + bytes(4)))
        elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            back.append((level, kind, info[:16] + bytes(4)))
        elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_DSTOPTS:
            back.append((level, kind, info))
    end.sendmsg([data], back, 0, sender)


def main() -> None:
    """Serve until killed."""
    with contextlib.ExitStack() as stack:
        for family in FAMILIES:
            encapsulated = stack.enter_context(bound(family, NATT_PORT))
            encapsulated.setsockopt(socket.IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)
            bypass(encapsulated)
        ends = [stack.enter_context(bound(family, PORT)) for family in FAMILIES]
        while True:
            for end in select.select(ends, [], [])[0]:
                try:
                    answer(end)
                except OSError as error:  # no SA, no route: the sender misses its echo, and here is why
                    print(error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
