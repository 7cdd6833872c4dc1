"""What a batch cost, and packets that made the engine raise."""

import time

import pytest

from ipsecq.counters import COUNTERS_WORDS, HISTOGRAM_BASE, HISTOGRAM_BOUNDS, HISTOGRAM_SUM_NS, Counter
from ipsecq.datapath.accounts import LOG_INTERVAL, Refusals, account


@pytest.mark.parametrize(("elapsed", "bucket"), [(0, 0), (10_000, 0), (10_010, 1), (10**12, len(HISTOGRAM_BOUNDS))])
def test_a_batch_of_ten_counts_ten_times_in_the_bucket_of_one_packets_time(monkeypatch, elapsed, bucket):
    counters = [0] * COUNTERS_WORDS
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 500 + elapsed)
    account(counters, 500, 10)
    assert {index: value for index, value in enumerate(counters) if value} == {
        index: value
        for index, value in {
            Counter.BATCHES: 1, Counter.BUSY_NS: elapsed, HISTOGRAM_BASE + bucket: 10, HISTOGRAM_SUM_NS: elapsed,
        }.items()
        if value
    }  # fmt: skip


def test_every_refusal_is_counted_and_one_in_an_interval_logged(caplog):
    counters = [0] * COUNTERS_WORDS
    refusals = Refusals(counters)
    for now in (1000.0, 1000.0, 1000.0 + LOG_INTERVAL - 1, 1000.0 + LOG_INTERVAL):
        try:
            raise ValueError("inside")
        except ValueError:
            refusals.count(Counter.OUT_INVAL, now, "a held packet")
    assert counters[Counter.OUT_INVAL] == 4
    line = "a held packet made the engine fail; it was dropped (OUT_INVAL)"
    assert [record.message for record in caplog.records] == [line] * 2
    assert all(record.exc_info for record in caplog.records)
