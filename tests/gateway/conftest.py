"""Networks with real daemons.  ``tunnel_net`` lives as long as a module: its tests share it and break nothing."""

from dataclasses import dataclass

import pytest

from ipsecq.lab.gateway import Gateway, Tunnel
from ipsecq.lab.netns import Lab
from ipsecq.lab.topology import Network, build, firewall

started: list[Gateway] = []
"""The daemons that were started last."""


@dataclass
class World:
    """A network, its tunnel, its two daemons."""

    network: Network
    tunnel: Tunnel
    one: Gateway
    two: Gateway

    @property
    def gateways(self):
        return self.one, self.two


def open_world(lab, *, tunnel=None, workers=2, masquerade_inner=None, daemon="", settings="", **shape):
    """Both sites with firewalls and daemons that are ready."""
    network = build(lab, **shape)
    firewall(network.one, masquerade_inner=masquerade_inner)
    firewall(network.two)
    tunnel = tunnel(network) if tunnel else Tunnel(network)
    gateways = [
        Gateway(site.gateway, tunnel.setkey(site), workers=workers, daemon=daemon, settings=settings)
        for site in network.sites
    ]
    started[:] = gateways
    for gateway in gateways:
        gateway.start()
    return World(network, tunnel, *gateways)


@pytest.fixture(scope="module")
def tunnel_net():
    """Gateways with a router between them, which knows no way to the LANs."""
    with Lab() as lab:
        yield open_world(lab, router=True)


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
