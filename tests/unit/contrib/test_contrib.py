"""What contrib/ has for Prometheus and Grafana: it asks for series that exist, and every alert fires when it should."""

import json
import re
import shutil
import subprocess

import pytest
from dashboard import CONTRIB, DASHBOARD, filled, metrics_of, panels

from ipsecq.metrics.reference import names

PROMETHEUS = CONTRIB / "prometheus"
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is missing: apt-get install prometheus")
KNOWN = set(names()) | set(re.findall(r"record: (\S+)", (PROMETHEUS / "rules.yml").read_text()))


def promtool(*argv):
    done = subprocess.run(["promtool", *argv], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_configuration_rules_and_alerts():
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "rules.yml", "alerts.yml")


@needs_promtool
def test_every_alert_fires_when_it_should_and_a_gateway_that_is_well_fires_none():
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_has_a_test():
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    alerts = re.findall(r"alert: (\S+)", (PROMETHEUS / "alerts.yml").read_text())
    assert len(alerts) > 10
    assert [alert for alert in alerts if alert not in tests] == []


@pytest.mark.parametrize("file", ["rules.yml", "alerts.yml", "alerts_test.yml"])
def test_rules_and_their_tests_name_series_that_exist(file):
    text = re.sub(r"(?m)^\s*(#|- name:|job_name:|- record:).*$", "", (PROMETHEUS / file).read_text())
    asked = set(re.findall(r"\bipsecq(?:_|:)[a-z0-9_:]+", text))
    assert asked
    assert asked - KNOWN == set()


def test_the_dashboard_names_series_that_exist_and_labels_that_they_have():
    labels = names()
    for title, queries in panels():
        for query in queries:
            asked = metrics_of(filled(query))
            assert asked or query == "sum(up{job=~\"$job\",instance=~\"$instance\"})", title
            assert asked - KNOWN == set(), title
            used = set(re.findall(r"(\w+)=~?\"", filled(query))) | set(
                re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))
            )
            known = {"job", "instance"}.union(*(labels[name] for name in asked))
            assert used - known == set(), (title, query)


def test_the_dashboard_is_one_that_grafana_can_lay_out():
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    titles = [title for title, _ in panels()]
    assert len(titles) == len(set(titles)) > 20
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        columns, lines = (range(place[at], place[at] + place[size]) for at, size in ("xw", "yh"))
        cells = {(x, y) for x in columns for y in lines}
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
    assert "$datasource" not in json.dumps(DASHBOARD).replace("${datasource}", "")


DOC = (CONTRIB.parent / "docs" / "monitoring.md").read_text()


def test_the_guide_names_every_alert_and_every_event():
    alerts = re.findall(r"alert: (\S+)", (PROMETHEUS / "alerts.yml").read_text())
    assert [alert for alert in alerts if f"`{alert}`" not in DOC] == []
    source = "".join(path.read_text() for path in (CONTRIB.parent / "ipsecq" / "daemon").glob("*.py"))
    told = r"""(?:publish|publish_limited|observer|delete_sa)\([^")]*"([a-z_]+)(?::\w+)?\""""
    events = set(re.findall(told, source)) | set(re.findall(r'"event": "([a-z_]+)"', source))
    events |= set(re.findall(r'"(tunnel_\w+|worker_(?:up|down))"', source))
    assert {"hello", "sa_added", "sa_expired", "acquire", "drops", "lost", "tunnel_down", "reload"} <= events
    assert [event for event in sorted(events) if f"`{event}`" not in DOC] == []
