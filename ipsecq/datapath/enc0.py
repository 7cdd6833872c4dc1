"""The enc0 device: where decapsulated packets enter the kernel, so that it filters, tracks and forwards them.

A TUN device (Linux ``Documentation/networking/tuntap.rst``) with one queue a worker.  The supervisor makes it
(:func:`create`), persistent, so it outlives a worker; workers attach (:class:`Enc0`).  With ``vnet_hdr`` each packet
goes with a virtio-net header, which is how a run of TCP segments enters as one packet.
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
from typing import Final

from ipsecq.datapath.rtnetlink import add_host_address
from ipsecq.errors import DaemonError
from ipsecq.packet.buffer import Buffer
from ipsecq.packet.coalesce import Run, coalesce
from ipsecq.packet.segments import split

TUNSETIFF: Final = 0x400454CA
TUNSETPERSIST: Final = 0x400454CB
TUNSETOFFLOAD: Final = 0x400454D0
TUNSETVNETHDRSZ: Final = 0x400454D8
IFF_TUN: Final = 0x0001
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_MULTI_QUEUE: Final = 0x0100
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
TUN_F_USO: Final = 0x20 | 0x40
"""UDP super-packets of either family, from Linux 6.2 on."""
UDP: Final = 17

MTU: Final = 65535
"""Longest datagram there is.  What we write is not measured against the MTU, and the MSS of flows through the gateway
depends on the devices that they leave by; a smaller one would only make the kernel send ICMP errors of its own."""

TX_QUEUE_LENGTH: Final = 64
"""Packets that somebody routes *into* enc0 wait here until a worker throws them away."""

DUMMY_ADDRESS: Final = bytes([192, 0, 0, 8])
"""The IPv4 dummy address (RFC 7600, IANA special registry): never on a wire.  The kernel's loose reverse-path filter
refuses every packet from a device without any IPv4 address, so enc0 has this one, in host scope: no packet's source."""

_VNET: Final = Struct("=BBHHHH")
_PLAIN: Final = bytes(_VNET.size)
_PEEK: Final = 64
"""Octets read of a packet that is thrown away; the kernel refuses fewer than a virtio header."""
_IFREQ_FLAGS: Final = Struct("=16sH22x")
_IFREQ_INT: Final = Struct("=16si20x")


def create(
    name: str = "enc0", *, mtu: int = MTU, vnet_hdr: bool = True, accept_local: bool = False,
    configure: Callable[[str, int, bool], None] | None = None,
) -> None:  # fmt: skip
    """Make the device (or take the one that is there), persistent, configured and up.

    ``accept_local`` lets decapsulated packets in whose source is an address of this host.  ``configure`` in the place of
    what enc0 is given.  DaemonError without CAP_NET_ADMIN or /dev/net/tun, or when the name belongs to another kind of
    device.
    """
    descriptor = open_queue(name, vnet_hdr)
    try:
        fcntl.ioctl(descriptor, TUNSETPERSIST, 1)
        (configure or _configure)(name, mtu, accept_local)
    except OSError as error:
        raise DaemonError(f"{name}: cannot configure the device ({error}); CAP_NET_ADMIN is needed") from None
    finally:
        os.close(descriptor)


def remove(name: str = "enc0", *, vnet_hdr: bool = True) -> None:
    """Take the device away; nothing happens when there is none.  Workers must have detached."""
    if not Path(f"/proc/sys/net/ipv4/conf/{name}").exists():
        return
    descriptor = open_queue(name, vnet_hdr)
    try:
        fcntl.ioctl(descriptor, TUNSETPERSIST, 0)
    finally:
        os.close(descriptor)


