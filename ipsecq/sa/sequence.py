"""Outbound sequence numbers: taken from leases, never twice, never wrapping (RFC 4303 section 3.3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

LIMIT_32: Final = (1 << 32) - 1
"""Last sequence number of an SA without ESN."""
LIMIT_64: Final = (1 << 64) - 1
"""Last sequence number of an SA with ESN."""

Lease = Callable[[], tuple[int, int]]
"""Returns a fresh run of numbers as (first, end), end exclusive; (0, 0) when there are none to have."""


class OutboundSequence:
    """The sequence numbers of one outbound SA in one worker.

    ``lease`` fetches a block that nobody else was or will be given; ``limit`` is the last usable number
    (:data:`LIMIT_32` or :data:`LIMIT_64`).  Numbers of a lease that a longer run could not use are wasted: gaps are
    legal, reuse is not.  :meth:`take` costs two comparisons while the lease lasts.
    """

    __slots__ = ("_end", "_lease", "_limit", "_next")

    def __init__(self, lease: Lease, limit: int) -> None:
        self._lease = lease
        self._limit = limit
        self._next = 0
        self._end = 0

    @property
    def remaining(self) -> int:
        """Numbers left in the lease at hand."""
        return self._end - self._next

    def take(self, n: int = 1) -> int:
        """Return the first of ``n`` consecutive numbers that are now the caller's, or 0 if there are none.

        0 means that the SA is used up or that the lease was refused; the packet must be dropped and the
        SA replaced.  What was left of the lease then stays for a shorter run.
        """
        first = self._next
        following = first + n
        if following <= self._end:
            self._next = following
            return first
        return self._take_from_new_lease(n)

    def _take_from_new_lease(self, n: int) -> int:
        first, end = self._next, self._end
        while end - first < n:
            leased, leased_end = self._lease()
            leased_end = min(leased_end, self._limit + 1)
            if leased <= 0 or leased >= leased_end:
                # Keep the longest run at hand, so that a packet can still go where a burst can't.
                self._next, self._end = first, end
                return 0
            if leased != end:
                first = leased
            end = leased_end
        self._next, self._end = first + n, end
        return first
