"""Worlds to break: every test has its own."""

import pytest
from world import open_world, started

from ipsecq.lab.netns import Lab


@pytest.fixture
def make_world():
    """Worlds of a test's own: ``make_world(router=…, wire_mtu=…, tunnel=…)``."""
    with Lab() as lab:
        yield lambda **shape: open_world(lab, **shape)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The daemons' logs beside a failure."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {gateway.space.role}", gateway.log_tail()) for gateway in started]
    return report
