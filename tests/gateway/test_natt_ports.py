"""ESP in UDP on ports other than 4500: traffic both ways, in bursts and one by one, and the path MTU."""

import json

import pytest

from ipsecq.lab.capture import Capture
from ipsecq.lab.gateway import Tunnel
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping, tcp

pytestmark = pytest.mark.root


def path_mtu(gateway, *flow):
    """What the daemon knows of the way to the flow's tunnel end."""
    return json.loads(gateway.command("explain", *flow, "--live", "--json").stdout)["path_mtu"]


@pytest.mark.parametrize(
    ("ports", "port"), [("[4501]", 4501), ("[4500, 4501]", 4501), ("[4501, 4500]", 4500)],
    ids=["another", "the-second", "4500-as-the-second"],
)  # fmt: skip
def test_every_configured_port_carries_esp_and_teaches_the_path_mtu(make_world, ports, port):
    world = make_world(
        router=True, wire_mtu=1400, tunnel=lambda network: Tunnel(network, udp=True, port=port),
        settings=f"[nftables]\nnatt_ports = {ports}\n[sysctl]\nnet.inet.ipsec.dfbit = 2\n",
    )  # fmt: skip
    one, two = world.network.sites
    with Capture(world.network.router, "left") as wire:
        for version in (4, 6):
            assert ping(one.host, two.host_address(version)) == 3
            for reverse in (False, True):
                assert tcp(one.host, two.host, two.host_address(version), 1_000_000, reverse=reverse).digest_matches
        wire.settle()
    ports_seen = set()
    for frame in wire.frames():
        at = {4: 20, 6: 40}.get(frame.version, 0)
        if at and frame.ip[{4: 9, 6: 6}[frame.version]] == 17:
            ports_seen.add((frame.version, frame.ip[at : at + 2], frame.ip[at + 2 : at + 4]))
    assert ports_seen == {(version, port.to_bytes(2), port.to_bytes(2)) for version in (4, 6)}
    for version in (4, 6):
        flow = one.host_address(version), two.host_address(version), "tcp", "1", "2"
        wait_for(lambda flow=flow: path_mtu(world.one, *flow) == 1400, "the path MTU", 15)
    assert world.one.metric("ipsecq_events_total", event="pmtu_learned") >= 2
