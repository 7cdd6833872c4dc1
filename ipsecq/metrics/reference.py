"""``docs/metrics.md``, made from what the collector says of itself: ``make docs``.

    python -m ipsecq.metrics.reference > docs/metrics.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric

from ipsecq.counters import COUNTERS_WORDS
from ipsecq.metrics.associations import families
from ipsecq.metrics.collector import EVENTS, gateway_families
from ipsecq.metrics.reasons import DROPS, REASONS
from ipsecq.metrics.source import InterfaceSample, PeerSample, SaSample, Snapshot, TunnelSample, WorkerSample
from ipsecq.numbers import Protocol
from ipsecq.sa.association import Lifetime, SecurityAssociation, Slot

HEAD: Final = """# Metrics

Prometheus scrapes `http://ADDRESS/metrics` (`[metrics] listen`, by default `127.0.0.1:9814`). This file is made from the
collector by `make docs`; a test keeps the two in step. How to set up Prometheus, alerts and the dashboard:
[monitoring.md](monitoring.md).

Counters never go back while the daemon runs: a worker that is replaced goes on with its predecessor's, and a peer keeps
what its former SAs counted. Series of single SAs come and go with the SA.

What can be many is limited. `[metrics] sa_limit` SAs (the first that were added, 1000) have series of their own; all others
count in the series of their peers, and `ipsecq_sas_without_series` says how many they are. `peer_limit` peers (1000) and
tunnels have series of their own; the rest of the peers is `peer="other"`. `make bench-scrape` measures a scrape with
10,000 SAs.

No key, and nothing of a packet, is in any metric. SPIs and addresses are: keep the address of the endpoint private.

"""


def example() -> Snapshot:
    """One of everything, so that every family has a sample and shows its labels."""
    lifetime = Lifetime(addtime=1, usetime=1)
    sa = SecurityAssociation(Protocol.ESP, 1, bytes(4), bytes(4), soft=lifetime, hard=lifetime)
    words = [1] * int(Slot.WINDOW)
    return Snapshot(
        workers=(WorkerSample(0, True, 0, [0] * COUNTERS_WORDS),),
        sas=(SaSample(sa, words, "out"),),
        sa_states={("esp", "out", "mature"): 1},
        peers=(PeerSample("", "in", 0, 0, 0, 0, 0, 1, 0.0),),
        tunnels=(TunnelSample("", "", True),),
        interfaces=(InterfaceSample("", "", "", 0, 0, True),),
        tunnel_count=1,
    )


def render() -> str:
    """The whole document."""
    parts = [HEAD]
    snapshot = example()
    for title, found in (
        ("The gateway, its peers and tunnels", gateway_families(snapshot)),
        ("Single SAs", families(snapshot)),
    ):
        parts.append(f"## {title}\n\n| name | type | labels | meaning |\n|---|---|---|---|\n")
        parts.append("".join(_rows(found)))
        parts.append("\n")
    parts.append("## Reasons of drops\n\nValues of `reason` in `ipsecq_drops_total`.\n\n| reason | meaning |\n|---|---|\n")
    parts.append("".join(f"| `{drop.name.lower()}` | {REASONS[drop]} |\n" for drop in DROPS))
    parts.append("\n## Events\n\nValues of `event` in `ipsecq_events_total`.\n\n| event | counts |\n|---|---|\n")
    parts.append("".join(f"| `{name}` | {meaning} |\n" for name, meaning in EVENTS.values()))
    return "".join(parts)


def names() -> dict[str, frozenset[str]]:
    """Every series by its exposed name, and its labels: for whoever checks queries."""
    snapshot = example()
    found: dict[str, frozenset[str]] = {}
    for family in (*gateway_families(snapshot), *families(snapshot)):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, frozenset()) | frozenset(sample.labels)
    return found


def _rows(found: Iterable[Metric]) -> Iterable[str]:
    for family in found:
        name = {"counter": f"{family.name}_total", "info": f"{family.name}_info"}.get(family.type, family.name)
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        yield f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in labels)} | {family.documentation} |\n"


if __name__ == "__main__":
    sys.stdout.write(render())
