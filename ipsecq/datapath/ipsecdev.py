"""The ipsecN devices of route-based tunnels: TUN devices like enc0, and what is routed into them is read and sealed.

Each worker has a queue, so that whatever it opens can enter from the device; only the one that seals for the interface
leaves its queue attached for reading, so one SA has one sender.  While no queue is attached, or the device is down, the
kernel drops what is routed into it: there is no other way out.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from typing import Final, NamedTuple

from ipsecq.datapath import tun
from ipsecq.errors import DaemonError

TX_QUEUE_LENGTH: Final = 1000
"""Packets, or super-packets, that wait for the worker: some milliseconds of what it seals.  The rest is dropped."""

BATCH: Final = 64
BATCH_OCTETS: Final = 1 << 18
"""One batch ends with the super-packet that passes this."""

_ROOM: Final = tun.VNET.size + 65536


class Routed(NamedTuple):
    """One packet that was routed into the device; ``packet`` is valid until the next read."""

    size: int
    """Octets of data in each segment of a TCP super-packet; 0: it is no such."""
    unfinished: bool
    """Its checksum is not filled in."""
    packet: memoryview


def create_interface(name: str, mtu: int) -> None:
    """Make the device, or take the one that is there, with what it was given by others.

    A new one is up; one that is there stays as it is, up or down, and keeps its addresses and routes.  DaemonError.
    """
    try:
        fresh = not socket.if_nametoindex(name)
    except OSError:
        fresh = True
    tun.create(name, lambda: _configure(name, mtu, fresh))


def _configure(name: str, mtu: int, fresh: bool) -> None:
    tun.set_mtu(name, mtu)
    if not fresh:
        return
    tun.set_queue_length(name, TX_QUEUE_LENGTH)
    # No link-local address of the kernel's making: router solicitations would be the first packets in the tunnel.
    tun.write_sysctl(f"ipv6/conf/{name}/addr_gen_mode", "1")
    tun.write_sysctl(f"ipv6/conf/{name}/accept_ra", "0")
    tun.write_sysctl(f"ipv4/conf/{name}/send_redirects", "0")
    tun.forward_as_all(name)
    tun.bring_up(name)


class IpsecDevice(tun.TunQueue):
    """One worker's queue of an ipsecN device.  With ``reading`` this worker gets what is routed into it."""

    def __init__(self, name: str, *, reading: bool, gso: bool = True, coalescing: bool = True) -> None:
        """Attach to the device that :func:`create_interface` made; DaemonError when that fails.

        With ``gso`` TCP super-packets come whole, and checksums may not be filled in; the same for all queues of a device.
        """
        super().__init__(name, offloads=tun.TUN_F_CSUM | tun.TUN_F_TSO if gso else 0, coalescing=coalescing)
        self.reading = reading
        if not reading:
            try:
                fcntl.ioctl(self.fd, tun.TUNSETQUEUE, tun.IFREQ_FLAGS.pack(b"", tun.IFF_DETACH_QUEUE))
            except OSError as error:
                self.close()
                raise DaemonError(f"{name}: cannot detach a queue: {error.strerror}") from None
        # Untouched pages of these cost nothing, and small packets touch one of each.
        self._buffers = [bytearray(_ROOM) for _ in range(BATCH)] if reading else []
        self._views = [memoryview(buffer) for buffer in self._buffers]

    @property
    def attached(self) -> bool:
        """False when somebody has removed the device."""
        try:
            fcntl.ioctl(self.fd, tun.TUNGETIFF, tun.IFREQ_FLAGS.pack(b"", 0))
        except OSError:
            return False
        return True

    def is_up(self) -> bool:
        """The kernel's word, now; False when it has gone."""
        try:
            return tun.is_up(self.name)
        except OSError:
            return False

    def read_batch(self) -> list[Routed] | None:
        """What waits, a bounded number of packets; None: the device has gone."""
        fd, found, octets, skip = self.fd, [], 0, tun.VNET.size
        unpack_from, needs_checksum = tun.VNET.unpack_from, tun.VIRTIO_NET_HDR_F_NEEDS_CSUM
        for buffer, view in zip(self._buffers, self._views, strict=True):
            try:
                length = os.readv(fd, (buffer,))
            except BlockingIOError:
                break
            except OSError as error:
                self._count(error)
                if error.errno == errno.EBADFD:
                    return None
                break
            flags, kind, _, size, _, _ = unpack_from(buffer)
            found.append(Routed(size if kind else 0, bool(flags & needs_checksum), view[skip:length]))
            octets += length
            if octets > BATCH_OCTETS:
                break
        return found
