# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, annotation_typing=True
"""A packet ring read by the fast path: what :class:`ipsecq.datapath.ring.PacketRing` has mapped, without copies."""

import cython

if not cython.compiled:
    raise ImportError("this module only works compiled")

from cython.cimports.ipsecq.compiled.octets import folded, words
from cython.cimports.ipsecq.fastpath.opener import Opener
from cython.cimports.ipsecq.fastpath.sockets import load_acquire, store_release
from cython.cimports.libc.stdint import uint16_t, uint32_t, uint64_t
from cython.cimports.libc.string import memcpy

USER = cython.declare(uint32_t, 1)
"""TP_STATUS_USER: the frame is ours."""


@cython.cclass
class Ring:
    """``size`` octets a frame, ``frames`` of them at ``memory``; ``cursor`` is the address of the next one's number."""

    def __init__(
        self, descriptor: cython.int, memory: uint64_t, frames: uint64_t, size: uint64_t, cursor: uint64_t, owner
    ):
        """``owner`` keeps the memory."""
        self.descriptor, self._frames, self._size, self._owner = descriptor, frames, size, owner
        self._memory = cython.cast(cython.p_uchar, memory)
        self._cursor = cython.cast(cython.pointer(uint64_t), cursor)

    @cython.cfunc
    @cython.exceptval(-1, check=False)
    def take(self, opener: Opener, most: cython.Py_ssize_t, now: cython.double) -> cython.Py_ssize_t:
        """Open up to ``most`` packets: how many; ``stopped``: the next one is there, and somebody else's."""
        count: cython.Py_ssize_t = 0
        frame: cython.p_uchar
        at: cython.p_uchar
        captured: uint32_t
        start: uint16_t
        self.stopped = False
        while count < most:
            frame = self._memory + self._cursor[0] * self._size
            if not load_acquire(frame) & USER:
                break
            # struct tpacket2_hdr: status, length, captured length, offsets of MAC and network header, …
            memcpy(cython.address(captured), frame + 8, 4)
            memcpy(cython.address(start), frame + 14, 2)
            at = frame + start
            # A wrong header checksum is not the fast path's business.
            if at[0] == 0x45 and captured >= 20 and folded(words(at, 20)) != 0xFFFF:
                self.stopped = True
            else:
                self.stopped = opener.packet(at, captured, False, now) != 1
            if self.stopped:
                break
            store_release(frame, 0)
            self._cursor[0] += 1
            if self._cursor[0] == self._frames:
                self._cursor[0] = 0
            count += 1
        return count

