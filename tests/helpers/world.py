"""Networks with real daemons at both ends, for the tests of gateway and faults."""

from dataclasses import dataclass

from ipsecq.lab.gateway import Gateway, Tunnel, start_all
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
    start_all(gateways)
    return World(network, tunnel, *gateways)