def open_queue(name: str, vnet_hdr: bool, offloads: int = 0) -> int:
    """A descriptor that is one queue of the device.

    ``offloads`` (TUN_F_*, of the whole device) is what the kernel may leave to us: 0, and all comes segmented and
    checksummed.  DaemonError with the reason.
    """
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DaemonError(f"/dev/net/tun: {error.strerror}; load the tun module or allow the device") from None
    flags = IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | (IFF_VNET_HDR if vnet_hdr else 0)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, _IFREQ_FLAGS.pack(name.encode(), flags))
        if vnet_hdr:
            fcntl.ioctl(descriptor, TUNSETVNETHDRSZ, struct.pack("=i", _VNET.size))
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


def _configure(name: str, mtu: int, accept_local: bool) -> None:
    label = name.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        fcntl.ioctl(control, SIOCSIFMTU, _IFREQ_INT.pack(label, mtu))
        fcntl.ioctl(control, SIOCSIFTXQLEN, _IFREQ_INT.pack(label, TX_QUEUE_LENGTH))
        # Before it is up, or the kernel makes an address and sends router solicitations.
        write_sysctl(f"ipv6/conf/{name}/disable_ipv6", "0")
        write_sysctl(f"ipv6/conf/{name}/addr_gen_mode", "1")
        write_sysctl(f"ipv6/conf/{name}/accept_ra", "0")
        write_sysctl(f"ipv6/conf/{name}/autoconf", "0")
        write_sysctl(f"ipv4/conf/{name}/rp_filter", "0")
        write_sysctl(f"ipv4/conf/{name}/accept_local", "1" if accept_local else "0")
        write_sysctl(f"ipv4/conf/{name}/send_redirects", "0")
        forward_as_all(name)
        flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(control, SIOCGIFFLAGS, _IFREQ_FLAGS.pack(label, 0)))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, _IFREQ_FLAGS.pack(label, flags | IFF_UP))
    add_host_address(socket.if_nametoindex(name), DUMMY_ADDRESS)


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


class Enc0:
    """One worker's queue of the device: packets written here arrive at the kernel from ``name``.

    ``fd`` is readable when somebody has routed packets into the device; :meth:`discard` throws them away.
    """

    offloads = 0

    def __init__(self, name: str = "enc0", *, vnet_hdr: bool = True, coalescing: bool = True) -> None:
        """Attach to the device that :func:`create` made; DaemonError when that fails.

        ``vnet_hdr`` belongs to the device, not to the queue: attaching with another value changes it for everybody,
        so all workers and :func:`create` use the same.  ``coalescing`` (with ``vnet_hdr`` only) lets :meth:`write`
        put TCP segments together.
        """
        self.coalescing = coalescing and vnet_hdr
        self.coalesced = 0
        """Packets that entered as a part of another."""
        self.name, self.vnet_hdr = name, vnet_hdr
        self.errors: dict[int, int] = {}
        self.fd = open_queue(name, vnet_hdr, self.offloads)
        self.datagrams = vnet_hdr and _takes_datagrams(self.fd, self.offloads)
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
        fd, taken = self.fd, 0
        if self.vnet_hdr:
            writev, plain = os.writev, _PLAIN
            for packet in packets:
                try:
                    writev(fd, (plain, packet))
                    taken += 1
                except OSError as error:
                    self._count(error)
            return taken
        write = os.write
        for packet in packets:
            try:
                write(fd, packet)
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
        if not self.vnet_hdr:
            raise ValueError("write_coalesced needs a device with vnet_hdr")
        if udp:
            kind, field = VIRTIO_NET_HDR_GSO_UDP_L4, 6
        else:
            kind, field = VIRTIO_NET_HDR_GSO_TCPV4 if version == 4 else VIRTIO_NET_HDR_GSO_TCPV6, 16
        virtio = _VNET.pack(VIRTIO_NET_HDR_F_NEEDS_CSUM, kind, header, size, offset, field)
        try:
            os.writev(self.fd, (virtio, *parts))
        except OSError as error:
            self._count(error)
            return False
        return True

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

    def close(self) -> None:
        """Detach; the device stays."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Enc0:
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
