"""A gateway's snapshot for tests: two workers, one SA, one peer, one tunnel that is down."""

from ipsecq.counters import COUNTERS_WORDS, HISTOGRAM_BASE, HISTOGRAM_BOUNDS, HISTOGRAM_SUM_NS, Counter, Offload
from ipsecq.metrics.source import OffloadSample, PeerSample, SaSample, Snapshot, TunnelSample, WorkerSample
from ipsecq.numbers import Mode, Protocol
from ipsecq.sa.association import SLOT_HEADER_WORDS, Lifetime, SecurityAssociation, Slot
from ipsecq.secret import Key


class Fixed:
    def __init__(self, snapshot):
        self.value = snapshot

    def snapshot(self):
        return self.value


def page(**values):
    words = [0] * COUNTERS_WORDS
    for name, value in values.items():
        words[Counter[name]] = value
    return words


def sample():
    sa = SecurityAssociation(
        Protocol.ESP, 0x1001, b"\xc0\0\2\1", b"\xc6\x33\x64\1", Mode.TUNNEL, 7, "aes-gcm-16", Key(b"K" * 20),
        soft=Lifetime(addtime=50), hard=Lifetime(bytes=1000, addtime=60, usetime=100), created=1e9,
    )  # fmt: skip
    words = [0] * SLOT_HEADER_WORDS
    words[Slot.PACKETS], words[Slot.BYTES], words[Slot.SEQUENCE], words[Slot.REPLAY] = 5, 700, 1 << 31, 2
    return SaSample(sa, words, "out")


def full():
    first = page(IN_PACKETS=3, ESP_REPLAY=2, BUSY_NS=2_000_000_000, RING_DROPPED=7)
    second = page(IN_PACKETS=4, FLOW_HIT=9, QUEUE_TRUNCATED=6, OFFLOADS=Offload.COALESCE)
    first[HISTOGRAM_BASE] = 10
    first[HISTOGRAM_BASE + 3] = 5
    second[HISTOGRAM_BASE + len(HISTOGRAM_BOUNDS)] = 1
    first[HISTOGRAM_SUM_NS] = 500_000_000
    workers = (WorkerSample(0, True, 1, first, 12, 3, 4), WorkerSample(1, False, 0, second))
    return Snapshot(
        workers, (sample(),), {("esp", "out", "mature"): 1}, (PeerSample("198.51.100.1", "out", 9, 900, 1, 2, 3, 1, 1e9),),
        (TunnelSample("192.0.2.1", "198.51.100.1", False, "no inbound ESP SA"),), 1, {"in": 1, "out": 2},
        time=1000000030.0, started=1e9, reload_time=1e9, mechanism="native",
        offloads=(OffloadSample("coalesce", (0,), True), OffloadSample("gso", (), False, "switched off")),
    )  # fmt: skip
