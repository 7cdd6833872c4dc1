# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""The fast way in: ESP in tunnel mode opened, put together and given to the kernel without an object for any packet.

Nothing is decided here.  :class:`Opener` knows SAs, and for each the flows inside it that the inbound policy has let in
(:mod:`ipsecq.datapath.fast`), and does for their packets what :class:`ipsecq.engine.inbound.Inbound` would do, in the same
order.  Whatever is not as simple as that it leaves alone, before anything has changed.
"""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.cpython.buffer import PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cython.cimports.cpython.bytes import PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cython.cimports.ipsecq.compiled.aead import Aead
from cython.cimports.ipsecq.compiled.octets import get16, get32, put16, put32, put64
from cython.cimports.ipsecq.fastpath.heads import Head, read_head
from cython.cimports.ipsecq.fastpath.known import Sa, Target, address_of
from cython.cimports.ipsecq.fastpath.runs import follows, is_long, is_right, may_begin, write_head
from cython.cimports.ipsecq.fastpath.sockets import iovec, writev
from cython.cimports.libc.errno import EIO, errno
from cython.cimports.libc.stdint import int64_t, uint16_t, uint32_t, uint64_t
from cython.cimports.libc.stdlib import free, malloc
from cython.cimports.libc.string import memcmp, memcpy, memset

from ipsecq.counters import Counter
from ipsecq.packet.rows import MAX_DATAGRAMS as _MAX_DATAGRAMS
from ipsecq.sa.association import Slot

HEAD = cython.declare(cython.Py_ssize_t, 16)
VNET = cython.declare(cython.Py_ssize_t, 10)
"""Octets of a virtio-net header."""
MAX_LENGTH = cython.declare(cython.Py_ssize_t, 65535)
MAX_DATAGRAM = cython.declare(cython.Py_ssize_t, 16384)
"""Octets in which the second datagram of a super-packet is looked for."""
MAX_DATAGRAMS = cython.declare(cython.Py_ssize_t, _MAX_DATAGRAMS)
MAX_FLOWS = cython.declare(cython.Py_ssize_t, 65536)

IN_PACKETS = cython.declare(cython.Py_ssize_t, int(Counter.IN_PACKETS))
IN_BYTES = cython.declare(cython.Py_ssize_t, int(Counter.IN_BYTES))
IN_DELIVERED = cython.declare(cython.Py_ssize_t, int(Counter.IN_DELIVERED))
ESP_INPUT = cython.declare(cython.Py_ssize_t, int(Counter.ESP_INPUT))
ESP_IBYTES = cython.declare(cython.Py_ssize_t, int(Counter.ESP_IBYTES))
FAST = cython.declare(cython.Py_ssize_t, int(Counter.FAST_PACKETS))
REPLAY = cython.declare(cython.Py_ssize_t, int(Slot.REPLAY))
BADAUTH = cython.declare(cython.Py_ssize_t, int(Slot.BADAUTH))
ESP_REPLAY = cython.declare(cython.Py_ssize_t, int(Counter.ESP_REPLAY))
ESP_BADAUTH = cython.declare(cython.Py_ssize_t, int(Counter.ESP_BADAUTH))
COALESCED = cython.declare(cython.Py_ssize_t, int(Counter.COALESCED))
INJECT_FAILED = cython.declare(cython.Py_ssize_t, int(Counter.INJECT_FAILED))


@cython.cclass
class Opener:
    """The SAs that are known here, and the run of opened packets that may still grow.

    ``sas`` holds :class:`Sa` by key.  Of the packet that was left alone last, ``refused_sa`` is the key, or the
    :class:`Sa` itself where ``refused_flow`` inside it is not known; ``rest`` are datagrams of a super-packet that were
    left when others had been delivered.  ``refusing``: replays and forgeries under the SAs that are known are dropped here,
    too; else they are the engine's, which can tell of them.
    """

    def __cinit__(self, counters, table, ports, collect: bool = False):
        """``ports``: UDP ports on which ESP arrives, four at most; with ``collect`` nothing is written."""
        self._counters_owner, self.counters = counters, address_of(counters)
        self._words_owner, self.words = table, address_of(table)
        self.sas, self.refused_sa, self.refused_flow, self.rest = {}, None, None, []
        self.collected = [] if collect else None
        self.refusing = False
        self._port_count = 0
        for port in sorted(ports)[:4]:
            self._ports[self._port_count] = port
            self._port_count += 1
        self._scratch = cython.cast(cython.p_uchar, malloc(1 << 17))
        self._run = cython.cast(cython.p_uchar, malloc(1 << 17))
        if self._scratch == cython.NULL or self._run == cython.NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self._scratch)
        free(self._run)

    def clear(self):
        """Something has changed: forget all SAs and flows."""
        self.sas.clear()
        self._last = None
        self._last_length = 0

    def add(self, key: bytes, sa: Sa):
        """Know an SA from now on."""
        if len(self.sas) >= MAX_FLOWS:
            self.clear()
        self.sas[key] = sa
        self._last = None
        self._last_length = 0

    def allow(self, sa: Sa, flow: bytes, target: Target):
        """Let a flow inside an SA in from now on, at ``target``."""
        if len(sa.allowed) >= MAX_FLOWS:
            sa.allowed.clear()
        sa.allowed[flow] = target

    def open(self, packet, gso: bool, now: cython.double) -> int:
        """Take one datagram: see :meth:`packet`."""
        view: cython.Py_buffer
        PyObject_GetBuffer(packet, cython.address(view), PyBUF_SIMPLE)
        try:
            return self.packet(cython.cast(cython.p_uchar, view.buf), view.len, gso, now)
        finally:
            PyBuffer_Release(cython.address(view))

    def finish(self):
        """Write the run that is open."""
        self.flush()

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def packet(
        self, at: cython.p_uchar, captured: cython.Py_ssize_t, gso: cython.bint, now: cython.double
    ) -> cython.int:
        """1: delivered or dropped; 0: left alone, nothing has happened; 2: only ``rest`` of a super-packet is left."""
        offset: cython.Py_ssize_t
        length: cython.Py_ssize_t
        protocol: cython.int
        esp: cython.Py_ssize_t
        self.refused_sa = self.refused_flow = None
        if captured < 36:
            return 0
        if at[0] == 0x45:
            # ECN of the outer header is carried over by the engine.
            if get16(at + 6) & 0x3FFF or at[1] & 3:
                return 0
            offset, length, protocol = 20, get16(at + 2), at[9]
        elif at[0] >> 4 == 6 and captured >= 56:
            if at[1] & 0x30:
                return 0
            offset, length, protocol = 40, 40 + get16(at + 4), at[6]
        else:
            return 0
        esp = offset
        if protocol == 17:
            if not self._natt_port(get16(at + offset + 2)) or (not gso and get16(at + offset + 4) != length - offset):
                return 0
            esp += 8
            if get32(at + esp) == 0:
                return 0
        elif protocol != 50 or gso:
            return 0
        if length > captured or length < esp + HEAD:
            return 0
        sa: Sa = self._find(at, offset, esp, protocol == 17)
        if sa is None:
            return 0
        if sa.natt != (protocol == 17):
            return 0
        if sa.natt and (
            get16(at + offset) != sa.peer_port
            or memcmp(sa.peer, at + 12 if offset == 20 else at + 8, 4 if offset == 20 else 16) != 0
        ):
            return 0
        if not gso:
            return self._piece(sa, at + esp, length - esp, esp, now)

        # Nobody says how large the datagrams are, but SPI and next number stand where the second one begins.
        spi: uint32_t = get32(at + esp)
        number: uint32_t = get32(at + esp + 4)
        size: cython.Py_ssize_t = 0
        place: cython.Py_ssize_t
        mark: cython.uchar[8]
        if number == 0xFFFFFFFF:
            return 0
        put32(mark, spi)
        put32(mark + 4, number + 1)
        for place in range(esp + HEAD, min(length - 8, esp + HEAD + MAX_DATAGRAM) + 1):
            if at[place] == mark[0] and memcmp(at + place, mark, 8) == 0:
                size = place - esp
                break
        if not size:
            return 0
        count: cython.Py_ssize_t = (length - esp + size - 1) // size
        index: cython.Py_ssize_t
        if length - esp - (count - 1) * size < HEAD:
            return 0
        for index in range(count):
            place = esp + index * size
            if get32(at + place) != spi or get32(at + place + 4) != cython.cast(uint32_t, number + index):
                return 0
        for index in range(count):
            place = esp + index * size
            if not self._piece(sa, at + place, min(size, length - place), esp, now):
                if not index:
                    return 0
                self.flush()
                while place < length:
                    self.rest.append(_datagram(at, offset, esp, at + place, min(size, length - place)))
                    place += size
                return 2
        return 1

    @cython.cfunc
    def _find(self, at: cython.p_uchar, offset: cython.Py_ssize_t, esp: cython.Py_ssize_t, udp: cython.bint) -> Sa:
        """The SA by destination and SPI, or None."""
        key: cython.uchar[24]
        used: cython.Py_ssize_t = 4 if offset == 20 else 16
        memcpy(key, at + (16 if offset == 20 else 24), used)
        memcpy(key + used, at + esp, 4)
        used += 4
        if used == self._last_length and self._last is not None and memcmp(key, self._last_key, used) == 0:
            self.refused_sa = self._last
            return self._last
        name: bytes = PyBytes_FromStringAndSize(cython.cast(cython.p_char, key), used)
        self.refused_sa = name
        found = self.sas.get(name)
        if found is not None:
            self._last = found
            memcpy(self._last_key, key, used)
            self._last_length = used
            self.refused_sa = found
        return found

    @cython.cfunc
    @cython.exceptval(check=False)
    def _natt_port(self, port: uint32_t) -> cython.bint:
        index: cython.Py_ssize_t
        for index in range(self._port_count):
            if self._ports[index] == port:
                return True
        return False

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _piece(
        self, sa: Sa, at: cython.p_uchar, length: cython.Py_ssize_t, extra: cython.Py_ssize_t, now: cython.double
    ) -> cython.int:
        """Open the ESP packet of ``length`` octets at ``at``, behind ``extra`` others; 0: left alone."""
        aead: Aead = sa.aead
        count: cython.Py_ssize_t = length - HEAD - aead.icv_length
        aad: cython.uchar[12]
        inner: cython.p_uchar = self._scratch
        pad: cython.Py_ssize_t
        index: cython.Py_ssize_t
        if count < 4 or count & 3:
            return 0
        sequence: int64_t = sa.check(self.words, get32(at + 4))
        if sequence < 0:
            # With ESN there are other reasons than a replay.
            return self._refuse(sa, REPLAY, ESP_REPLAY, length + extra) if self.refusing and not sa.esn else 0
        if not sa.limits.allow(self.words, 1, count, now):
            return 0
        authentic: cython.int
        if sa.esn:
            memcpy(aad, at, 4)
            put64(aad + 4, cython.cast(uint64_t, sequence))
            authentic = aead._decrypt(at + 8, count, inner, aad, 12)
        else:
            authentic = aead._decrypt(at + 8, count, inner, at, 8)
        if not authentic:
            return self._refuse(sa, BADAUTH, ESP_BADAUTH, length + extra) if self.refusing else 0
        pad = inner[count - 2]
        octets: cython.Py_ssize_t = count - 2 - pad
        if octets < 20:
            return 0
        for index in range(pad):
            if inner[octets + index] != index + 1:
                return 0

        # What is inside, and may it come in?
        head: Head
        key: cython.uchar[64]
        if not read_head(inner, octets, cython.address(head), key):
            return 0
        if inner[count - 1] != (4 if head.offset == 20 else 41):
            return 0
        if head.protocol == 17 and self._natt_port(get16(inner + head.offset + 2)):
            return 0
        flow: bytes = PyBytes_FromStringAndSize(cython.cast(cython.p_char, key), head.flow)
        target = sa.allowed.get(flow)
        if target is None:
            self.refused_flow = flow
            return 0

        sa.update(self.words, cython.cast(uint64_t, sequence))
        sa.limits.charge(self.words, 1, octets, now)
        self.counters[IN_PACKETS] += 1
        self.counters[IN_BYTES] += length + extra
        self.counters[ESP_INPUT] += 1
        self.counters[ESP_IBYTES] += octets
        self.counters[IN_DELIVERED] += 1
        self.counters[FAST] += 1
        self._deliver(inner, head.length, target)
        return 1

    @cython.cfunc
    def _refuse(
        self, sa: Sa, word: cython.Py_ssize_t, reason: cython.Py_ssize_t, length: cython.Py_ssize_t
    ) -> cython.int:
        """Count a datagram of ``length`` octets that is dropped; it is finished."""
        self.words[sa.limits.base + word] += 1
        self.counters[reason] += 1
        self.counters[FAST] += 1
        self.counters[IN_PACKETS] += 1
        self.counters[IN_BYTES] += length
        return 1

    # -- into the kernel -------------------------------------------------------------------------------------

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _deliver(self, at: cython.p_uchar, length: cython.Py_ssize_t, target: Target) -> cython.int:
        """Put a packet behind the run, or write the run and begin anew."""
        size: cython.Py_ssize_t
        most: cython.Py_ssize_t
        if self._count:
            size = self._first - self._shape.header
            most = (MAX_LENGTH - self._shape.header) // size
            if not self._shape.tcp:
                most = min(most, MAX_DATAGRAMS)
            if (
                self._target is target
                and not self._closed
                and self._count < most
                and self._shape.header < length <= self._first
                and is_long(at, length, cython.address(self._shape))
                and follows(self._before, at, cython.address(self._shape), size)
                and self._filled + length - self._shape.header <= MAX_LENGTH
                and is_right(at, length, cython.address(self._shape))
            ):
                memcpy(self._run + self._filled, at + self._shape.header, length - self._shape.header)
                self._filled += length - self._shape.header
                memcpy(self._before, at, self._shape.header)
                self._count += 1
                self._closed = length < self._first
                return 0
            self.flush()
        if (
            target.coalescing
            and may_begin(at, length, cython.address(self._shape))
            and (self._shape.tcp or target.datagrams)
            and is_right(at, length, cython.address(self._shape))
        ):
            memcpy(self._run, at, length)
            memcpy(self._before, at, self._shape.header)
            self._target, self._first, self._filled, self._count, self._closed = target, length, length, 1, False
            return 0
        virtio: cython.uchar[10]
        memset(virtio, 0, VNET)
        self._write(target, virtio, at, length, 1)
        return 0

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def flush(self) -> cython.int:
        """Write the run that is open as one packet."""
        virtio: cython.uchar[10]
        count: cython.Py_ssize_t = self._count
        words: uint16_t[4]
        if not count:
            return 0
        self._count = 0
        memset(virtio, 0, VNET)
        if count > 1:
            pushed: cython.uchar = self._before[self._shape.offset + 13] & 8 if self._shape.tcp else 0
            write_head(self._run, cython.address(self._shape), self._filled, pushed)
            virtio[0] = 1  # VIRTIO_NET_HDR_F_NEEDS_CSUM
            virtio[1] = 5 if not self._shape.tcp else 1 if self._shape.offset == 20 else 4
            words[0] = cython.cast(uint16_t, self._shape.header)
            words[1] = cython.cast(uint16_t, self._first - self._shape.header)
            words[2] = cython.cast(uint16_t, self._shape.offset)
            words[3] = 16 if self._shape.tcp else 6
            memcpy(virtio + 2, words, 8)
            self.counters[COALESCED] += count - 1
        self._write(self._target, virtio, self._run, self._filled, count)
        return 0

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def _write(
        self, target: Target, virtio: cython.p_uchar, at: cython.p_uchar, length: cython.Py_ssize_t,
        number: cython.Py_ssize_t,
    ) -> cython.int:  # fmt: skip
        """Give a packet, which is ``number`` packets, to the kernel."""
        vector: iovec[2]
        if self.collected is not None:
            self.collected.append((
                PyBytes_FromStringAndSize(cython.cast(cython.p_char, virtio), VNET),
                PyBytes_FromStringAndSize(cython.cast(cython.p_char, at), length),
            ))  # fmt: skip
            return 0
        vector[0].iov_base, vector[0].iov_len = virtio, VNET
        vector[1].iov_base, vector[1].iov_len = at, length
        if writev(target.descriptor, vector, 2) < 0:
            code: cython.int = errno
            self.counters[target.failure if code == EIO else INJECT_FAILED] += number
            target.device.count_error(code)
        return 0


@cython.cfunc
def _datagram(
    head: cython.p_uchar, offset: cython.Py_ssize_t, room: cython.Py_ssize_t, piece: cython.p_uchar,
    length: cython.Py_ssize_t,
) -> bytes:  # fmt: skip
    """One datagram of a super-packet that began with ``head``: IP and UDP header, ``room`` octets."""
    made: bytes = PyBytes_FromStringAndSize(cython.NULL, room + length)
    at: cython.p_uchar = cython.cast(cython.p_uchar, PyBytes_AS_STRING(made))
    memcpy(at, head, room)
    memcpy(at + room, piece, length)
    put16(at + offset + 4, cython.cast(uint32_t, room - offset + length))
    if offset == 20:
        put16(at + 2, cython.cast(uint32_t, room + length))
    else:
        put16(at + 4, cython.cast(uint32_t, room - 40 + length))
    return made
