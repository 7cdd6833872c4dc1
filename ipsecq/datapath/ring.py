"""ESP on a way of its own: packet rings (packet(7)) in place of the queue, for whole datagrams to this host.

NFQUEUE copies each packet into a message that has to be asked for and wants a verdict; a ring is memory that the kernel
writes and the worker reads.  The rules drop what is in a ring (:func:`ipsecq.netfilter.compile.compile_ruleset`, chain
``direct``) before connection tracking, defragmentation or a queue sees it; the filter here takes what that rule drops:
ESP behind an IPv4 header or right behind IPv6's, no fragment, no longer than a frame, from an Ethernet device.  The
rest comes by the queue, as ever.

There is one ring for each queue and family, so that an SA that gets too much fills its own lane.  The supervisor opens
them and keeps them open: what comes while a worker is replaced waits for the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple, NoReturn

from ipsecq.netfilter.compile import DIRECT_OCTETS
from ipsecq.netfilter.steering import buckets
from ipsecq.packet.checksum import ones_complement

FRAME: Final = 2048
"""Octets of a frame: two of them fill a page, and 80 are the kernel's."""
FRAMES: Final = {socket.AF_INET: 768, socket.AF_INET6: 256}
"""Frames of a ring: at 200,000 packets a second four milliseconds of a busy worker.  They count as its memory."""
MAX_RINGS: Final = 64
"""Of a family: when a daemon is killed, the kernel closes them one by one, 25 ms each."""

_BLOCK: Final = 1 << 16
SOL_PACKET: Final = 263
PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION, PACKET_FANOUT, PACKET_FANOUT_DATA = 5, 6, 10, 18, 22
TPACKET_V2: Final = 1
_FANOUT_CBPF: Final = 6
_FANOUT_UNIQUEID: Final = 0x2000
_SO_ATTACH_FILTER: Final = 26
_TYPES: Final = {socket.AF_INET: 0x0800, socket.AF_INET6: 0x86DD}
TP_STATUS_USER: Final = 1
_HEADER: Final = struct.Struct("=IIIHH")
"""struct tpacket2_hdr: status, length, captured length, offsets of MAC and network header, …"""

# Classic BPF (Linux: Documentation/networking/filter.rst): code, jump if true, jump if false, operand.
Program = Sequence[tuple[int, int, int, int]]
_LD, _LDH, _LDB, _LDX_HEADER, _LD_X = 0x20, 0x28, 0x30, 0xB1, 0x40
_JEQ, _JGT, _JSET, _AND, _MOD, _RET, _RET_A = 0x15, 0x25, 0x45, 0x54, 0x94, 0x06, 0x16
_PACKET_TYPE, _DEVICE_TYPE = 0xFFFFF004, 0xFFFFF01C
_NOTHING: Final = ((_RET, 0, 0, 0),)
_libc = ctypes.CDLL(None, use_errno=True)


class RingSocket(NamedTuple):
    """One ring, as the supervisor describes it to its workers."""

    family: int
    queue: int
    """Counted from the first one."""
    descriptor: int


def taken(family: int) -> Program:
    """The filter: ESP to this host from an Ethernet device, in one piece and no longer than :data:`DIRECT_OCTETS`."""
    if family == socket.AF_INET:
        checks = [(_LDB, 9, _JEQ, 50, True), (_LDH, 6, _JSET, 0x3FFF, False), (_LDH, 2, _JGT, DIRECT_OCTETS, False)]
    else:
        checks = [(_LDB, 6, _JEQ, 50, True), (_LDH, 4, _JGT, DIRECT_OCTETS - 40, False)]
    # Ethernet; what is for another station's MAC address (PACKET_OTHERHOST) or on its way out the rule never sees.
    checks += [(_LDH, _DEVICE_TYPE, _JEQ, 1, True), (_LD, _PACKET_TYPE, _JGT, 2, False)]
    program: list[tuple[int, int, int, int]] = []
    for place, (load, at, test, value, wanted) in enumerate(checks):
        away = 2 * (len(checks) - place) - 1  # to the last instruction
        program += [(load, 0, 0, at), (test, 0, away, value) if wanted else (test, away, 0, value)]
    return [*program, (_RET, 0, 0, 0xFFFF), (_RET, 0, 0, 0)]


