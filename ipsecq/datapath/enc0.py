"""The enc0 device: where decapsulated packets enter the kernel, so that it filters, tracks and forwards them.

A TUN device (:mod:`ipsecq.datapath.tun`); nothing lives behind it.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from ipsecq.datapath import tun
from ipsecq.datapath.rtnetlink import add_host_address

MTU: Final = 65535
"""Longest datagram there is.  What we write is not measured against the MTU, and the MSS of flows through the gateway
depends on the devices that they leave by; a smaller one would only make the kernel send ICMP errors of its own."""

TX_QUEUE_LENGTH: Final = 64
"""Packets that somebody routes *into* enc0 wait here until a worker throws them away."""

DUMMY_ADDRESS: Final = bytes([192, 0, 0, 8])
"""The IPv4 dummy address (RFC 7600, IANA special registry): never on a wire.  The kernel's loose reverse-path filter
refuses every packet from a device without any IPv4 address, so enc0 has this one, in host scope: no packet's source."""

_PEEK: Final = 64
"""Octets read of a packet that is thrown away; the kernel refuses fewer than a virtio header."""


def create(name: str = "enc0", *, accept_local: bool = False) -> None:
    """Make the device (or take the one that is there), configured and up.  DaemonError.

    ``accept_local`` lets decapsulated packets in whose source is an address of this host.
    """
    tun.create(name, lambda: _configure(name, accept_local))


def _configure(name: str, accept_local: bool) -> None:
    tun.set_mtu(name, MTU)
    tun.set_queue_length(name, TX_QUEUE_LENGTH)
    # Before it is up, or the kernel makes an address and sends router solicitations.
    tun.write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "0")
    tun.write_sysctl(f"ipv6/conf/{name}/addr_gen_mode", "1")
    tun.write_sysctl(f"ipv6/conf/{name}/accept_ra", "0")
    tun.write_sysctl(f"ipv6/conf/{name}/autoconf", "0")
    tun.write_sysctl(f"ipv4/conf/{name}/rp_filter", "0")
    tun.write_sysctl(f"ipv4/conf/{name}/accept_local", "1" if accept_local else "0")
    tun.write_sysctl(f"ipv4/conf/{name}/send_redirects", "0")
    tun.forward_as_all(name)
    tun.bring_up(name)
    add_host_address(socket.if_nametoindex(name), DUMMY_ADDRESS)


class Enc0(tun.TunQueue):
    """One worker's queue of the device.  What somebody routes into it is thrown away (:meth:`discard`)."""

    def __init__(self, name: str = "enc0", *, coalescing: bool = True) -> None:
        """Attach to the device that :func:`create` made; DaemonError when that fails."""
        super().__init__(name, coalescing=coalescing)

    def discard(self, limit: int = 64) -> int:
        """Read and drop packets that somebody routed into enc0 (nothing lives behind it): how many."""
        count = 0
        while count < limit:
            try:
                os.read(self.fd, _PEEK)  # the rest of the packet is lost, as meant
            except BlockingIOError:
                break
            except OSError as error:
                self._count(error)
                break
            count += 1
        return count
