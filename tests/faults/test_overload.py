"""Six seconds of more than the gateway can take; ``make overload`` goes on for a minute and prints the figures."""

import pytest

from ipsecq.lab.netns import Lab
from ipsecq.lab.overload import Overload

pytestmark = pytest.mark.root


def test_a_flood_costs_another_sas_flow_nothing_and_leaves_the_daemon_answering():
    with Lab() as lab:
        report = Overload(lab, seconds=6, senders=1).run()
    print(report.text())
    assert report.problems == []
    assert report.offered > 2 * report.capacity, "that was no flood"