def spread(family: int, queues: int) -> Program:
    """The fanout program: the queue that the SPI belongs to (:func:`ipsecq.netfilter.steering.inbound_queue`)."""
    spi = [(_LDX_HEADER, 0, 0, 0), (_LD_X, 0, 0, 0)] if family == socket.AF_INET else [(_LD, 0, 0, 40)]
    return [*spi, (_AND, 0, 0, buckets(queues) - 1), (_MOD, 0, 0, queues), (_RET_A, 0, 0, 0)]


class Rings:
    """The supervisor's part: opens them.  ``sockets`` is empty where nobody has ``wanted`` them, or there can be none."""

    def __init__(self, queues: int, *, wanted: bool = True) -> None:
        """Two rings for each of ``queues`` in this network namespace."""
        self._open: list[socket.socket] = []
        self.sockets: list[RingSocket] = []
        self.problem = ""
        """Why there are none, in the kernel's words."""
        if not wanted:
            return
        if queues > MAX_RINGS:
            self.problem = f"{queues} queues, and there are rings for {MAX_RINGS} at most"
            return
        families = [family for family in FRAMES for _ in range(queues)]
        try:
            for _ in families:
                self._open.append(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0))
            with ThreadPoolExecutor(len(families)) as threads:  # as in close: each one waits for the kernel
                list(threads.map(_allocate, self._open, families))
            for place, family in enumerate(FRAMES):
                self._make_group(family, self._open[place * queues : (place + 1) * queues])
        except OSError as error:
            self.problem = error.strerror or str(error)
            self.close()

    @property
    def descriptors(self) -> list[int]:
        """For workers to inherit."""
        return [each.descriptor for each in self.sockets]

    def close(self) -> None:
        """Close all, at once: one after the other waits for the kernel (RCU) each time."""
        if self._open:
            with ThreadPoolExecutor(len(self._open)) as threads:
                list(threads.map(socket.socket.close, self._open))
        self._open.clear()
        self.sockets.clear()

    def _make_group(self, family: int, rings: Sequence[socket.socket]) -> None:
        """Bind these and make them a fanout group, in the order of their queues."""
        group = 0
        for queue, one in enumerate(rings):
            _bind(one, _TYPES[socket.AddressFamily(family)])
            mode = _FANOUT_CBPF if queue else _FANOUT_CBPF | _FANOUT_UNIQUEID
            one.setsockopt(SOL_PACKET, PACKET_FANOUT, struct.pack("=I", group | mode << 16))
            if not queue:
                group = one.getsockopt(SOL_PACKET, PACKET_FANOUT) & 0xFFFF
                _program(one, SOL_PACKET, PACKET_FANOUT_DATA, spread(family, len(rings)))
            self.sockets.append(RingSocket(family, queue, one.fileno()))
        for one in rings:
            _program(one, socket.SOL_SOCKET, _SO_ATTACH_FILTER, taken(family))


