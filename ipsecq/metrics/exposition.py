"""One scrape as text: Prometheus' text format 0.0.4, which every version of Prometheus takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from ipsecq.metrics import associations
from ipsecq.metrics.collector import gateway_families
from ipsecq.metrics.source import Snapshot

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class _Families(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        """All but the series of single SAs."""
        return gateway_families(self._snapshot)


def render(snapshot: Snapshot) -> bytes:
    """What :class:`ipsecq.metrics.collector.IpsecqCollector` collects, many SAs made into text the fast way."""
    return generate_latest(_Families(snapshot)) + associations.text(snapshot).encode()
