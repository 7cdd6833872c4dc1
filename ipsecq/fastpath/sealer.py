# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""The fast way out: packets of flows that the engine has decided about, sealed and sent without an object for any of them.

Nothing is decided here.  :class:`Sealer` knows the flows that it was told (:mod:`ipsecq.datapath.fast`), each with the one
ESP tunnel that protects it, and does for their packets what :class:`ipsecq.engine.outbound.Outbound` would do, in the same
order.  Whatever is not as simple as that it leaves alone: fragments, options, packets too long for the tunnel or for a
limit of the SA.
"""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.buffer import PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.cimports.ipsecq.compiled.octets import folded, get16, get32, native, put16, put32, put_checksum, words
from cython.cimports.ipsecq.fastpath.heads import Head, read_head
from cython.cimports.ipsecq.fastpath.known import Flow, Way, address_of
from cython.cimports.ipsecq.fastpath.sockets import (
    MSG_DONTWAIT,
    iovec,
    mmsghdr,
    msghdr,
    sendmmsg,
    sendmsg,
)
from cython.cimports.libc.errno import EAGAIN, EINTR, ENOBUFS, ENOMEM, errno
from cython.cimports.libc.stdint import uint16_t, uint32_t, uint64_t
from cython.cimports.libc.stdlib import calloc, free, malloc
from cython.cimports.libc.string import memcmp, memcpy

from ipsecq.counters import Counter
from ipsecq.sa.association import Slot

HEAD = cython.declare(cython.Py_ssize_t, 16)
ARENA = cython.declare(cython.Py_ssize_t, 1 << 18)
"""Octets of finished datagrams that wait for one sendmmsg."""
VECTOR = cython.declare(cython.Py_ssize_t, 128)
MAX_BURST = cython.declare(cython.Py_ssize_t, 64)
"""Datagrams in one burst (UDP_MAX_SEGMENTS before Linux 6.9)."""
MAX_BURST_OCTETS = cython.declare(cython.Py_ssize_t, 65535 - 48)
MAX_FLOWS = cython.declare(cython.Py_ssize_t, 65536)

SEQUENCE = cython.declare(cython.Py_ssize_t, int(Slot.SEQUENCE))
OUT_PACKETS = cython.declare(cython.Py_ssize_t, int(Counter.OUT_PACKETS))
OUT_BYTES = cython.declare(cython.Py_ssize_t, int(Counter.OUT_BYTES))
FLOW_HIT = cython.declare(cython.Py_ssize_t, int(Counter.FLOW_HIT))
ESP_TUNNEL = cython.declare(cython.Py_ssize_t, int(Counter.ESP_TUNNEL))
ESP_OUTPUT = cython.declare(cython.Py_ssize_t, int(Counter.ESP_OUTPUT))
ESP_OBYTES = cython.declare(cython.Py_ssize_t, int(Counter.ESP_OBYTES))
FAST = cython.declare(cython.Py_ssize_t, int(Counter.FAST_PACKETS))
SUPER_PACKETS = cython.declare(cython.Py_ssize_t, int(Counter.SUPER_PACKETS))
SEND_FAILED = cython.declare(cython.Py_ssize_t, int(Counter.SEND_FAILED))


@cython.cclass
class Sealer:
    """The flows that are known here, and what they send.

    ``flows`` holds :class:`Flow` by key.  ``failed`` holds bursts and datagrams that the kernel did not take for a reason
    other than a lack of room.
    """

    def __cinit__(self, counters, table, collect: bool = False):
        """``counters`` and ``table`` are memoryviews of 64-bit words; with ``collect`` nothing is sent."""
        self._counters_owner, self.counters = counters, address_of(counters)
        self._words_owner, self.words = table, address_of(table)
        self.flows, self.failed = {}, []
        self.collected = [] if collect else None
        self._octets = cython.cast(cython.p_uchar, malloc(1 << 17))
        self._arena = cython.cast(cython.p_uchar, malloc(ARENA))
        self._messages = cython.cast(cython.pointer(mmsghdr), calloc(VECTOR, cython.sizeof(mmsghdr)))
        self._vector = cython.cast(cython.pointer(iovec), calloc(VECTOR, cython.sizeof(iovec)))
        self._names = []
        if (
            self._octets == cython.NULL
            or self._arena == cython.NULL
            or self._messages == cython.NULL
            or self._vector == cython.NULL
        ):
            raise MemoryError

    def __dealloc__(self):
        free(self._octets)
        free(self._arena)
        free(self._messages)
        free(self._vector)

    def clear(self):
        """Something has changed: forget all flows."""
        self.flows.clear()
        self._last = None
        self._key_length = 0

    def add(self, key: bytes, flow: Flow):
        """Know a flow from now on."""
        if len(self.flows) >= MAX_FLOWS:
            self.clear()
        self.flows[key] = flow
        self._last = None
        self._key_length = 0

    def seal(
        self, packet, unfinished: bool, gso: bool, size: cython.Py_ssize_t, mark: uint32_t, tag: uint32_t,
        now: cython.double,
    ) -> bool:  # fmt: skip
        """Take one packet; False: it is left to the engine, and nothing has happened.  See :meth:`packet`."""
        view: cython.Py_buffer
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        try:
            return self.packet(cython.cast(cython.p_uchar, view.buf), view.len, unfinished, gso, size, mark, tag, now) == 1
        finally:
            PyBuffer_Release(cython.address(view))

    def finish(self):
        """Send what waits."""
        self.flush()

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def packet(
        self, at: cython.p_uchar, captured: cython.Py_ssize_t, unfinished: cython.bint, gso: cython.bint,
        size: cython.Py_ssize_t, mark: uint32_t, tag: uint32_t, now: cython.double,
    ) -> cython.int:  # fmt: skip
        """Seal one packet: 1, or 0 where it is left alone.

        ``gso``: a super-packet, of segments with ``size`` octets of data; 0: as large as the flow's.  ``mark`` is that
        of the sending socket's policy, ``tag`` the reqid of the interface that it was routed into, or 0.
        """
        head: Head
        key: cython.uchar[64]
        if not read_head(at, captured, cython.address(head), key):
            return 0
        length: cython.Py_ssize_t = head.length
        offset: cython.Py_ssize_t = head.offset
        protocol: cython.int = head.protocol
        if (gso and protocol != 6) or (unfinished and protocol != 6 and protocol != 17):
            return 0
        put32(key + head.flow, mark)
        put32(key + head.flow + 4, tag)
        flow: Flow = self._find(key, head.flow + 8)
        # A flow that paused for a second is the engine's again: its connection may have run out meanwhile.
        if flow is None or now >= flow.mtu_until:
            return 0
        # And so is what begins another connection in the same flow: nobody may see its answer before its verdict, by which
        # connection tracking confirms it.
        if protocol == 6:
            if at[offset + 13] & 2:  # SYN
                return 0
        elif protocol != 17 and get16(at + offset + 4) != flow.identifier:
            flow.identifier = get16(at + offset + 4)
            return 0
        way: Way = flow.way
        count: cython.Py_ssize_t = 1
        header: cython.Py_ssize_t = 0
        data: cython.Py_ssize_t = 0
        longest: cython.Py_ssize_t = length
        octets: cython.Py_ssize_t = length
        if gso:
            header = offset + (at[offset + 12] >> 4) * 4
            data = length - header
            if not size:
                size = flow.size if now < flow.size_until else 0
                # A sender cuts at multiples of its size, but where it has no more to send (see gso.py).
                if size and data % size and not at[offset + 13] & 8:
                    size = 0
            if size <= 0 or data <= size or header < offset + 20:
                return 0
            count = (data + size - 1) // size
            longest = header + size
            octets = data + count * header
        if way.headers + way.aead._sealed(longest) > flow.mtu:
            return 0
        if not way.limits.allow(self.words, count, octets, now):
            return 0
        number: uint64_t = way.take(count)
        if not number:
            return 0
        way.limits.charge(self.words, count, octets, now)
        self.words[way.limits.base + SEQUENCE] = number + count - 1
        self.counters[OUT_PACKETS] += count
        self.counters[OUT_BYTES] += length + (count - 1) * header
        self.counters[FLOW_HIT] += count
        self.counters[FAST] += count
        self.counters[ESP_TUNNEL] += count
        self.counters[ESP_OUTPUT] += count
        self.counters[ESP_OBYTES] += octets
        pseudo: uint32_t = 0
        if gso or unfinished:
            pseudo = folded(words(at + 12, 8) if offset == 20 else words(at + 8, 32))
            pseudo = (pseudo & 0xFF) << 8 | pseudo >> 8 if native(1) != 1 else pseudo
            pseudo += protocol
        df: cython.bint = way.dfbit == 1 or (way.dfbit == 2 and head.df)
        tos: cython.uchar = head.tos & way.tos_mask
        label: uint32_t = head.label
        next_header: cython.int = 4 if offset == 20 else 41
        to: cython.p_uchar
        if not gso:
            to = self._place(way, way.aead._sealed(length), tos, df, label, number)
            memcpy(to + HEAD, at, length)
            if unfinished:
                _complete(to + HEAD + offset, length - offset, pseudo, protocol == 17)
            way.aead._seal_at(to, length, next_header, way.spi, number, way.esn)
            return 1
        self.counters[SUPER_PACKETS] += 1
        index: cython.Py_ssize_t
        part: cython.Py_ssize_t = size
        for index in range(count):
            if index == count - 1:
                part = data - index * size
            to = self._place(way, way.aead._sealed(header + part), tos, df, label, number + index)
            _cut(to + HEAD, at, offset, header, True, index, index == count - 1, size, part, pseudo)
            way.aead._seal_at(to, header + part, next_header, way.spi, number + index, way.esn)
        return 1

    @cython.cfunc
    def _find(self, key: cython.p_uchar, used: cython.Py_ssize_t) -> Flow:
        """The flow with this key, or None.  Packets of one flow come one behind the other."""
        if used == self._key_length and self._last is not None and memcmp(key, self._key, used) == 0:
            return self._last
        found = self.flows.get(PyBytes_FromStringAndSize(cython.cast(cython.p_char, key), used))
        if found is not None:
            self._last = found
            memcpy(self._key, key, used)
            self._key_length = used
        return found

    # -- what leaves -----------------------------------------------------------------------------------------

    @cython.cfunc
    @cython.exceptval(check=True)
    def _place(
        self, way: Way, length: cython.Py_ssize_t, tos: cython.uchar, df: cython.bint, label: uint32_t, number: uint64_t
    ) -> cython.p_uchar:
        """Where an ESP packet of ``length`` octets is to be made: in a burst, or behind an outer header."""
        at: cython.p_uchar
        if way.bursts:
            if self._count and (
                self._way is not way
                or self._closed
                or self._count == MAX_BURST
                or length > self._stride
                or self._filled + length > MAX_BURST_OCTETS
                or self._tos != tos
                or self._df != df
                or self._label != label
            ):
                self._flush_burst()
            if not self._count:
                if self._waiting:
                    self._flush_datagrams()
                self._way, self._tos, self._df, self._label, self._first = way, tos, df, label, number
                self._stride, self._closed, self._filled = length, False, 0
            at = self._octets + self._filled
            self._filled += length
            self._count += 1
            self._closed = length < self._stride
            return at
        if self._count:
            self._flush_burst()
        room: cython.Py_ssize_t = way.headers + length
        if self._waiting and (
            self._waiting == VECTOR or self._used + room > ARENA or self._socket != way.plain_socket
        ):
            self._flush_datagrams()
        self._socket = way.plain_socket
        at = self._arena + self._used
        memcpy(at, PyBytes_AS_STRING(way.front), way.headers)
        if at[0] >> 4 == 4:
            at[1] = tos
            put16(at + 2, cython.cast(uint32_t, room))
            put16(at + 4, cython.cast(uint32_t, way.identification + number))
            at[6] = 0x40 if df else 0
            put16(at + 10, 0)
            put_checksum(at + 10, words(at, 20), False)
            if way.headers > 20:
                put16(at + 24, cython.cast(uint32_t, room - 20))
        else:
            put32(at, 0x60000000 | cython.cast(uint32_t, tos) << 20 | label)
            put16(at + 4, cython.cast(uint32_t, room - 40))
        message: cython.pointer(mmsghdr) = self._messages + self._waiting
        self._vector[self._waiting].iov_base = at
        self._vector[self._waiting].iov_len = room
        message.msg_hdr.msg_iov = self._vector + self._waiting
        message.msg_hdr.msg_iovlen = 1
        message.msg_hdr.msg_name = PyBytes_AS_STRING(way.name)
        message.msg_hdr.msg_namelen = cython.cast(cython.uint, len(way.name))
        self._names.append(way)  # its name must live as long as the pointer
        self._waiting += 1
        self._used += room
        return at + way.headers

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def flush(self) -> cython.int:
        """Send the open burst and the datagrams that wait."""
        if self._count:
            self._flush_burst()
        if self._waiting:
            self._flush_datagrams()
        return 0

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _flush_burst(self) -> cython.int:
        way: Way = self._way
        count: cython.Py_ssize_t = self._count
        filled: cython.Py_ssize_t = self._filled
        message: msghdr
        vector: iovec
        control: cython.uchar[256]
        size: uint16_t = cython.cast(uint16_t, self._stride)
        kept: cython.Py_ssize_t = len(way.options)
        skip: cython.Py_ssize_t = 0 if count > 1 else 24  # a lone datagram needs no UDP_SEGMENT
        socket: cython.int = way.df_socket if self._df else way.plain_socket
        self._count = self._filled = 0
        if self.collected is not None:
            self.collected.append(self._as_burst(way, count, filled))
            return 0
        memcpy(control, PyBytes_AS_STRING(way.options), kept)
        memcpy(control + 16, cython.address(size), 2)
        # TOS or traffic class is an int in the second control message, the flow label in the last one.
        value: cython.int = self._tos
        memcpy(control + 24 + 16, cython.address(value), 4)
        if way.front[0] >> 4 == 6:
            put32(control + kept - 8, self._label)
            if not self._label:
                kept -= 24
        vector.iov_base, vector.iov_len = self._octets, filled
        message.msg_name, message.msg_namelen = PyBytes_AS_STRING(way.name), cython.cast(cython.uint, len(way.name))
        message.msg_iov, message.msg_iovlen = cython.address(vector), 1
        message.msg_control, message.msg_controllen = control + skip, kept - skip
        message.msg_flags = 0
        if sendmsg(socket, cython.address(message), MSG_DONTWAIT) < 0:
            if errno in (EAGAIN, ENOBUFS, ENOMEM):
                self.counters[SEND_FAILED] += count
            else:
                self.failed.append(self._as_burst(way, count, filled))
        return 0

    @cython.cfunc
    def _as_burst(self, way: Way, count: cython.Py_ssize_t, filled: cython.Py_ssize_t):
        octets: bytes = PyBytes_FromStringAndSize(cython.cast(cython.p_char, self._octets), filled)
        identification: cython.int = (way.identification + self._first) & 0xFFFF
        return way.burst(self._tos, self._df, self._label, identification, self._stride, count, octets)

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _flush_datagrams(self) -> cython.int:
        total: cython.Py_ssize_t = self._waiting
        first: cython.Py_ssize_t = 0
        sent: cython.int
        self._waiting = self._used = 0
        if self.collected is not None:
            for first in range(total):
                self.collected.append(self._datagram(first))
            self._names.clear()
            return 0
        while first < total:
            sent = sendmmsg(self._socket, self._messages + first, cython.cast(cython.uint, total - first), MSG_DONTWAIT)
            if sent > 0:
                first += sent
            elif errno == EAGAIN:
                # The socket buffer is full and stays so for a while: a drop now beats a queue here.
                self.counters[SEND_FAILED] += total - first
                break
            elif errno != EINTR:
                self.failed.append(self._datagram(first))
                first += 1
        self._names.clear()
        return 0

    @cython.cfunc
    def _datagram(self, index: cython.Py_ssize_t) -> bytes:
        vector: cython.pointer(iovec) = self._vector + index
        return PyBytes_FromStringAndSize(cython.cast(cython.p_char, vector.iov_base), vector.iov_len)


@cython.cfunc
@cython.nogil
@cython.exceptval(check=False)
def _cut(
    to: cython.p_uchar, octets: cython.p_uchar, offset: cython.Py_ssize_t, header: cython.Py_ssize_t, tcp: cython.bint,
    index: cython.Py_ssize_t, last: cython.bint, size: cython.Py_ssize_t, data: cython.Py_ssize_t, pseudo: uint32_t,
) -> cython.void:  # fmt: skip
    """One segment of a super-packet: number ``index``, of ``data`` octets."""
    upper: cython.p_uchar = to + offset
    field: cython.Py_ssize_t = 16 if tcp else 6
    memcpy(to, octets, header)
    memcpy(to + header, octets + header + index * size, data)
    if octets[0] >> 4 == 4:
        put16(to + 2, cython.cast(uint32_t, header + data))
        put16(to + 4, get16(octets + 4) + cython.cast(uint32_t, index))
        put16(to + 10, 0)
        put_checksum(to + 10, words(to, (octets[0] & 15) * 4), False)
    else:
        put16(to + 4, cython.cast(uint32_t, header + data - 40))
    if tcp:
        put32(upper + 4, get32(octets + offset + 4) + cython.cast(uint32_t, index * size))
        if index:
            upper[13] &= 0x7F  # CWR stays with the first segment (RFC 3168 section 6.1.2)
        if not last:
            upper[13] &= 0xF6  # FIN and PSH are the last one's
    else:
        put16(upper + 4, cython.cast(uint32_t, header - offset + data))
    put16(upper + field, 0)
    put_checksum(
        upper + field,
        words(upper, header - offset + data) + native(cython.cast(uint32_t, (pseudo + header - offset + data) % 65535)),
        not tcp,
    )


@cython.cfunc
@cython.exceptval(check=False)
def _complete(upper: cython.p_uchar, length: cython.Py_ssize_t, pseudo: uint32_t, udp: cython.bint) -> cython.void:
    """Fill in a TCP or UDP checksum."""
    field: cython.p_uchar = upper + (6 if udp else 16)
    put16(field, 0)
    put_checksum(field, words(upper, length) + native(cython.cast(uint32_t, (pseudo + length) % 65535)), udp)
