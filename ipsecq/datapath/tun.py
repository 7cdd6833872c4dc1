"""TUN devices with a queue for each worker, made to give packets to the kernel: what enc0 and the ipsecN devices share.

Linux ``Documentation/networking/tuntap.rst``.  The supervisor makes a device (:func:`create`), persistent, so it outlives
a worker; workers attach (:class:`TunQueue`).  Each packet goes with a virtio-net header, which is how a run of segments
enters as one packet.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Final, Self

from ipsecq.errors import DaemonError
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.coalesce import Run, coalesce
from ipsecq.packet.segments import split

TUNSETIFF: Final = 0x400454CA
TUNSETPERSIST: Final = 0x400454CB
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
TUNSETQUEUE: Final = 0x400454D9
TUNGETIFF: Final = 0x800454D2
IFF_TUN: Final = 0x0001
IFF_MULTI_QUEUE: Final = 0x0100
IFF_DETACH_QUEUE: Final = 0x0400
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
SIOCGIFFLAGS: Final = 0x8913
SIOCSIFFLAGS: Final = 0x8914
SIOCSIFMTU: Final = 0x8922
SIOCSIFTXQLEN: Final = 0x8943
IFF_UP: Final = 1

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
TUN_F_CSUM: Final = 1
TUN_F_TSO: Final = 0x02 | 0x04
"""TCP super-packets of either family."""
TUN_F_USO: Final = 0x20 | 0x40
"""UDP super-packets of either family, from Linux 6.2 on."""
UDP: Final = 17

VNET: Final = Struct("=BBHHHH")
"""struct virtio_net_hdr: flags, kind, length of the headers, octets of a segment, start and place of the checksum."""
IFREQ_FLAGS: Final = Struct("=16sH22x")
_IFREQ_INT: Final = Struct("=16si20x")
_PLAIN: Final = bytes(VNET.size)


def create(name: str, configure: Callable[[], None]) -> None:
    """Make the device (or take the one that is there), persistent, and ``configure`` it.

    DaemonError without CAP_NET_ADMIN or /dev/net/tun, or when the name belongs to another kind of device.
    """
    descriptor = open_queue(name)
    try:
        fcntl.ioctl(descriptor, TUNSETPERSIST, 1)
        configure()
    except OSError as error:
        raise DaemonError(f"{name}: cannot configure the device ({error}); CAP_NET_ADMIN is needed") from None
    finally:
        os.close(descriptor)


def remove(name: str) -> None:
    """Take the device away; nothing happens when there is none.  Workers must have detached."""
    if not Path(f"/proc/sys/net/ipv4/conf/{name}").exists():
        return
    descriptor = open_queue(name)
    try:
        fcntl.ioctl(descriptor, TUNSETPERSIST, 0)
    finally:
        os.close(descriptor)


def open_queue(name: str, offloads: int = 0) -> int:
    """A descriptor that is one queue of the device.

    ``offloads`` (TUN_F_*, of the whole device) is what the kernel may leave to us: 0, and all comes segmented and
    checksummed.  DaemonError with the reason.
    """
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DaemonError(f"/dev/net/tun: {error.strerror}; load the tun module or allow the device") from None
    flags = IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | IFF_VNET_HDR
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, IFREQ_FLAGS.pack(name.encode(), flags))
        fcntl.ioctl(descriptor, TUNSETVNETHDRSZ, struct.pack("=i", VNET.size))
        fcntl.ioctl(descriptor, TUNSETOFFLOAD, offloads)
    except OSError as error:
        os.close(descriptor)
        reason = {
            errno.EPERM: "CAP_NET_ADMIN is needed",
            errno.EINVAL: "the name belongs to another kind of device, or to a TUN device with one queue: remove it",
            errno.EBUSY: "a device of that name is in use",
            errno.E2BIG: "all of its queues are taken",
        }.get(error.errno or 0, error.strerror)
        raise DaemonError(f"{name}: cannot attach: {reason}") from None
    return descriptor


def set_mtu(name: str, mtu: int) -> None:
    """Raises OSError, as the next three do."""
    _control(SIOCSIFMTU, _IFREQ_INT.pack(name.encode(), mtu))


def set_queue_length(name: str, packets: int) -> None:
    """How many packets that are routed into the device wait for a reader."""
    _control(SIOCSIFTXQLEN, _IFREQ_INT.pack(name.encode(), packets))


def is_up(name: str) -> bool:
    """The kernel's word, now."""
    return bool(_flags(name) & IFF_UP)


def bring_up(name: str) -> None:
    """As ``ip link set up`` does."""
    _control(SIOCSIFFLAGS, IFREQ_FLAGS.pack(name.encode(), _flags(name) | IFF_UP))


def _flags(name: str) -> int:
    return int(IFREQ_FLAGS.unpack(_control(SIOCGIFFLAGS, IFREQ_FLAGS.pack(name.encode(), 0)))[1])


def _control(request: int, argument: bytes) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        return fcntl.ioctl(control, request, argument)


def forward_as_all(name: str) -> None:
    """Devices take conf/default when they appear; what the operator set by ip_forward stands in conf/all."""
    for family in ("ipv4", "ipv6"):
        forwarding = _read_sysctl(f"{family}/conf/all/forwarding")
        if forwarding is not None:
            write_sysctl(f"{family}/conf/{name}/forwarding", forwarding)


