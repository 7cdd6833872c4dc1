"""What is counted, and the fates of a packet: one flat numbering for engine, workers and metrics.

A worker owns one array of unsigned 64-bit counters in shared memory; ``counters[Counter.X] += 1`` is all that
the hot path does.  Nobody else writes it, so there is no lock.  The same numbers say why a packet was dropped:
:class:`Fate` values below :data:`FIRST_DROP` are the good fates, every other return value of the engine *is* the
:class:`Counter` of the drop's reason.  Names are those of ``netstat -sp ipsec|esp|ah|ipcomp`` where netstat has one.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final


class Fate(IntEnum):
    """The good fates of a packet; anything from :data:`FIRST_DROP` on is the Counter of a drop."""

    PASS = 0
    """Leave the packet as it is: no policy, ``none``, or ``use`` without an SA."""
    DONE = 1
    """Replaced by the datagrams that the engine emitted; the original must go no further."""
    HOLD = 2
    """Kept by the caller until an SA arrives (``require`` and an ACQUIRE under way)."""
    ABSORBED = 3
    """Finished and nothing to send: a NAT keepalive, a dummy packet, a fragment that waits for its fellows."""


FIRST_DROP: Final = 16


class Counter(IntEnum):
    """Index into a worker's counter array.  16 to 127 are drops; from 128 on plain counts."""

    # -- drops that belong to no transform -------------------------------------------------------------
    IP_MALFORMED = 16
    IP_FRAGMENT = 17
    IP_TOOBIG = 20
    OUT_POLVIO = 24
    OUT_NOSA = 25
    OUT_NOMEM = 26
    OUT_NOROUTE = 27
    OUT_INVAL = 28
    OUT_DISCARD = 30
    OUT_HELD_OVERFLOW = 31
    IN_POLVIO = 32
    IN_NOMEM = 33
    IN_INVAL = 34
    IN_DISCARD = 35
    IN_TOODEEP = 36
    IN_HISTORY = 37
    IN_INTERFACE = 38
    # -- ESP (netstat -sp esp) -------------------------------------------------------------------------
    ESP_HDROPS = 40
    ESP_NOTDB = 41
    ESP_BADKCR = 42
    ESP_QFULL = 43
    ESP_NOXFORM = 44
    ESP_BADILEN = 45
    ESP_WRAP = 46
    ESP_BADENC = 47
    ESP_BADAUTH = 48
    ESP_REPLAY = 49
    ESP_INVALID = 50
    ESP_TOOBIG = 51
    ESP_PDROPS = 52
    ESP_CRYPTO = 53
    ESP_EXPIRED = 54
    ESP_NOSEQ = 55
    ESP_NATT = 56
    # -- AH (netstat -sp ah) ---------------------------------------------------------------------------
    AH_HDROPS = 60
    AH_NOTDB = 61
    AH_BADKCR = 62
    AH_QFULL = 63
    AH_NOXFORM = 64
    AH_BADAUTHL = 65
    AH_WRAP = 66
    AH_BADAUTH = 67
    AH_REPLAY = 68
    AH_INVALID = 69
    AH_TOOBIG = 70
    AH_PDROPS = 71
    AH_CRYPTO = 72
    AH_EXPIRED = 73
    AH_NOSEQ = 74
    # -- IPComp (netstat -sp ipcomp) -------------------------------------------------------------------
    IPCOMP_HDROPS = 80
    IPCOMP_NOTDB = 81
    IPCOMP_BADKCR = 82
    IPCOMP_QFULL = 83
    IPCOMP_NOXFORM = 84
    IPCOMP_WRAP = 85
    IPCOMP_INVALID = 86
    IPCOMP_TOOBIG = 87
    IPCOMP_PDROPS = 88
    IPCOMP_CRYPTO = 89
    IPCOMP_BOMB = 90
    IPCOMP_EXPIRED = 91
    # -- drops of the datapath around the engine -------------------------------------------------------
    SEND_FAILED = 100
    INJECT_FAILED = 101
    OVERLOAD = 102
    INTERFACE_DOWN = 103
    # -- counts that are no drops ----------------------------------------------------------------------
    ESP_INPUT = 128
    ESP_OUTPUT = 129
    ESP_IBYTES = 130
    ESP_OBYTES = 131
    ESP_TUNNEL = 132
    ESP_DUMMY = 133
    AH_INPUT = 140
    AH_OUTPUT = 141
    AH_IBYTES = 142
    AH_OBYTES = 143
    AH_TUNNEL = 144
    IPCOMP_INPUT = 150
    IPCOMP_OUTPUT = 151
    IPCOMP_IBYTES = 152
    IPCOMP_OBYTES = 153
    IPCOMP_THRESHOLD = 154
    IPCOMP_UNCOMPR = 155
    OUT_PACKETS = 160
    OUT_BYTES = 161
    OUT_PASSED = 162
    OUT_TOOBIG_SENT = 163
    OUT_ACQUIRE = 164
    OUT_FRAGMENTED = 165
    OUT_BUNDLESA = 166
    IN_PACKETS = 168
    IN_BYTES = 169
    IN_DELIVERED = 170
    IN_PMTU_LEARNED = 171
    IN_PMTU_REFUSED = 172
    NATT_KEEPALIVE = 173
    NATT_REBOUND = 174
    FLOW_HIT = 176
    FLOW_MISS = 177
    BATCHES = 180
    BUSY_NS = 181
    ENOBUFS = 182
    SUPER_PACKETS = 183
    COALESCED = 184
    QUEUE_TRUNCATED = 185
    QUEUE_ERRORS = 186
    OFFLOADS = 187
    """No count: the sum of :class:`Offload` that the worker has in use."""
    TAP_PACKETS = 188
    TAP_DROPPED = 189
    HEARTBEAT = 190
    FAST_PACKETS = 191
    RING_DROPPED = 192


class Offload(IntFlag):
    """What makes packets cheaper, where the kernel grants it."""

    GSO = 1
    """TCP super-packets come whole from the queue."""
    COALESCE = 2
    """Runs of decapsulated TCP segments enter the stack as one packet."""
    UDP_SEGMENT = 4
    """ESP in UDP leaves in bursts, many datagrams in one system call."""
    COALESCE_UDP = 8
    """Runs of equal datagrams, too, enter the stack as one packet."""
    COMPILED = 16
    """Packets of known flows go through compiled code."""
    RING = 32
    """Whole ESP datagrams come by packet rings in place of queues."""


COUNTERS_WORDS: Final = 256
"""Size of one worker's array, in 64-bit words: the counters, then the latency histogram."""

HISTOGRAM_BASE: Final = 200
"""First word of the latency histogram; bucket *i* counts batches whose time a packet was below BOUNDS[i] seconds."""

HISTOGRAM_BOUNDS: Final = (
    1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 1e-1,
)  # fmt: skip
"""Upper bounds in seconds; one more bucket, unbounded, follows them."""

HISTOGRAM_SUM_NS: Final = HISTOGRAM_BASE + len(HISTOGRAM_BOUNDS) + 1
"""Word that sums the packets' time in nanoseconds."""
