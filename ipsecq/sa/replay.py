"""The anti-replay window (RFC 4303 section 3.4.3 and appendix A2), as the ring of words of RFC 6479.

The window lives in the SA's slot of the shared table, so a worker that is restarted goes on where the dead one
stopped.  Only the worker that serves the SA writes it.  A check reads two words and an update writes two in the usual
case; a jump clears one word per 64 sequence numbers jumped, and never more than the ring.
"""

from __future__ import annotations

from typing import Final

from ipsecq.sa.association import SLOT_HEADER_WORDS, Slot, slot_words

MAX_REPLAY_WINDOW: Final = 131072
"""Largest window in packets (Linux's limit: 4096 words of 32 bits)."""

_LOW: Final = 0xFFFFFFFF


class ReplayWindow:
    """The replay window of one inbound SA over its slot ``words[base:]``.

    ``size`` is the window in packets: 0 (no check) to :data:`MAX_REPLAY_WINDOW`.  ``words`` is a memoryview of
    format ``Q``; the right edge is ``words[base + Slot.SEQUENCE]`` and the ring starts at ``base + Slot.WINDOW``.
    Raises ValueError for a size out of range, or for ESN without a window (there is then nothing to infer the high half
    from, RFC 4303 section 2.2.1).
    """

    __slots__ = ("_edge", "_esn", "_mask", "_ring", "_size", "_words")

    def __init__(self, words: memoryview, base: int, size: int, esn: bool = False) -> None:
        if not 0 <= size <= MAX_REPLAY_WINDOW:
            raise ValueError(f"replay window {size} is out of range: use 0 to {MAX_REPLAY_WINDOW} packets")
        if esn and not size:
            raise ValueError("extended sequence numbers need a replay window: use one of 32 packets or more")
        self._words = words
        self._size = size
        self._esn = esn
        self._edge = base + Slot.SEQUENCE
        self._ring = base + Slot.WINDOW
        self._mask = slot_words(size) - SLOT_HEADER_WORDS - 1

    @property
    def size(self) -> int:
        """Window size in packets; 0 is off."""
        return self._size

    @property
    def mask(self) -> int:
        """Words of the ring, less one."""
        return self._mask

    @property
    def edge(self) -> int:
        """The right edge: the highest sequence number authenticated so far (64 bits with ESN)."""
        return int(self._words[self._edge])

    def check(self, low: int) -> int:
        """Return the full sequence number of a packet that carries ``low`` (32 bits), or -1 to drop it.

        -1 means seen before, left of the window, or number 0 (which no sender uses, RFC 4303 section 3.3.3).  Nothing
        is changed: call :meth:`update` after the packet has been authenticated with the number returned here.  With
        the window off, every number is taken as it is.
        """
        size = self._size
        if not size:
            return low
        words = self._words
        edge = words[self._edge]
        if self._esn:
            # Appendix A2.2: the high half that puts the packet inside the window, or else ahead of it.
            edge_low = edge & _LOW
            high = edge >> 32
            if edge_low >= size - 1:
                if low < edge_low - size + 1:
                    high += 1
            elif low >= (edge_low - size + 1) & _LOW:
                high -= 1
            sequence = high << 32 | low
            if high < 0 or high > _LOW:
                return -1
        else:
            sequence = low
        if sequence > edge:
            return sequence
        if edge - sequence >= size or not sequence:
            return -1
        if words[self._ring + (sequence >> 6 & self._mask)] >> (sequence & 63) & 1:
            return -1
        return sequence

    def update(self, sequence: int) -> bool:
        """Note that ``sequence`` (as :meth:`check` returned it) was authenticated.

        Returns False when it had been noted, or left behind, since that check: with packets opened in batches
        the second copy in one batch is found here, and must be dropped.
        """
        size = self._size
        if not size:
            return True
        words, mask, ring = self._words, self._mask, self._ring
        edge = words[self._edge]
        index = ring + (sequence >> 6 & mask)
        bit = 1 << (sequence & 63)
        if sequence > edge:
            # The edge first: should this process die here, numbers ahead may be refused, but none behind is taken again.
            words[self._edge] = sequence
            first = (edge >> 6) + 1
            for block in range(first, min((sequence >> 6) + 1, first + mask + 1)):
                words[ring + (block & mask)] = 0
        elif edge - sequence >= size or words[index] & bit:
            return False
        words[index] |= bit
        return True

    def advance(self, first: int, count: int) -> None:
        """Note ``count`` consecutive numbers from ``first`` on, all of them beyond the edge, as authenticated.

        Leaves the same words as :meth:`update` of each.
        """
        if not self._size:
            return
        words, mask, ring = self._words, self._mask, self._ring
        last = first + count - 1
        newest = last >> 6
        old = (words[self._edge] >> 6) + 1
        words[self._edge] = last  # first, as in update
        for block in range(old, min(newest + 1, old + mask + 1)):
            words[ring + (block & mask)] = 0
        # What a long run has itself pushed out of the ring leaves no trace.
        at = max(first, (newest - mask) << 6)
        while at <= last:
            end = min(last, at | 63)
            words[ring + (at >> 6 & mask)] |= (1 << end - at + 1) - 1 << (at & 63)
            at = end + 1
