"""The status page: everything in one answer, nothing of it trusted by the browser, no key in it."""

import base64
import hashlib
import json
import re
import urllib.request

import pytest
from snapshots import Fixed, full

from ipsecq.metrics import live, page
from ipsecq.metrics.server import MetricsServer
from ipsecq.metrics.source import Snapshot, TunnelSample


@pytest.fixture
def fetch():
    server = MetricsServer("127.0.0.1", 0, Fixed(full()))
    server.start()
    yield lambda path: urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5)
    server.close()


def test_the_page_and_its_data_are_served(fetch):
    with fetch("/") as answer:
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        html = answer.read().decode()
    with fetch("/status.json") as answer:
        data = json.loads(answer.read())
    first = json.loads(re.search(r'<script id="first" type="application/json">(.*?)</script>', html)[1])
    assert first == data
    (sa,) = data["sas"]
    assert (sa["spi"], sa["direction"], sa["packets"], sa["replays"], sa["used"]) == ("0x00001001", "out", 5, 2, 0.7)
    assert data["tunnels"][0]["up"] is False
    assert {drop["reason"]: drop["count"] for drop in data["drops"]} == {
        "esp_replay": 2, "queue_full": 3, "socket_full": 4, "truncated": 6, "ring_full": 7,
    }  # fmt: skip
    assert data["workers"][1]["offloads"] == ["coalesce"]
    assert data["offloads"] == [
        {"name": "coalesce", "active": True, "workers": [0], "why": ""},
        {"name": "gso", "active": False, "workers": [], "why": "switched off"},
    ]
    assert "4b4b" not in html
    assert "KKKK" not in html


def test_the_browser_may_run_this_script_and_nothing_else(fetch):
    with fetch("/") as answer:
        policy, html = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for name, pattern in (("script-src", "<script>(.*?)</script>"), ("style-src", "<style>(.*?)</style>")):
        (text,) = re.findall(pattern, html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}';" in policy
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?!metrics|status\.json)[\w:/]""", html) == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", html)
    addresses = set(re.findall(r"https?://[\w./]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}


def test_what_is_shown_cannot_end_the_element_that_it_stands_in():
    tunnel = TunnelSample("</script><script>alert(1)</script>", "<!--", False, "@DATA@")
    html = page.render(live.data(Snapshot(tunnels=(tunnel,)))).decode()
    assert html.count("</script>") == page.TEMPLATE.count("</script>")
    assert "<!--" not in html
    first = re.search(r'type="application/json">(.*?)</script>', html)[1]
    assert json.loads(first)["tunnels"][0]["local"] == tunnel.local


def test_a_gateway_without_anything_has_a_page():
    assert json.loads(json.dumps(live.data(Snapshot())))["sas"] == []
