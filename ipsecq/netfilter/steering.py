"""Which worker serves which SA, said once for the ruleset and for the daemon.

Inbound the kernel knows the SPI only, outbound the policy only, so there are two functions.  Both give one SA one
worker: its sequence numbers leave in order and its replay window has one writer.

A worker serves several queues, its lanes, in turn: an SA that gets too much fills its own lane, and those in other lanes
keep their share.  Queue ``g`` (counted from the first one) belongs to worker ``g % workers``.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from ipsecq.numbers import Level, Mode
from ipsecq.policy.model import Policy

_MIN_BUCKETS: Final = 16


def buckets(queues: int) -> int:
    """Number of SPI buckets: a power of two, so that the kernel's ``&`` finds one, and at least four a queue.

    With fewer, queue 0 of three would get half of the SAs.
    """
    count = _MIN_BUCKETS
    while count < queues * 4:
        count *= 2
    return count


def inbound_queue(spi: int, queues: int) -> int:
    """The queue that gets packets of this SPI (or CPI), by its low bits."""
    return (spi & (buckets(queues) - 1)) % queues


def queue_of(policy: Policy, workers: int, lanes: int) -> int | None:
    """The queue that gets packets of an outbound policy: a lane of its worker, by its ends and its own SA, if any.

    None: :func:`worker_of` has none, and the kernel spreads the packets over all queues.
    """
    worker = worker_of(policy, workers)
    if worker is None:
        return None
    own = [
        b"%b%b%d" % (transform.src or b"", transform.dst or b"", transform.reqid * (transform.level == Level.UNIQUE))
        for transform in policy.transforms
    ]
    return crc32(b"/".join(own)) // workers % lanes * workers + worker


def worker_of(policy: Policy, workers: int) -> int | None:
    """The worker that serves an outbound policy: a hash of the outermost tunnel ends; None without a tunnel.

    Policies to one peer share SAs and so share the worker.  None (transport mode only) means that the kernel spreads
    the packets by host pair, which is what identifies a transport SA.
    """
    for transform in reversed(policy.transforms):
        if transform.mode == Mode.TUNNEL and transform.src is not None and transform.dst is not None:
            return crc32(transform.src + transform.dst) % workers
    return None
