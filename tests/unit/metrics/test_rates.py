"""Rates out of two samples."""

import pytest
from live_samples import sa, sample, worker

from ipsecq.metrics import rates


def test_rates_are_differences_over_the_time_between():
    view = rates.view(
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
    view = rates.view(sample(packets=1000, started=900.0), sample(1002.0, packets=7, started=1001.0))
    assert view.packets == {"in": 0, "out": 0}


@pytest.mark.parametrize("key", rates.SORTS)
def test_every_order_is_the_opposite_when_reversed(key):
    flows = rates.view(
        sample(),
        sample(1001.0, sas=[sa(3, 5, 500, peer="10.0.0.3"), sa(1, 9, 100, peer="10.0.0.1", bad=4), sa(2, 7, 900, bad=1)]),
    ).sas
    order = [flow.spi for flow in rates.ordered(flows, key)]
    assert [flow.spi for flow in rates.ordered(flows, key, reverse=True)] == order[::-1]
    first = {"b": 2, "k": 1, "d": 1, "t": 2, "a": 1, "n": 1}[key]
    assert order[0] == f"0x{first:08x}"
