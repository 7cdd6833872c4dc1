# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""What the fast path is told: SAs and flows that the engine has decided about (:mod:`ipsecq.datapath.fast` makes them)."""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.buffer import PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.cpython.bytes import PyBytes_AS_STRING
from cython.cimports.ipsecq.compiled.aead import Aead
from cython.cimports.libc.stdint import int64_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy, memset

from ipsecq.sa.association import Slot

PACKETS = cython.declare(cython.Py_ssize_t, int(Slot.PACKETS))
BYTES = cython.declare(cython.Py_ssize_t, int(Slot.BYTES))
FIRST_USE = cython.declare(cython.Py_ssize_t, int(Slot.FIRST_USE))
LAST_USE = cython.declare(cython.Py_ssize_t, int(Slot.LAST_USE))
SEQUENCE = cython.declare(cython.Py_ssize_t, int(Slot.SEQUENCE))
WINDOW = cython.declare(cython.Py_ssize_t, int(Slot.WINDOW))


@cython.cclass
class Limits:
    """Where one SA's counts lie in the shared table, and how far they may go (:mod:`ipsecq.engine.accounting`)."""

    def __init__(self, base, hard_packets, hard_bytes, soft_packets, soft_bytes, hard_time, hard_use):
        """Infinite limits are those that are not there."""
        self.base = base
        self.hard_packets, self.hard_bytes = _count(hard_packets), _count(hard_bytes)
        self.soft_packets, self.soft_bytes = _count(soft_packets), _count(soft_bytes)
        self.hard_time, self.hard_use = hard_time, hard_use

    @cython.cfunc
    @cython.exceptval(check=False)
    def allow(self, table: cython.pointer(uint64_t), count: uint64_t, octets: uint64_t, now: cython.double) -> cython.bint:
        """Whether no limit, hard or soft, is reached by ``count`` packets of together ``octets``; nothing is changed."""
        slot: cython.pointer(uint64_t) = table + self.base
        first: uint64_t = slot[FIRST_USE]
        packets: uint64_t = slot[PACKETS] + count
        total: uint64_t = slot[BYTES] + octets
        return (
            first != 0
            and packets <= self.hard_packets
            and total <= self.hard_bytes
            and packets < self.soft_packets
            and total < self.soft_bytes
            and now < self.hard_time
            and now - first < self.hard_use
        )

    @cython.cfunc
    @cython.exceptval(check=False)
    def charge(self, table: cython.pointer(uint64_t), count: uint64_t, octets: uint64_t, now: cython.double) -> cython.void:
        """Count them."""
        slot: cython.pointer(uint64_t) = table + self.base
        slot[PACKETS] += count
        slot[BYTES] += octets
        slot[LAST_USE] = cython.cast(uint64_t, now)


def _count(limit):
    return (1 << 64) - 1 if limit == float("inf") else int(limit)


@cython.cclass
class Way:
    """How an outbound SA's packets leave.  Made by ``ipsecq.datapath.fast.FastPath._way_of``."""

    def __init__(
        self, aead: Aead, limits: Limits, take, front: bytes, name: bytes, options: bytes, spi, esn, identification,
        tos_mask, dfbit, plain_socket, df_socket, bursts, burst,
    ):  # fmt: skip
        """``front``: outer headers without lengths; ``name``: the peer's sockaddr; ``options``: control messages of a burst.

        ``plain_socket``, ``df_socket``: descriptors of UDP sockets for bursts, or twice that of a raw socket; -1
        collects what would be sent.  ``burst(tos, df, label, identification, size, number, data)`` makes a
        :class:`ipsecq.engine.emit.Burst` for those who have to send it another way.
        """
        self.aead, self.limits, self.take, self.front, self.name, self.options = aead, limits, take, front, name, options
        self.spi, self.esn, self.identification, self.tos_mask, self.dfbit = spi, esn, identification, tos_mask, dfbit
        self.plain_socket, self.df_socket, self.bursts, self.burst = plain_socket, df_socket, bursts, burst
        self.headers = len(front)