def _allocate(sock: socket.socket, family: int) -> None:
    """Give a socket its ring, and a filter that takes nothing until it is one of the group."""
    _program(sock, socket.SOL_SOCKET, _SO_ATTACH_FILTER, _NOTHING)
    sock.setsockopt(SOL_PACKET, PACKET_VERSION, struct.pack("=i", TPACKET_V2))
    octets = FRAMES[socket.AddressFamily(family)] * FRAME
    wanted = struct.pack("=4I", _BLOCK, octets // _BLOCK, FRAME, octets // FRAME)
    # Python's own setsockopt keeps the other threads waiting.
    if _libc.setsockopt(sock.fileno(), SOL_PACKET, PACKET_RX_RING, wanted, len(wanted)):
        _raise_errno()


def _program(sock: socket.socket, level: int, option: int, program: Program) -> None:
    """Give a socket a struct sock_fprog."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in program))
    sock.setsockopt(level, option, struct.pack("@HP", len(program), ctypes.addressof(code)))


def _bind(sock: socket.socket, kind: int) -> None:
    """Receive an EtherType from all devices; Python's own ``bind`` wants the name of one."""
    address = struct.pack("=HHiHBB8s", socket.AF_PACKET, socket.htons(kind), 0, 0, 0, 0, bytes(8))
    if _libc.bind(sock.fileno(), address, len(address)):
        _raise_errno()


def _raise_errno() -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def take_over(rings: Sequence[RingSocket], index: int, workers: int) -> list[PacketRing]:
    """What worker ``index`` has of all rings that it inherited; the others are closed."""
    mine: list[PacketRing] = []
    for ring in rings:
        if ring.queue % workers == index:
            mine.append(PacketRing(ring))
        else:
            os.close(ring.descriptor)
    return mine


@contextlib.contextmanager
def above(rings: Sequence[RingSocket]) -> Iterator[None]:
    """What is opened meanwhile gets higher descriptors than the rings.

    A process that dies closes its highest descriptors first, and the kernel takes some 25 ms for each ring: queues
    must be gone before, as policies that fail open do so by queues without a listener.
    """
    highest = max((ring.descriptor for ring in rings), default=-1)
    fillers: list[int] = []
    try:
        while not fillers or fillers[-1] < highest:
            fillers.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for each in fillers:
            os.close(each)


class PacketRing:
    """A worker's part: one ring's memory.  ``cursor`` is the frame that comes next, shared with the compiled reader."""

    def __init__(self, ring: RingSocket) -> None:
        """Take over what the supervisor has opened, and go on where another worker has ended."""
        self.fd = ring.descriptor
        self._is_right = _is_ipv4 if ring.family == socket.AF_INET else _is_ipv6
        self.frames = FRAMES[socket.AddressFamily(ring.family)]
        self._socket = socket.socket(fileno=self.fd)
        self._map = mmap.mmap(self.fd, self.frames * FRAME)
        self._words = memoryview(self._map).cast("I")
        self.memory = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        """Address of the first frame."""
        self.cursor = (ctypes.c_uint64 * 1)()
        self.find()

    def find(self) -> None:
        """Find the oldest datagram; where there is none, call it again when there is one."""
        mine = [bool(self._words[frame * FRAME // 4] & TP_STATUS_USER) for frame in range(self.frames)]
        if all(mine):
            # Nobody can tell which is the oldest.  The kernel goes on where it stopped.
            for frame in range(self.frames):
                self._words[frame * FRAME // 4] = 0
            return
        for frame in range(self.frames):
            if mine[frame] and not mine[frame - 1]:
                self.cursor[0] = frame

    def read(self, most: int) -> list[bytes]:
        """Up to ``most`` datagrams that are there, as copies; their frames are the kernel's again.

        What is no IPv4 or IPv6 header by version, length and checksum is left out: the kernel drops it as well.
        """
        found: list[bytes] = []
        for _ in range(most):
            at = self.cursor[0] * FRAME
            status, _, captured, _, start = _HEADER.unpack_from(self._map, at)
            if not status & TP_STATUS_USER:
                break
            datagram = self._map[at + start : at + start + captured]
            self._words[at // 4] = 0
            self.cursor[0] = (self.cursor[0] + 1) % self.frames
            if self._is_right(datagram):
                found.append(datagram)
        return found

    def lost(self) -> int:
        """Packets that found no free frame, since the last call."""
        _, dropped = struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        return int(dropped)

    def close(self) -> None:
        """Close this worker's copy; the memory goes with the process."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _is_ipv6(datagram: bytes) -> bool:
    return len(datagram) >= 40 and datagram[0] >> 4 == 6


def _is_ipv4(datagram: bytes) -> bool:
    """Version, length and sum of a header (RFC 791)."""
    length = (datagram[0] & 15) * 4 if datagram else 0
    if length < 20 or length > len(datagram) or datagram[0] >> 4 != 4:
        return False
    return ones_complement(datagram[:length]) == 0xFFFF
