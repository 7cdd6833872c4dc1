"""ipsecq top without a terminal: rates out of two samples, and a screen that 80 columns hold."""

import pytest

from ipsecq.cli import top_model, top_screen
from ipsecq.cli.top_screen import Choices, amount, shorten


def sa(spi, packets, octets, *, peer="198.51.100.1", direction="out", bad=0, problem=""):
    ends = ("192.0.2.1", peer) if direction == "out" else (peer, "192.0.2.1")
    return {
        "spi": f"0x{spi:08x}", "protocol": "esp", "mode": "tunnel", "src": ends[0], "dst": ends[1], "direction": direction,
        "state": "mature", "algorithms": "aes-gcm-16", "packets": packets, "bytes": octets, "bad": bad, "replays": 0,
        "drops": 0, "last_use": 0, "expires": None, "used": 0.0, "successor": False, "problem": problem,
    }  # fmt: skip


def worker(index, busy, packets, *, up=True, lost=0):
    return {
        "index": index, "pid": 100 + index, "up": up, "restarts": 0, "busy": busy, "in": packets, "out": 0, "waiting": 3,
        "lost": lost, "offloads": [],
    }  # fmt: skip


def sample(time=1000.0, *, packets=0, sas=(), workers=(), drops=(), tunnels=(), started=900.0, fail_open=0, success=True):
    peers = [
        {"peer": "198.51.100.1", "direction": "out", "packets": packets, "bytes": 100 * packets, "bad": 0, "replays": 0,
         "drops": 0, "sas": 1, "last_use": 0},
    ]  # fmt: skip
    return {
        "time": time, "version": "1.2", "host": "gw1.example.net", "started": started, "mechanism": "native", "devices": [],
        "fail_open": fail_open, "reload": {"success": success, "time": 0.0}, "policies": {"in": 1, "out": 2},
        "sa_count": len(sas), "tunnel_count": len(tunnels), "packets": {"in": packets, "out": 2 * packets},
        "bytes": {"in": 100 * packets, "out": 200 * packets},
        "drops": [{"reason": name, "count": count, "meaning": "why"} for name, count in drops],
        "workers": list(workers), "tunnels": list(tunnels), "peers": peers, "sas": list(sas),
    }  # fmt: skip


def text(view, choices=None, **shape):
    return [line for _, line in top_screen.lines(view, choices or Choices(), **shape)]


def test_rates_are_differences_over_the_time_between():
    view = top_model.view(
        sample(1000.0, packets=100, sas=[sa(1, 10, 1000)], workers=[worker(0, 5.0, 100)], drops=[("esp_replay", 4)]),
        sample(1002.0, packets=300, sas=[sa(1, 30, 5000, bad=6), sa(2, 8, 80)], workers=[worker(0, 6.0, 300, lost=4)],
               drops=[("esp_replay", 10), ("in_polvio", 1)]),
    )  # fmt: skip
    assert (view.packets, view.bits) == ({"in": 100, "out": 200}, {"in": 80_000, "out": 160_000})
    first, second = view.sas
    assert (first.packets, first.bits, first.bad, first.total_bytes) == (10, 16_000, 3, 5000)
    assert (second.packets, second.bits) == (4, 320)
    assert (view.workers[0].load, view.workers[0].packets_in, view.workers[0].lost) == (0.5, 100, 2)
    assert [(drop.reason, drop.rate, drop.total) for drop in view.drops] == [("esp_replay", 3, 10), ("in_polvio", 0.5, 1)]
    assert view.peers[0].packets == 100


def test_a_daemon_that_was_restarted_between_two_looks_has_no_rates_yet():
    view = top_model.view(sample(packets=1000, started=900.0), sample(1002.0, packets=7, started=1001.0))
    assert view.packets == {"in": 0, "out": 0}


def test_alarms_come_first():
    tunnel = {"local": "192.0.2.1", "peer": "198.51.100.1", "up": False, "missing": "no outbound ESP SA", "networks": []}
    now = sample(fail_open=2, success=False, tunnels=[tunnel], workers=[worker(0, 0, 0, up=False)])
    shown = "\n".join(text(top_model.view(now, now)))
    for alarm in ("FAIL OPEN: 2 policies", "TUNNEL DOWN: 192.0.2.1 - 198.51.100.1: no outbound", "WORKER 0 DOWN", "refused"):
        assert alarm in shown


@pytest.mark.parametrize("key", top_model.SORTS)
def test_every_order_is_the_opposite_when_reversed(key):
    flows = top_model.view(
        sample(),
        sample(1001.0, sas=[sa(3, 5, 500, peer="10.0.0.3"), sa(1, 9, 100, peer="10.0.0.1", bad=4), sa(2, 7, 900, bad=1)]),
    ).sas
    order = [flow.spi for flow in top_model.ordered(flows, key)]
    assert [flow.spi for flow in top_model.ordered(flows, key, reverse=True)] == order[::-1]
    first = {"b": 2, "k": 1, "d": 1, "t": 2, "a": 1, "n": 1}[key]
    assert order[0] == f"0x{first:08x}"


PEERS = ["198.51.100.1", "2001:db8:1234:5678:9abc:def0:1234:5678"]


@pytest.mark.parametrize("peers", [False, True])
@pytest.mark.parametrize("scale", [1, 10**4, 10**9, 10**13])
def test_no_line_is_longer_than_80_columns_and_no_column_runs_into_the_next(peers, scale):
    before = sample(sas=[sa(n, 0, 0) for n in range(30)], workers=[worker(n, 0, 0) for n in range(20)])
    now = sample(
        1001.0, packets=scale, drops=[("ipcomp_badkcr", scale)],
        sas=[sa(n, scale, 99 * scale, peer=PEERS[n % 2], bad=scale, problem="x" * n) for n in range(30)],
        workers=[worker(n, 0.99, scale, lost=scale) for n in range(20)],
    )  # fmt: skip
    lines = text(top_model.view(before, now), Choices(peers=peers))
    assert max(map(len, lines)) <= 80
    table = lines[-1:] if peers else lines[-30:]
    assert {len(line.split()) for line in table} == ({7} if peers else {9})


@pytest.mark.parametrize("height", [1, 5, 24, 100])
def test_a_screen_is_as_high_as_the_terminal_and_ends_with_the_keys(height):
    now = sample(sas=[sa(n, 0, 0) for n in range(50)], workers=[worker(0, 0, 0)])
    lines = text(top_model.view(now, now), height=height)
    assert len(lines) == height
    assert lines[-1].startswith("q quit")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.04, "0.0"), (0.25, "0.2"), (9.94, "9.9"), (12.6, "13"), (999, "999"), (1000, "1.0k"), (9960, "10k"),
     (999_400, "999k"), (999_600, "1.0M"), (1.5e9, "1.5G"), (1e15, "1000T")],
)  # fmt: skip
def test_amounts_are_short(value, shown):
    assert amount(value) == shown


def test_long_addresses_keep_both_ends():
    assert shorten("2001:db8:1234:5678:9abc:def0:1234:5678", 20) == "2001:db8:…:1234:5678"
    assert shorten("192.0.2.1", 20) == "192.0.2.1"
