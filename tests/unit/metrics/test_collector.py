"""Metrics: true figures, small labels, names that promtool accepts, no keys."""

import contextlib
import gzip
import select
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from snapshots import Fixed, full, page, sample

from ipsecq.counters import FIRST_DROP, Counter
from ipsecq.errors import DaemonError
from ipsecq.metrics.collector import IpsecqCollector
from ipsecq.metrics.exposition import render
from ipsecq.metrics.netstat import SECTIONS
from ipsecq.metrics.reasons import DROPS, REASONS
from ipsecq.metrics.server import MAX_CLIENTS, MetricsServer, _Handler
from ipsecq.metrics.source import SaSample, Snapshot, WorkerSample
from ipsecq.sa.association import Lifetime


def text(snapshot):
    registry = CollectorRegistry()
    registry.register(IpsecqCollector(Fixed(snapshot)))
    return generate_latest(registry).decode()


def values(snapshot):
    found = {}
    for family in text_string_to_metric_families(text(snapshot)):
        for each in family.samples:
            found[each.name, tuple(sorted(each.labels.items()))] = each.value
    return found


def value(name, **labels):
    return values(full())[name, tuple(sorted(labels.items()))]


def test_workers_are_summed():
    assert value("ipsecq_packets_total", direction="in") == 7
    assert value("ipsecq_drops_total", reason="esp_replay") == 2
    assert value("ipsecq_flow_cache_lookups_total", result="hit") == 9


def test_every_drop_reason_has_a_series_from_the_start():
    reasons = {labels[0][1] for name, labels in values(Snapshot()) if name == "ipsecq_drops_total"}
    assert reasons == {counter.name.lower() for counter in Counter if FIRST_DROP <= counter < 128}
    assert set(REASONS) == set(DROPS)


def test_the_histogram_is_cumulative():
    assert value("ipsecq_packet_seconds_bucket", worker="0", le="1e-06") == 10
    assert value("ipsecq_packet_seconds_bucket", worker="0", le="1e-05") == 15
    assert value("ipsecq_packet_seconds_bucket", worker="0", le="+Inf") == 15
    assert value("ipsecq_packet_seconds_count", worker="0") == 15
    assert value("ipsecq_packet_seconds_sum", worker="0") == 0.5
    assert value("ipsecq_packet_seconds_bucket", worker="1", le="0.1") == 0
    assert value("ipsecq_packet_seconds_count", worker="1") == 1


def test_workers_and_queues():
    assert value("ipsecq_worker_up", worker="1") == 0
    assert value("ipsecq_worker_restarts_total", worker="0") == 1
    assert value("ipsecq_worker_busy_seconds_total", worker="0") == 2
    assert value("ipsecq_queue_length", worker="0") == 12
    assert value("ipsecq_queue_dropped_total", worker="0", kind="queue_full") == 3
    assert value("ipsecq_queue_dropped_total", worker="0", kind="socket_full") == 4
    assert value("ipsecq_queue_dropped_total", worker="1", kind="truncated") == 6
    assert value("ipsecq_queue_dropped_total", worker="0", kind="ring_full") == 7
    assert value("ipsecq_offload_active", worker="1", offload="gso") == 0
    assert value("ipsecq_offload_active", worker="1", offload="coalesce") == 1
    assert value("ipsecq_worker_packets_total", worker="1", direction="in") == 4


def test_everything_that_netstat_reports_is_a_metric():
    shown = {counter for lines in SECTIONS.values() for _, summed in lines for counter in summed}
    each = {counter: number for number, counter in enumerate(sorted(shown), start=1000)}
    words = page(**{counter.name: number for counter, number in each.items()})
    exported = set(values(Snapshot((WorkerSample(0, True, 0, words),))).values())
    assert {counter.name for counter, number in each.items() if number not in exported} == set()
    assert len(set(each.values()) & exported) == len(shown)


def test_a_peer_and_a_tunnel():
    peer = {"peer": "198.51.100.1", "direction": "out"}
    assert value("ipsecq_peer_packets_total", **peer) == 9
    assert value("ipsecq_peer_auth_failures_total", **peer) == 1
    assert value("ipsecq_peer_sas", **peer) == 1
    assert value("ipsecq_tunnel_up", local="192.0.2.1", peer="198.51.100.1") == 0
    assert value("ipsecq_sas", protocol="esp", direction="out", state="mature") == 1


def test_expiry_is_there_when_a_limit_is_and_the_nearest_limit_says_how_near():
    identity = {"spi": "0x00001001", "protocol": "esp", "dst": "198.51.100.1"}
    assert value("ipsecq_sa_soft_expiry_timestamp_seconds", **identity) == 1e9 + 50
    assert value("ipsecq_sa_hard_expiry_timestamp_seconds", **identity) == 1e9 + 60
    assert value("ipsecq_sa_lifetime_used_ratio", **identity) == 0.7  # bytes; time is at 0.5
    unlimited = replace(sample().sa, soft=Lifetime(), hard=Lifetime())
    found = values(Snapshot(sas=(SaSample(unlimited, sample().words),)))
    assert not [name for name, _ in found if "expiry" in name]
    assert found["ipsecq_sa_lifetime_used_ratio", tuple(sorted(identity.items()))] == 0.5  # sequence numbers


