"""recvmmsg(2) and sendmmsg(2) through libc: many datagrams in one system call.

All structures are allocated once.  What changes from call to call (addresses, lengths) is written through numpy views
of the same memory, a column at a time.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

MSG_DONTWAIT: Final = 0x40
UIO_MAXIOV: Final = 1024

_WORD: Final = ctypes.sizeof(ctypes.c_void_p)
# struct mmsghdr in words: name, namelen, iov, iovlen, control, controllen, flags (and padding), msg_len (and padding).
_HDR_WORDS: Final = 8
_NAME, _NAMELEN, _IOV, _IOVLEN = 0, 1, 2, 3
_LEN: Final = 14  # msg_len, counted in 32-bit words

_libc: Final = ctypes.CDLL(None, use_errno=True)
_recvmmsg: Final = _libc.recvmmsg
_recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
_recvmmsg.restype = ctypes.c_int
_sendmmsg: Final = _libc.sendmmsg
_sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
_sendmmsg.restype = ctypes.c_int

Words = npt.NDArray[np.uint64]


def _words(count: int, columns: int) -> Words:
    if _WORD != 8:
        raise OSError(errno.ENOSYS, "recvmmsg and sendmmsg need a 64-bit system")
    return np.zeros((count, columns), dtype=np.uint64)


class ReceiveVector:
    """Buffers for ``count`` datagrams of up to ``size`` octets, filled by one recvmmsg; perhaps those of another vector."""

    def __init__(self, fd: int, count: int, size: int, room: ReceiveVector | None = None) -> None:
        self._fd, self._count = fd, count
        # Pages are touched by the kernel alone and only as far as packets reach, so unused room costs no memory.
        self._memory: npt.NDArray[np.uint8] = np.empty((count, size), dtype=np.uint8) if room is None else room._memory
        self.views: list[memoryview] = [memoryview(self._memory[i]) for i in range(count)]
        """One writable view a datagram, in the order of :meth:`receive`."""
        self._iov = _words(count, 2)
        self._iov[:, 0] = self._memory.ctypes.data + np.arange(count, dtype=np.uint64) * size
        self._iov[:, 1] = size
        self._hdr = _words(count, _HDR_WORDS)
        self._hdr[:, _IOV] = self._iov.ctypes.data + np.arange(count, dtype=np.uint64) * 16
        self._hdr[:, _IOVLEN] = 1
        self._lengths = self._hdr.view(np.uint32)[:, _LEN]
        self._address = self._hdr.ctypes.data

    @property
    def address(self) -> int:
        """Where the message headers (struct mmsghdr) lie, for those who call recvmmsg themselves."""
        return self._address

    def lengths(self, first: int, end: int) -> list[int]:
        """Lengths of the datagrams from ``first`` to ``end`` (excluded) of the last call, whoever made it."""
        found: list[int] = self._lengths[first:end].tolist()
        return found

    def receive(self) -> Sequence[int] | None:
        """Lengths of the datagrams that were there (none: empty); None when the kernel answered ENOBUFS."""
        got = _recvmmsg(self._fd, self._address, self._count, MSG_DONTWAIT, None)
        if got > 0:
            lengths: list[int] = self._lengths[:got].tolist()
            return lengths
        number = ctypes.get_errno()
        if number in {errno.EAGAIN, errno.EINTR}:
            return ()
        if number == errno.ENOBUFS:
            return None
        raise OSError(number, f"recvmmsg: {os.strerror(number)}")


class SendVector:
    """Room for up to ``count`` datagrams that one sendmmsg sends."""

    def __init__(self, count: int = UIO_MAXIOV) -> None:
        self.count = count
        self._iov = _words(count, 2)
        self._hdr = _words(count, _HDR_WORDS)
        self._hdr[:, _IOV] = self._iov.ctypes.data + np.arange(count, dtype=np.uint64) * 16
        self._hdr[:, _IOVLEN] = 1
        self._address = self._hdr.ctypes.data
        # c_char_p takes the address of the bytes object's own octets: nothing is copied.  It also keeps a reference.
        self._pointers = (ctypes.c_char_p * count)()
        self._pointer_words = np.frombuffer(memoryview(self._pointers).cast("B"), dtype=np.uint64)

    def load(self, datagrams: list[bytes], names: Sequence[int], name_length: int) -> None:
        """Take datagrams (at most ``count``) and the addresses in memory of their sockaddr, all of one length."""
        n = len(datagrams)
        self._pointers[:n] = datagrams  # type: ignore[assignment]  # list is invariant
        self._iov[:n, 0] = self._pointer_words[:n]
        self._iov[:n, 1] = list(map(len, datagrams))
        self._hdr[:n, _NAME] = names
        self._hdr[:n, _NAMELEN] = name_length

    def send(self, fd: int, first: int, last: int) -> int:
        """Send datagrams ``first`` up to ``last`` (excluded): how many went, or -errno of the first one."""
        sent: int = _sendmmsg(fd, self._address + first * _HDR_WORDS * 8, last - first, MSG_DONTWAIT)
        return sent if sent >= 0 else -ctypes.get_errno()
