# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""Batches from queues, by the fast path alone: what a worker does while there is nothing else to do.

The :class:`Reader` waits for a queue, reads what is there, lets :class:`Sealer` and :class:`Opener` take packets up to the
first one that they leave alone, sends what they made and the verdicts, and says where the rest begins.  The rest is the
engine's.
"""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.cimports.ipsecq.compiled.octets import get32, put32
from cython.cimports.ipsecq.fastpath.opener import Opener
from cython.cimports.ipsecq.fastpath.ring import Ring
from cython.cimports.ipsecq.fastpath.sealer import Sealer
from cython.cimports.ipsecq.fastpath.sockets import (
    CLOCK_MONOTONIC,
    CLOCK_REALTIME,
    MSG_DONTWAIT,
    clock_gettime,
    epoll_event,
    epoll_wait,
    mmsghdr,
    nanosleep,
    read,
    recvmmsg,
    send,
    timespec,
)
from cython.cimports.libc.errno import EAGAIN, EINTR, errno
from cython.cimports.libc.stdint import uint16_t, uint32_t, uint64_t
from cython.cimports.libc.stdlib import free, malloc
from cython.cimports.libc.string import memcpy

from ipsecq.counters import HISTOGRAM_BASE as _HISTOGRAM_BASE
from ipsecq.counters import HISTOGRAM_BOUNDS, Counter
from ipsecq.counters import HISTOGRAM_SUM_NS as _HISTOGRAM_SUM_NS

MSG_PACKET = cython.declare(cython.int, 0x300)
FIRST = cython.declare(cython.Py_ssize_t, 20)
"""Offset of the first attribute: netlink header and nfgenmsg."""
FORWARD = cython.declare(cython.int, 2)
"""NF_INET_FORWARD: from here on a packet is on its way out."""
CSUMNOTREADY = cython.declare(uint32_t, 1)
GSO = cython.declare(uint32_t, 2)
NF_DROP = cython.declare(uint32_t, 0)
NF_ACCEPT = cython.declare(uint32_t, 1)
GATHER_FROM = cython.declare(cython.Py_ssize_t, 4)
GATHER_BELOW = cython.declare(cython.Py_ssize_t, 48)
"""Packets in a batch that say that more are on their way, and that it was read too early."""
GATHER_MANY = cython.declare(cython.Py_ssize_t, 8)
GATHER_NANOSECONDS = cython.declare(cython.long, 50000)
GATHER_LONG = cython.declare(cython.long, 200000)
"""From ``GATHER_MANY`` on: a stream of 40,000 a second and more."""
MAX_BATCH = cython.declare(cython.Py_ssize_t, 256)
MAX_QUEUES = cython.declare(cython.Py_ssize_t, 64)
MAX_DEVICES = cython.declare(cython.Py_ssize_t, 256)
VNET = cython.declare(cython.Py_ssize_t, 10)
"""Octets of a virtio-net header."""
ROOM = cython.declare(cython.Py_ssize_t, VNET + 65536)
DEVICE_PACKETS = cython.declare(cython.Py_ssize_t, 64)
RING_PACKETS = cython.declare(cython.Py_ssize_t, 64)
DEVICE_OCTETS = cython.declare(cython.Py_ssize_t, 1 << 18)
"""A batch from a device ends with the packet that passes one of these."""
HEARTBEAT = cython.declare(cython.Py_ssize_t, int(Counter.HEARTBEAT))

BATCHES = cython.declare(cython.Py_ssize_t, int(Counter.BATCHES))
BUSY_NS = cython.declare(cython.Py_ssize_t, int(Counter.BUSY_NS))
HISTOGRAM_BASE = cython.declare(cython.Py_ssize_t, _HISTOGRAM_BASE)
HISTOGRAM_SUM_NS = cython.declare(cython.Py_ssize_t, _HISTOGRAM_SUM_NS)


@cython.cclass
class Reader:
    """Reads a worker's queues and devices.

    ``done`` is how many packets of the last batch are finished; ``partial``: the one behind these is a super-packet of
    which ``opener.rest`` is left.  ``lost`` are verdicts that the kernel did not take, which have to go first.
    ``left`` is the packet of a device that is the engine's: size of segments (0: none), whether unfinished, octets.
    """

    _sealer: Sealer
    _opener: Opener
    _stolen: uint32_t
    _sockets: uint32_t
    _bounds: uint64_t[32]
    _bound_count: cython.Py_ssize_t
    _verdicts: cython.uchar[10240]
    _used: cython.Py_ssize_t
    _previous: cython.Py_ssize_t
    _supers: cython.bint
    _queues: cython.int[64]
    _vectors: uint64_t[64]
    _counts: cython.Py_ssize_t[64]
    _devices: cython.int[256]
    _tags: uint32_t[256]
    _device_count: cython.Py_ssize_t
    _room: cython.p_uchar
    left = cython.declare(object, visibility="public")
    _headers: list
    _rings: dict
    _queue_count: cython.Py_ssize_t
    lost = cython.declare(bytes, visibility="public")
    done = cython.declare(cython.Py_ssize_t, visibility="readonly")
    partial = cython.declare(cython.bint, visibility="public")

    def __cinit__(self, *_):
        self._room = cython.cast(cython.p_uchar, malloc(ROOM))
        if self._room == cython.NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._room)

    def __init__(self, sealer: Sealer, opener: Opener, stolen, sockets):
        """``stolen`` marks originals that egress has to drop, ``sockets`` are the mark's bits of socket policies."""
        self._sealer, self._opener, self._stolen, self._sockets = sealer, opener, stolen, sockets
        self._headers, self._queue_count, self._device_count, self.lost, self.left = [], 0, 0, b"", None
        self._rings = {}
        self._bound_count = 0
        for bound in HISTOGRAM_BOUNDS:
            self._bounds[self._bound_count] = round(bound * 1e9)
            self._bound_count += 1

    def register(self, descriptor: cython.int, vector: uint64_t, count: cython.Py_ssize_t, header: bytes):
        """A queue that :meth:`serve` reads: into ``count`` messages at ``vector`` (struct mmsghdr).

        ``header`` is what a verdict message has behind its length.
        """
        if self._queue_count < MAX_QUEUES:
            self._queues[self._queue_count] = descriptor
            self._vectors[self._queue_count] = vector
            self._counts[self._queue_count] = min(count, MAX_BATCH)
            self._headers.append(header)
            self._queue_count += 1

    def ring(self, ring: Ring):
        """A packet ring that :meth:`serve` reads."""
        self._rings[ring.descriptor] = ring

    def attach(self, descriptor: cython.int, tag: uint32_t):
        """A device of a route-based tunnel that :meth:`serve` reads; ``tag`` is its reqid."""
        self.detach(descriptor)
        if self._device_count < MAX_DEVICES:
            self._devices[self._device_count] = descriptor
            self._tags[self._device_count] = tag
            self._device_count += 1

    def detach(self, descriptor: cython.int):
        """Somebody else's from now on."""
        index: cython.Py_ssize_t
        for index in range(self._device_count):
            if self._devices[index] == descriptor:
                self._device_count -= 1
                self._devices[index] = self._devices[self._device_count]
                self._tags[index] = self._tags[self._device_count]
                break

    def serve(self, poll: cython.int, until: cython.double):
        """Wait and work, up to ``until`` (monotonic seconds) or to the first thing that somebody else has to look at.

        Returns a descriptor that is readable, or -1, and the number of messages that were read of it: for a queue that
        is registered, of which ``done`` are finished; -errno where reading failed.  For a device that is attached, ``left``
        is a packet that was read and is not finished.
        """
        event: epoll_event
        ready: cython.int
        index: cython.Py_ssize_t
        place: cython.Py_ssize_t
        got: cython.int
        left: cython.double
        counters: cython.pointer(uint64_t) = self._sealer.counters
        while True:
            left = until - _nanoseconds(CLOCK_MONOTONIC) / 1e9
            if left <= 0:
                return -1, 0
            # One at a time: what is ready comes in turns, however much of it one queue has.
            with cython.nogil:
                ready = epoll_wait(poll, cython.address(event), 1, cython.cast(cython.int, left * 1000) + 1)
            counters[HEARTBEAT] += 1
            if ready <= 0:
                return -1, 0  # the time is up, or a signal came
            place = -1
            for index in range(self._queue_count):
                if self._queues[index] == event.data.fd:
                    place = index
            if place < 0:
                got = self._step_ring(event.data.fd)
                if got > 0:
                    if GATHER_FROM <= got < GATHER_BELOW:
                        self._gather(GATHER_NANOSECONDS if got < GATHER_MANY else GATHER_LONG)
                    continue
                for index in range(self._device_count):
                    if self._devices[index] == event.data.fd:
                        place = index
                if place >= 0 and self._step_device(place) and not self._sealer.failed:
                    continue
                return event.data.fd, 0
            got = self.step(place)
            if got < 0 or self.done < got or self.lost or self._sealer.failed:
                return event.data.fd, got
            if GATHER_FROM <= got < GATHER_BELOW and not self._supers:
                self._gather(GATHER_NANOSECONDS if got < GATHER_MANY else GATHER_LONG)

    @cython.ccall
    @cython.exceptval(check=True)
    def step(self, index: cython.Py_ssize_t) -> cython.int:
        """Read a batch from a queue that is registered and do what can be done: messages read, or -errno."""
        messages: cython.pointer(mmsghdr) = cython.cast(cython.pointer(mmsghdr), self._vectors[index])
        count: cython.uint = cython.cast(cython.uint, self._counts[index])
        got: cython.int = recvmmsg(self._queues[index], messages, count, MSG_DONTWAIT, cython.NULL)
        self.done = 0
        if got < 0:
            return 0 if errno in (EAGAIN, EINTR) else -errno
        if got:
            self.go_on(index, 0, got)
        return got

    @cython.ccall
    @cython.exceptval(-1, check=False)
    def go_on(self, index: cython.Py_ssize_t, first: cython.Py_ssize_t, got: cython.Py_ssize_t) -> cython.int:
        """Go on with message ``first`` of the ``got`` that were read from a queue; ``done`` are finished then."""
        messages: cython.pointer(mmsghdr) = cython.cast(cython.pointer(mmsghdr), self._vectors[index])
        header: bytes = self._headers[index]
        began: uint64_t = _nanoseconds(CLOCK_MONOTONIC)
        now: cython.double = _nanoseconds(CLOCK_REALTIME) / 1e9
        place: cython.Py_ssize_t
        taken: cython.int = 1
        self.done, self.partial, self._used, self._previous, self._supers = first, False, 0, -1, False
        for place in range(first, got):
            taken = self._message(
                cython.cast(cython.p_uchar, messages[place].msg_hdr.msg_iov.iov_base), messages[place].msg_len, header, now
            )
            if taken != 1:
                break
            self.done += 1
        self.partial = taken == 2
        # A connection's first packet, which connection tracking confirms by its verdict, was the engine's: no need to wait
        # (Sealer.packet; verdicts first would cost a round trip a tenth of a millisecond).
        self._sealer.flush()
        self._opener.flush()
        if self._used and send(self._queues[index], self._verdicts, self._used, 0) < 0:
            self.lost += PyBytes_FromStringAndSize(cython.cast(cython.p_char, self._verdicts), self._used)
        if self.done > first:
            self._account(began, self.done - first)
        return 0

    @cython.cfunc
    @cython.exceptval(check=False)
    def _gather(self, nanoseconds: cython.long) -> cython.void:
        """Let packets gather, in a stream of small ones: what a batch costs, here and at the far end, more then share."""
        wanted: timespec
        wanted.tv_sec, wanted.tv_nsec = 0, nanoseconds
        with cython.nogil:
            nanosleep(cython.address(wanted), cython.NULL)

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _step_ring(self, descriptor: cython.int) -> cython.int:
        """Open what is in a ring: packets; 0: there is something that somebody else has to look at, or it is no ring."""
        ring: Ring = self._rings.get(descriptor)
        if ring is None:
            return 0
        began: uint64_t = _nanoseconds(CLOCK_MONOTONIC)
        count: cython.Py_ssize_t = ring.take(self._opener, RING_PACKETS, _nanoseconds(CLOCK_REALTIME) / 1e9)
        self._opener.flush()
        if count:
            self._account(began, count)
        return 0 if ring.stopped else count

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _step_device(self, index: cython.Py_ssize_t) -> cython.int:
        """Seal what was routed into a device; 0: there is something that somebody else has to look at."""
        began: uint64_t = _nanoseconds(CLOCK_MONOTONIC)
        now: cython.double = _nanoseconds(CLOCK_REALTIME) / 1e9
        at: cython.p_uchar = self._room
        count: cython.Py_ssize_t = 0
        octets: cython.Py_ssize_t = 0
        got: cython.Py_ssize_t
        words: uint16_t[2]
        fine: cython.int = 1
        while count < DEVICE_PACKETS and octets < DEVICE_OCTETS:
            got = read(self._devices[index], at, ROOM)
            if got <= VNET:
                fine = got < 0 and errno == EAGAIN
                break
            # struct virtio_net_hdr: flags, gso_type, hdr_len, gso_size, …
            memcpy(words, at + 2, 4)
            if not at[1]:
                words[1] = 0
            if not self._sealer.packet(
                at + VNET, got - VNET, at[0] & 1, words[1] != 0, words[1], 0, self._tags[index], now
            ):
                self.left = (
                    words[1], at[0] & 1 != 0, PyBytes_FromStringAndSize(cython.cast(cython.p_char, at + VNET), got - VNET),
                )  # fmt: skip
                fine = 0
                break
            count += 1
            octets += got
        self._sealer.flush()
        if count:
            self._account(began, count)
        return fine

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _message(
        self, at: cython.p_uchar, size: cython.Py_ssize_t, header: bytes, now: cython.double
    ) -> cython.int:
        """One message of the queue: as :meth:`Opener.packet` says."""
        kind: uint16_t
        length: uint16_t
        place: cython.Py_ssize_t = FIRST + 12
        mark: uint32_t = 0
        info: uint32_t = 0
        start: cython.Py_ssize_t = 0
        end: cython.Py_ssize_t = 0
        if size < FIRST + 12:
            return 0
        memcpy(cython.address(kind), at + 4, 2)
        memcpy(cython.address(length), at + FIRST, 2)
        if kind != MSG_PACKET or length != 11:
            return 0
        memcpy(cython.address(kind), at + FIRST + 2, 2)
        if kind != 1:  # NFQA_PACKET_HDR comes first
            return 0
        while place + 4 <= size:
            memcpy(cython.address(length), at + place, 2)
            memcpy(cython.address(kind), at + place + 2, 2)
            kind &= 0x3FFF
            if length < 4 or place + length > size:
                return 0
            if kind == 3 and length == 8:  # NFQA_MARK
                mark = get32(at + place + 4)
            elif kind == 10:  # NFQA_PAYLOAD
                start, end = place + 4, place + length
            elif kind == 13:  # NFQA_CAP_LEN: it did not fit
                return 0
            elif kind == 14 and length == 8:  # NFQA_SKB_INFO
                info = get32(at + place + 4)
            place += (length + 3) & ~3
        if end <= start:
            return 0
        taken: cython.int
        if info & GSO:
            self._supers = True
        if at[30] < FORWARD:
            taken = self._opener.packet(at + start, end - start, info & GSO != 0, now)
            if taken == 1:
                self._verdict(header, at + 24, NF_DROP, 0, False)
        else:
            taken = self._sealer.packet(
                at + start, end - start, info & CSUMNOTREADY != 0, info & GSO != 0, 0, mark & self._sockets, 0, now
            )
            if taken == 1:
                self._verdict(header, at + 24, NF_ACCEPT, mark | self._stolen, True)
        return taken

    @cython.cfunc
    @cython.exceptval(check=False)
    def _verdict(
        self, header: bytes, cookie: cython.p_uchar, verdict: uint32_t, mark: uint32_t, marked: cython.bint
    ) -> cython.void:
        """Note a batch verdict; one like the last one takes its place (:meth:`ipsecq.datapath.queue.Queue.add_verdict`)."""
        size: uint32_t = 40 if marked else 32
        before: cython.p_uchar = self._verdicts + (self._previous if self._previous >= 0 else 0)
        if (
            self._previous < 0
            or self._used - self._previous != size
            or get32(before + 24) != verdict
            or (marked and get32(before + 36) != mark)
        ):
            self._previous = self._used
            before = self._verdicts + self._used
            self._used += size
            memcpy(before, cython.address(size), 4)
            memcpy(before + 4, PyBytes_AS_STRING(header), 16)
            _attribute(before + 20, 12, 2)  # NFQA_VERDICT_HDR
            put32(before + 24, verdict)
            if marked:
                _attribute(before + 32, 8, 3)  # NFQA_MARK
                put32(before + 36, mark)
        memcpy(before + 28, cookie, 4)

    @cython.cfunc
    @cython.exceptval(check=False)
    def _account(self, began: uint64_t, count: cython.Py_ssize_t) -> cython.void:
        """How long the batch took, and each of its packets."""
        elapsed: uint64_t = _nanoseconds(CLOCK_MONOTONIC) - began
        counters: cython.pointer(uint64_t) = self._sealer.counters
        each: uint64_t = elapsed // cython.cast(uint64_t, count)
        bucket: cython.Py_ssize_t = 0
        while bucket < self._bound_count and self._bounds[bucket] < each:
            bucket += 1
        counters[BATCHES] += 1
        counters[BUSY_NS] += elapsed
        counters[HISTOGRAM_BASE + bucket] += count
        counters[HISTOGRAM_SUM_NS] += elapsed


@cython.cfunc
@cython.exceptval(check=False)
def _attribute(at: cython.p_uchar, length: uint16_t, kind: uint16_t) -> cython.void:
    memcpy(at, cython.address(length), 2)
    memcpy(at + 2, cython.address(kind), 2)


@cython.cfunc
@cython.exceptval(check=False)
def _nanoseconds(clock: cython.int) -> uint64_t:
    now: timespec
    clock_gettime(clock, cython.address(now))
    return cython.cast(uint64_t, now.tv_sec) * 1000000000 + cython.cast(uint64_t, now.tv_nsec)
