"""Which worker serves which SA, said once for the ruleset and for the daemon.

Inbound the kernel knows the SPI only, outbound the policy only, so there are two functions.  Both give one SA one
worker: its sequence numbers leave in order and its replay window has one writer.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from ipsecq.numbers import Mode
from ipsecq.policy.model import Policy

_MIN_BUCKETS: Final = 16


def buckets(workers: int) -> int:
    """Number of SPI buckets: a power of two, so that the kernel's ``&`` finds one, and at least four a worker.

    With fewer, worker 0 of three would serve half of the SAs.
    """
    count = _MIN_BUCKETS
    while count < workers * 4:
        count *= 2
    return count


def inbound_worker(spi: int, workers: int) -> int:
    """The worker that gets packets of this SPI (or CPI), by its low bits."""
    return (spi & (buckets(workers) - 1)) % workers


def worker_of(policy: Policy, workers: int) -> int | None:
    """The worker that serves an outbound policy: a hash of the outermost tunnel ends; None without a tunnel.

    Policies to one peer share SAs and so share the worker.  None (transport mode only) means that the kernel spreads
    the packets by host pair, which is what identifies a transport SA.
    """
    for transform in reversed(policy.transforms):
        if transform.mode == Mode.TUNNEL and transform.src is not None and transform.dst is not None:
            return crc32(transform.src + transform.dst) % workers
    return None