def write_sysctl(name: str, value: str) -> None:
    """Write a sysctl of this namespace where it exists (IPv6 may be absent) and differs."""
    if _read_sysctl(name) not in {None, value}:
        Path("/proc/sys/net", name).write_text(value)


def _read_sysctl(name: str) -> str | None:
    try:
        return Path("/proc/sys/net", name).read_text().strip()
    except FileNotFoundError:
        return None


def _takes_datagrams(descriptor: int, offloads: int) -> bool:
    """Whether this kernel's TUN knows UDP super-packets: then it could send us some, if we wanted them."""
    try:
        fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_USO)
    except OSError:
        return False
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, offloads)
    return True


class TunQueue:
    """One worker's queue of a device: packets written here arrive at the kernel from ``name``.

    ``fd`` is readable when somebody has routed packets into the device.
    """

    def __init__(self, name: str, *, offloads: int = 0, coalescing: bool = True) -> None:
        """Attach to the device that :func:`create` made; DaemonError when that fails.

        ``offloads``: see :func:`open_queue`; ``coalescing`` lets :meth:`write` put TCP segments together.
        """
        self.name, self.coalescing = name, coalescing
        self.coalesced = 0
        """Packets that entered as a part of another."""
        self.errors: dict[int, int] = {}
        self.fd = open_queue(name, offloads)
        self.datagrams = _takes_datagrams(self.fd, offloads)
        """The kernel takes UDP super-packets."""

    def write(self, packets: Sequence[Buffer]) -> int:
        """Give whole packets to the kernel; returns how many it took, failures are counted by errno.

        TCP segments that follow one another enter as one packet, where nothing is lost by it
        (:func:`ipsecq.packet.coalesce.coalesce`).
        """
        if len(packets) > 1 and self.coalescing:
            return self._write_runs(packets)
        return self._write_each(packets)

    def write_all(self, packets: Sequence[Buffer], runs: Sequence[tuple[int, Run]]) -> int:
        """Write packets and runs, each run behind as many of the packets as its number says; how many were taken."""
        taken = start = 0
        for place, run in runs:
            if place > start:
                taken += self.write(packets[start:place])
                start = place
            taken += self.write_run(run)
        if start < len(packets):
            taken += self.write(packets[start:] if start else packets)
        return taken

    def _write_each(self, packets: Sequence[Buffer]) -> int:
        fd, writev, plain, taken = self.fd, os.writev, _PLAIN, 0
        for packet in packets:
            try:
                writev(fd, (plain, packet))
                taken += 1
            except OSError as error:
                self._count(error)
        return taken

    def _write_runs(self, packets: Sequence[Buffer]) -> int:
        runs = coalesce(packets)
        lost = 0
        for run in runs:
            if run.size:
                lost += run.number - self.write_run(run)
                continue
            try:
                os.writev(self.fd, (_PLAIN, run.parts[0]))
            except OSError as error:
                self._count(error)
                lost += 1
        return len(packets) - lost

    def write_run(self, run: Run) -> int:
        """Give a run to the kernel as one packet: the number of packets that it took."""
        if run.protocol == UDP and not self.datagrams:
            return self._write_datagrams(run)
        self.coalesced += run.number - 1
        version, udp = run.version, run.protocol == UDP
        taken = self.write_coalesced(
            run.parts, version=version, offset=run.offset, header=run.header, size=run.size, udp=udp
        )
        return run.number if taken else 0

    def _write_datagrams(self, run: Run) -> int:
        """The datagrams of a run one by one, for a kernel that doesn't take them together (before 6.2)."""
        whole = b"".join(run.parts)
        return self._write_each(split(whole, run.size))

    def write_coalesced(
        self, parts: Sequence[Buffer], *, version: int, offset: int, header: int, size: int, udp: bool = False
    ) -> bool:
        """Give a TCP (or UDP) super-packet to the kernel, which splits it only where it leaves by a device that cannot.

        ``parts``: the packet's octets in order, headers whole in the first; ``version`` 4 or 6; ``offset`` of the TCP
        header and ``header`` length up to the data; ``size`` of the data of each segment but the last.  The TCP (UDP)
        checksum field must hold the pseudo header's sum (not complemented, RFC 1071; length of the whole super-packet):
        the segments are trusted, and get their checksums from the device or from the kernel.  False: counted.
        """
        if udp:
            kind, field = VIRTIO_NET_HDR_GSO_UDP_L4, 6
        else:
            kind, field = VIRTIO_NET_HDR_GSO_TCPV4 if version == 4 else VIRTIO_NET_HDR_GSO_TCPV6, 16
        virtio = VNET.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, header, size, offset, field)
        try:
            os.writev(self.fd, (virtio, *parts))
        except OSError as error:
            self._count(error)
            return False
        return True

    def close(self) -> None:
        """Detach; the device stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, error: OSError) -> None:
        self.count_error(error.errno or 0)

    def count_error(self, number: int) -> None:
        """Note an errno of the device."""
        self.errors[number] = self.errors.get(number, 0) + 1