def test_the_fast_text_says_what_the_collector_says():
    def parsed(octets):
        return {
            (family.name, family.type, family.documentation): sorted(
                (each.name, sorted(each.labels.items()), each.value) for each in family.samples
            )
            for family in text_string_to_metric_families(octets)
        }

    assert parsed(render(full()).decode()) == parsed(text(full()))


def test_an_sa_is_three_labels_and_one_info_series():
    identity = {"spi": "0x00001001", "protocol": "esp", "dst": "198.51.100.1"}
    assert value("ipsecq_sa_packets_total", **identity) == 5
    assert value("ipsecq_sa_bytes_total", **identity) == 700
    assert value("ipsecq_sa_replays_total", **identity) == 2
    assert value("ipsecq_sa_sequence_used_ratio", **identity) == 0.5
    info = identity | {"src": "192.0.2.1", "mode": "tunnel", "reqid": "7", "direction": "out", "compression": ""}
    assert value("ipsecq_sa_info", **info, encryption="aes-gcm-16", authentication="") == 1


def test_no_key_reaches_a_metric():
    assert "KKKK" not in text(full())
    assert "4b4b" not in text(full())


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_finds_nothing_to_say():
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=text(full()).encode(), capture_output=True, check=False
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, b"")


# -- the endpoint ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    server = MetricsServer("127.0.0.1", 0, Fixed(full()))
    server.start()
    yield server
    server.close()


def test_the_endpoint_serves_the_families(server):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        assert b'ipsecq_packets_total{direction="in"} 7.0' in answer.read()


def test_the_answer_is_packed_for_those_who_ask_for_it(server):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(answer.read()) == render(full())


@pytest.mark.parametrize(("path", "method", "status"), [("/x", "GET", 404), ("/metrics", "POST", 405)])
def test_anything_else_is_refused(server, path, method, status):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method), timeout=5)
    assert caught.value.status == status


def test_clients_that_say_nothing_do_not_block_others_for_long(server):
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MAX_CLIENTS - 1)]
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        assert answer.status == 200
    for each in silent:
        each.close()


def test_more_clients_than_places_are_cut_off_not_kept(server, monkeypatch):
    monkeypatch.setattr(_Handler, "timeout", 120.0)  # only those without a place are cut off
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(MAX_CLIENTS + 4)]
    for each in silent[:4]:  # those that have been silent longest
        with contextlib.suppress(ConnectionResetError):
            assert each.recv(1) == b""
    # They are accepted in the order in which they came: the server has decided about all of them by now.
    assert select.select(silent[4:], [], [], 0)[0] == []
    for each in silent:
        each.close()


def test_clients_that_never_finish_their_request_give_way_to_one_that_does(server, monkeypatch):
    monkeypatch.setattr(_Handler, "timeout", 120.0)
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(MAX_CLIENTS)]
    for each in slow:
        each.sendall(b"GET /metrics HTTP/1.0\r\nX-Never: ")
    for _ in range(2):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer:
            assert answer.status == 200
    with contextlib.suppress(ConnectionResetError):
        assert slow[0].recv(1) == b""
    for each in slow:
        each.close()


def test_a_client_that_dribbles_is_cut_off_when_its_time_for_the_whole_request_is_over(server, monkeypatch):
    monkeypatch.setattr(_Handler, "timeout", 0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as slow:
        slow.sendall(b"GET /metrics HTTP/1.0\r\n")
        slow.setblocking(False)
        dribbled = 0
        # An octet every tenth of a second is never late by itself; the server gives up long before two thousand.
        while not select.select([slow], [], [], 0.1)[0]:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                slow.send(b"x")
            dribbled += 1
            assert dribbled < 600
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1) == b""


def test_clients_whose_answer_is_being_made_keep_their_places(monkeypatch):
    asked, go_on = threading.Semaphore(0), threading.Event()

    class Slow:
        def snapshot(self):
            asked.release()
            assert go_on.wait(60)
            return full()

    server = MetricsServer("127.0.0.1", 0, Slow())
    server.start()
    try:
        good = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(MAX_CLIENTS)]
        for each in good:
            each.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        for _ in good:
            assert asked.acquire(timeout=60)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as late, contextlib.suppress(ConnectionError):
            assert late.recv(1) == b""
        go_on.set()
        for each in good:
            assert each.recv(12) == b"HTTP/1.0 200"
            each.close()
    finally:
        go_on.set()
        server.close()


def test_an_address_that_is_taken_is_named(server):
    with pytest.raises(DaemonError, match=f"127.0.0.1:{server.port}: Address already in use"):
        MetricsServer("127.0.0.1", server.port, Fixed(full()))
