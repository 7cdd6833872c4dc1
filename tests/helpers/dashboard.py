"""The Grafana dashboard as a list of queries."""

import json
import re
from pathlib import Path

CONTRIB = Path(__file__).parents[2] / "contrib"
DASHBOARD = json.loads((CONTRIB / "grafana" / "ipsecq.json").read_text())


def panels():
    """(title, queries) of every panel that asks for something."""
    return [
        (panel["title"], [target["expr"] for target in panel["targets"]])
        for panel in DASHBOARD["panels"]
        if panel["type"] != "row"
    ]


def filled(query, interval="5s"):
    """A query as Grafana sends it, with everything chosen."""
    for name, value in {"job": "ipsecq", "instance": ".*", "__rate_interval": interval}.items():
        query = query.replace(f"${name}", value)
    return query


def metrics_of(query):
    """Names of our series in a query."""
    return set(re.findall(r"\bipsecq[a-z0-9_:]*", re.sub(r'"[^"]*"', '""', query)))
