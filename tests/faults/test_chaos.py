"""Twenty seconds of everything that can go wrong; ``make chaos`` goes on for ten minutes."""

import pytest

from ipsecq.lab.chaos import Chaos
from ipsecq.lab.netns import Lab

pytestmark = pytest.mark.root


def test_nothing_in_clear_no_iv_twice_and_no_replay_taken_whatever_dies():
    with Lab() as lab:
        report = Chaos(lab, seed=7, seconds=20, least=8).run()
    print(report.text())
    assert report.problems == []
    assert (report.wire.reused, report.wire.clear, report.wire.unknown) == (0, 0, 0)
    assert report.wire.pairs > 10_000
    assert report.killed >= 3
    assert len(report.events) >= 8
