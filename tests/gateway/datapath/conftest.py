"""A network of two namespaces, without a gateway."""

from __future__ import annotations

import pytest

from ipsecq.lab import topology, traffic
from ipsecq.lab.netns import Lab


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def pair(lab):
    """Two namespaces on one link that know each other: (near, far), 10.9.0.1 and 10.9.0.2, fd00:9::1 and fd00:9::2."""
    near, far = lab.namespace("near"), lab.namespace("far")
    lab.link(near, "eth0", far, "eth0")
    topology.address(near, "eth0", "10.9.0.1/24", "fd00:9::1/64")
    topology.address(far, "eth0", "10.9.0.2/24", "fd00:9::2/64")
    for address in ("10.9.0.2", "fd00:9::2"):
        assert traffic.ping(near, address, count=1) == 1
    return near, far
