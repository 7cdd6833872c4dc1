"""Series of single SAs: one table says what there is, and two renderings of it, as families and as fast text.

A scrape of ten thousand SAs is over a hundred thousand lines.  prometheus_client's objects and formatting take
seconds for that; :func:`text` writes the same lines straight from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from ipsecq.metrics.source import SaSample, Snapshot
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.packet.address import text as address
from ipsecq.sa.association import Lifetime, Slot

LABELS: Final = ("spi", "protocol", "dst")
Value = int | float | bool | None
"""None: the SA has no such series."""


@dataclass(frozen=True)
class SaSeries:
    """One series an SA has."""

    name: str
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    help: str
    value: Callable[[SaSample, float], Value]
    """``value(sample, now)``."""

    @property
    def exposed(self) -> str:
        """Its name in the text format."""
        return f"{self.name}_total" if self.kind is CounterMetricFamily else self.name


def _word(slot: Slot) -> Callable[[SaSample, float], Value]:
    at = int(slot)
    return lambda sample, now: sample.words[at]


def _sequence_share(sample: SaSample, now: float) -> float:
    return sample.words[Slot.SEQUENCE] / (1 << 64 if sample.sa.esn else 1 << 32)


def state(sample: SaSample, now: float) -> int:
    """The SA's state, or what a worker has found it to be."""
    return max(sample.words[Slot.STATE] or sample.sa.state, SaState(sample.sa.state))


def expiry(limit: Lifetime, sample: SaSample) -> float | None:
    """Unix time at which time alone ends the SA by ``limit``; None: it does not."""
    ends = []
    if limit.addtime:
        ends.append(sample.sa.created + limit.addtime)
    if limit.usetime and sample.words[Slot.FIRST_USE]:
        ends.append(sample.words[Slot.FIRST_USE] + float(limit.usetime))
    return min(ends, default=None)


def hard_share(sample: SaSample, now: float) -> float:
    """How near the SA is to its end: the largest share of a hard limit, or of the numbers that it can send."""
    limit, words = sample.sa.hard, sample.words
    shares = [0.0 if sample.sa.protocol == Protocol.IPCOMP else _sequence_share(sample, now)]
    if limit.bytes:
        shares.append(words[Slot.BYTES] / limit.bytes)
    if limit.allocations:
        shares.append(words[Slot.PACKETS] / limit.allocations)
    if limit.addtime:
        shares.append((now - sample.sa.created) / limit.addtime)
    if limit.usetime and words[Slot.FIRST_USE]:
        shares.append((now - words[Slot.FIRST_USE]) / limit.usetime)
    return max(shares)


_C, _G = CounterMetricFamily, GaugeMetricFamily
SERIES: Final = (
    SaSeries("ipsecq_sa_packets", _C, "Packets that the SA protected or opened.", _word(Slot.PACKETS)),
    SaSeries("ipsecq_sa_bytes", _C, "Bytes that the SA protected or opened.", _word(Slot.BYTES)),
    SaSeries("ipsecq_sa_auth_failures", _C, "Packets whose ICV was wrong.", _word(Slot.BADAUTH)),
    SaSeries("ipsecq_sa_replays", _C, "Packets that were replayed or too old.", _word(Slot.REPLAY)),
    SaSeries("ipsecq_sa_drops", _C, "Other drops on account of the SA.", _word(Slot.DROPS)),
    SaSeries(
        "ipsecq_sa_sequence_used_ratio", _G, "Share of the SA's sequence numbers that is used up.", _sequence_share
    ),
    SaSeries(
        "ipsecq_sa_last_use_timestamp_seconds", _G, "Unix time of the last packet, 0 before it.", _word(Slot.LAST_USE)
    ),
    SaSeries("ipsecq_sa_state", _G, "0 larval, 1 mature, 2 dying, 3 dead.", state),
    SaSeries(
        "ipsecq_sa_refused", _G, "1: the SA must not send, what it sent before is not known.",
        lambda sample, now: sample.refused,
    ),
    SaSeries(
        "ipsecq_sa_soft_expiry_timestamp_seconds", _G, "Unix time at which the soft limit ends it, if time does.",
        lambda sample, now: expiry(sample.sa.soft, sample),
    ),
    SaSeries(
        "ipsecq_sa_hard_expiry_timestamp_seconds", _G, "Unix time at which the hard limit ends it, if time does.",
        lambda sample, now: expiry(sample.sa.hard, sample),
    ),
    SaSeries(
        "ipsecq_sa_lifetime_used_ratio", _G,
        "How near the SA is to its end: the largest share of a hard limit (time, bytes, packets) or of its sequence"
        " numbers that is used up.",
        hard_share,
    ),
    SaSeries(
        "ipsecq_sa_has_successor", _G,
        "1: a younger usable SA of the same protocol, mode, ends and reqid is there to take over.",
        lambda sample, now: sample.successor,
    ),
)  # fmt: skip

INFO_NAME: Final = "ipsecq_sa"
INFO_HELP: Final = "One SA: join on spi, protocol and dst."


def identity(sample: SaSample) -> list[str]:
    """Values of :data:`LABELS`."""
    return [f"0x{sample.sa.spi:08x}", Protocol(sample.sa.protocol).name.lower(), address(sample.sa.dst)]


def information(sample: SaSample) -> dict[str, str]:
    """The labels of ``ipsecq_sa_info`` beside the identity."""
    sa = sample.sa
    return {
        "src": address(sa.src),
        "mode": Mode(sa.mode).name.lower(),
        "reqid": str(sa.reqid),
        "direction": sample.direction,
        "encryption": sa.encryption or "",
        "authentication": sa.authentication or "",
        "compression": sa.compression or "",
    }


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """The series as objects of prometheus_client."""
    info = InfoMetricFamily(INFO_NAME, INFO_HELP, labels=LABELS)
    identities = [identity(sample) for sample in snapshot.sas]
    for labels, sample in zip(identities, snapshot.sas, strict=True):
        info.add_metric(labels, information(sample))
    yield info
    for series in SERIES:
        family = series.kind(series.name, series.help, labels=LABELS)
        for labels, sample in zip(identities, snapshot.sas, strict=True):
            value = series.value(sample, snapshot.time)
            if value is not None:
                family.add_metric(labels, value)
        yield family


def text(snapshot: Snapshot) -> str:
    """The series in Prometheus' text format 0.0.4.  No label holds anything that needs escaping."""
    names = [
        "{" + ",".join(f'{label}="{value}"' for label, value in zip(LABELS, identity(sample), strict=True))
        for sample in snapshot.sas
    ]
    lines = [f"# HELP {INFO_NAME}_info {INFO_HELP}\n# TYPE {INFO_NAME}_info gauge\n"]
    for name, sample in zip(names, snapshot.sas, strict=True):
        more = "".join(f',{label}="{value}"' for label, value in information(sample).items())
        lines.append(f"{INFO_NAME}_info{name}{more}}} 1.0\n")
    now = snapshot.time
    for series in SERIES:
        kind = "counter" if series.kind is CounterMetricFamily else "gauge"
        lines.append(f"# HELP {series.exposed} {series.help}\n# TYPE {series.exposed} {kind}\n")
        exposed, value_of = series.exposed, series.value
        for name, sample in zip(names, snapshot.sas, strict=True):
            value = value_of(sample, now)
            if value is not None:
                lines.append(f"{exposed}{name}}} {float(value)!r}\n")
    return "".join(lines)