@cython.cclass
class Flow:
    """One flow, what its path carries (octets, until Unix seconds), and how large the segments of its super-packets are.

    Of ICMP there is the identifier of the echo that it carried last, too: each is a connection of its own.
    """

    def __init__(self, way: Way, mtu, mtu_until):
        """Sizes are not known yet."""
        self.way, self.mtu, self.mtu_until = way, mtu, mtu_until
        self.size, self.size_until, self.identifier = 0, 0.0, 0


@cython.cclass
class Target:
    """A device that opened packets enter from: enc0, or that of a route-based tunnel."""

    def __init__(self, descriptor, coalescing, datagrams, failure, device):
        """``datagrams``: it takes UDP super-packets; ``failure``: the Counter of packets for a device that is down."""
        self.descriptor, self.coalescing, self.datagrams = descriptor, coalescing, datagrams
        self.failure, self.device = failure, device


@cython.cclass
class Sa:
    """An inbound SA and the flows that may come out of it: key to :class:`Target`."""

    def __init__(self, aead: Aead, limits: Limits, esn, window, mask, natt, peer: bytes, peer_port, owner):
        """``window`` in packets (0: off), ``mask`` of the ring's words; ``peer``, port: where NAT-T packets come from."""
        self.aead, self.limits, self.esn = aead, limits, esn
        self.window, self.mask, self.natt, self.peer_port = window, mask, natt, peer_port
        memset(self.peer, 0, 16)
        memcpy(self.peer, PyBytes_AS_STRING(peer), min(16, len(peer)))
        self.allowed, self.owner = {}, owner

    @cython.cfunc
    @cython.exceptval(check=False)
    def check(self, table: cython.pointer(uint64_t), low: uint32_t) -> int64_t:
        """The full sequence number, or -1 (:meth:`ipsecq.sa.replay.ReplayWindow.check`)."""
        slot: cython.pointer(uint64_t) = table + self.limits.base
        size: uint64_t = self.window
        edge: uint64_t = slot[SEQUENCE]
        sequence: uint64_t = low
        if not size:
            return low
        if self.esn:
            edge_low: uint32_t = cython.cast(uint32_t, edge)
            high: int64_t = cython.cast(int64_t, edge >> 32)
            start: uint32_t = cython.cast(uint32_t, edge_low - size + 1)
            if edge_low >= size - 1:
                if low < start:
                    high += 1
            elif low >= start:
                high -= 1
            # The last numbers of a 64-bit space are the engine's affair.
            if high < 0 or high > 0x7FFFFFFE:
                return -1
            sequence = cython.cast(uint64_t, high) << 32 | low
        if sequence > edge:
            return cython.cast(int64_t, sequence)
        if edge - sequence >= size or not sequence:
            return -1
        if slot[WINDOW + (sequence >> 6 & self.mask)] >> (sequence & 63) & 1:
            return -1
        return cython.cast(int64_t, sequence)

    @cython.cfunc
    @cython.exceptval(check=False)
    def update(self, table: cython.pointer(uint64_t), sequence: uint64_t) -> cython.void:
        """Note a number that :meth:`check` has passed just now (:meth:`ipsecq.sa.replay.ReplayWindow.update`)."""
        slot: cython.pointer(uint64_t) = table + self.limits.base
        edge: uint64_t = slot[SEQUENCE]
        block: uint64_t
        first: uint64_t
        last: uint64_t
        if not self.window:
            return
        if sequence > edge:
            slot[SEQUENCE] = sequence  # first: a worker that dies here has refused a few numbers, not let one in twice
            first, last = (edge >> 6) + 1, sequence >> 6
            last = min(last, first + self.mask)
            for block in range(first, last + 1):
                slot[WINDOW + (block & self.mask)] = 0
        slot[WINDOW + (sequence >> 6 & self.mask)] |= cython.cast(uint64_t, 1) << (sequence & 63)


@cython.cfunc
@cython.exceptval(check=True)
def address_of(table) -> cython.pointer(uint64_t):
    """Where the words of a memoryview lie; its owner is kept, so they stay there."""
    view: cython.Py_buffer
    PyObject_GetBuffer(table, cython.address(view), PyBUF_WRITABLE)
    at: cython.pointer(uint64_t) = cython.cast(cython.pointer(uint64_t), view.buf)
    PyBuffer_Release(cython.address(view))
    return at
