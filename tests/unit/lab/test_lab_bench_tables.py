"""The benchmark's tables that are no paths: the workers' one runs for real, in small; both get onto the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipsecq.lab import bench_report, bench_workers
from ipsecq.lab.bench_memory import Memory, Usage
from ipsecq.lab.bench_workers import Run, Scaling


@pytest.mark.parametrize("suite", bench_workers.SUITES, ids=lambda suite: suite.encryption)
def test_teams_of_workers_seal_and_open_without_loss(suite: bench_workers.Suite) -> None:
    found = bench_workers.measure(suite, rounds=2, seconds=0.05, sas=16)
    assert len(found.one) == len(found.two) == 2
    assert all(run.kpps > 0 and run.cost > 0 for run in found.one + found.two)


def test_the_page_has_both_tables(tmp_path: Path) -> None:
    memory = Memory(10_000, 10_000, 2, 20_000, 20_000, (Usage("daemon", 160, 140, 130), Usage("worker 0", 93.25, 70, 66)))
    scaling = Scaling("AES-128-GCM", [Run(40.0, 11.0), Run(50.0, 12.0), Run(60.0, 13.0)], [Run(90.0, 12.5)])
    page = tmp_path / "benchmarks.md"
    bench_report.write(page, {}, {}, rounds=3, seconds=1, memory=memory, scalings=[scaling])
    text = page.read_text()
    assert "| worker 0 | 93.2 | 70.0 | 66.0 |" in text
    assert "| AES-128-GCM | 50.0 (40.0 to 60.0) | 90.0 | 1.80 | 12.0 | 12.5 |" in text


def test_without_them_the_page_has_neither(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    bench_report.write(page, {}, {}, rounds=3, seconds=1)
    assert "Memory" not in page.read_text()
    assert "Two workers" not in page.read_text()
