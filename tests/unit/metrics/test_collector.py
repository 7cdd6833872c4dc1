"""Metrics: true figures, small labels, names that promtool accepts, no keys."""

import shutil
import socket
import subprocess
import time
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ipsecq.counters import COUNTERS_WORDS, FIRST_DROP, HISTOGRAM_BASE, HISTOGRAM_BOUNDS, HISTOGRAM_SUM_NS, Counter
from ipsecq.errors import DaemonError
from ipsecq.metrics.collector import IpsecqCollector
from ipsecq.metrics.server import MAX_CLIENTS, MetricsServer
from ipsecq.metrics.source import SaSample, Snapshot, WorkerSample
from ipsecq.numbers import Mode, Protocol
from ipsecq.sa.association import SLOT_HEADER_WORDS, SecurityAssociation, Slot
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
        Protocol.ESP, 0x1001, b"\xc0\0\2\1", b"\xc6\x33\x64\1", Mode.TUNNEL, 7, "aes-gcm-16", Key(b"K" * 20)
    )
    words = [0] * SLOT_HEADER_WORDS
    words[Slot.PACKETS], words[Slot.BYTES], words[Slot.SEQUENCE], words[Slot.REPLAY] = 5, 700, 1 << 31, 2
    return SaSample(sa, words, "out")


def full():
    first, second = page(IN_PACKETS=3, ESP_REPLAY=2, BUSY_NS=2_000_000_000), page(IN_PACKETS=4, FLOW_HIT=9)
    first[HISTOGRAM_BASE] = 10
    first[HISTOGRAM_BASE + 3] = 5
    second[HISTOGRAM_BASE + len(HISTOGRAM_BOUNDS)] = 1
    first[HISTOGRAM_SUM_NS] = 500_000_000
    workers = (WorkerSample(0, True, 1, first, 12, 3, 4), WorkerSample(1, False, 0, second))
    return Snapshot(workers, (sample(),), 1, {"in": 1, "out": 2}, started=1e9, reload_time=1e9, mechanism="native")


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


def test_the_histogram_is_cumulative():
    assert value("ipsecq_packet_seconds_bucket", le="1e-06") == 10
    assert value("ipsecq_packet_seconds_bucket", le="1e-05") == 15
    assert value("ipsecq_packet_seconds_bucket", le="+Inf") == 16
    assert value("ipsecq_packet_seconds_count") == 16
    assert value("ipsecq_packet_seconds_sum") == 0.5


def test_workers_and_queues():
    assert value("ipsecq_worker_up", worker="1") == 0
    assert value("ipsecq_worker_restarts_total", worker="0") == 1
    assert value("ipsecq_worker_busy_seconds_total", worker="0") == 2
    assert value("ipsecq_queue_length", worker="0") == 12
    assert value("ipsecq_queue_dropped_total", worker="0", kind="queue_full") == 3
    assert value("ipsecq_queue_dropped_total", worker="0", kind="socket_full") == 4


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


def test_clients_that_say_nothing_do_not_block_others_for_long(server):
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MAX_CLIENTS - 1)]
    time.sleep(0.1)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
        assert answer.status == 200
    for each in silent:
        each.close()


def test_more_clients_than_places_are_cut_off_not_kept(server):
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MAX_CLIENTS + 4)]
    cut = 0
    for each in silent:
        each.settimeout(0.3)
        try:
            cut += each.recv(1) == b""
        except TimeoutError:
            pass
        except ConnectionResetError:
            cut += 1
    assert cut == 4
    for each in silent:
        each.close()


def test_an_address_that_is_taken_is_named(server):
    with pytest.raises(DaemonError, match=f"127.0.0.1:{server.port}: Address already in use"):
        MetricsServer("127.0.0.1", server.port, Fixed(full()))
