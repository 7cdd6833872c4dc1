"""Real traffic through two gateways: all of it arrives, and the wire shows ESP alone."""

import os

import pytest

from ipsecq.lab.capture import Capture, in_clear, other_than_esp, repeated_sequence_numbers
from ipsecq.lab.gateway import Tunnel
from ipsecq.lab.traffic import MARKER, ping, tcp, udp_echo

pytestmark = pytest.mark.root

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def lans(world):
    return [site.lan(version) for site in world.network.sites for version in (4, 6)]


@VERSIONS
def test_ping_crosses_in_both_directions(tunnel_net, version):
    one, two = tunnel_net.network.sites
    assert ping(one.host, two.host_address(version)) == 3
    assert ping(two.host, one.host_address(version)) == 3


@VERSIONS
@pytest.mark.parametrize("reverse", [False, True], ids=["upload", "download"])
def test_200_megabytes_of_tcp_arrive_unharmed_and_the_wire_shows_esp_alone(tunnel_net, version, reverse):
    one, two = tunnel_net.network.sites
    with Capture(tunnel_net.network.router, "left", bulk=True) as wire:
        transfer = tcp(one.host, two.host, two.host_address(version), 200_000_000, reverse=reverse)
        wire.settle()
    assert transfer.digest_matches
    assert transfer.longest_pause < 3
    assert wire.lost == 0
    assert not wire.contains(MARKER)
    frames = wire.frames()
    assert len(frames) > 1000
    assert in_clear(frames, *lans(tunnel_net)) == []
    assert other_than_esp(frames) == []
    assert repeated_sequence_numbers(frames) == []


@VERSIONS
def test_udp_of_every_kind_of_size_arrives(tunnel_net, version):
    one, two = tunnel_net.network.sites
    sizes = [*range(1, 40), *range(1360, 1475), 1500, 2000, 2800, 4000, 8000, 8972, 12000, 16000, 20000]
    with Capture(tunnel_net.network.router, "left") as wire:
        echoes = udp_echo(one.host, two.host, two.host_address(version), sizes)
        assert echoes.damaged == []
        # A datagram that is too long may be what teaches a sender the tunnel's MTU; sent again, it arrives.
        assert len(echoes.lost) <= 2
        assert udp_echo(one.host, two.host, two.host_address(version), echoes.lost).returned == echoes.lost
        wire.settle()
    frames = wire.frames()
    assert not wire.contains(MARKER)
    assert in_clear(frames, *lans(tunnel_net)) == []


@VERSIONS
def test_no_answer_is_ahead_of_connection_tracking(tunnel_net, version):
    """Each ping is a connection of its own within one known flow; the firewall refuses an answer to what it hasn't seen.

    All workers share a processor, on which the far ones go before the near ones: as soon as something was sent, the
    answer is here.
    """
    one, two = tunnel_net.network.sites
    everywhere = os.sched_getaffinity(0)
    for gateway, nice in zip(tunnel_net.gateways, (19, 0), strict=True):
        for pid in gateway.workers():
            os.sched_setaffinity(pid, {min(everywhere)})
            os.setpriority(os.PRIO_PROCESS, pid, nice)
    try:
        assert sum(ping(one.host, two.host_address(version), count=1, wait=1.0) for _ in range(100)) == 100
    finally:
        for gateway in tunnel_net.gateways:
            for pid in gateway.workers():
                os.sched_setaffinity(pid, everywhere)
                os.setpriority(os.PRIO_PROCESS, pid, 0)


@VERSIONS
def test_the_gateways_own_traffic_is_protected(tunnel_net, version):
    one, two = tunnel_net.network.sites
    own = one.gateway4 if version == 4 else one.gateway6
    with Capture(tunnel_net.network.router, "left") as wire:
        assert ping(one.gateway, two.host_address(version), source=own) == 3
        assert ping(two.host, own) == 3
        wire.settle()
    assert other_than_esp(wire.frames()) == []


def test_other_traffic_is_masqueraded_and_left_alone(tunnel_net):
    one = tunnel_net.network.one
    with Capture(tunnel_net.network.router, "left") as wire:
        assert ping(one.host, "192.0.2.254") == 3
        wire.settle()
    assert {frame.src for frame in wire.frames() if frame.protocol == 1} == {one.wan4, "192.0.2.254"}


def test_connection_tracking_confirms_the_inner_flow(tunnel_net):
    one, two = tunnel_net.network.sites
    assert tcp(one.host, two.host, two.host4, 100_000).digest_matches
    for site in (one, two):
        flows = site.gateway.run("conntrack", "-L", "-p", "tcp").stdout
        flow = [line for line in flows.splitlines() if f"src={one.host4} dst={two.host4}" in line]
        assert flow, flows
        assert all("ASSURED" in line for line in flow)


def test_the_operators_table_is_not_touched(make_world):
    world = make_world()
    gateway = world.network.one.gateway
    rules = gateway.run("nft", "-s", "list", "table", "inet", "operator").stdout
    tables = gateway.run("nft", "list", "tables").stdout
    assert ping(world.network.one.host, world.network.two.host4) == 3
    world.one.stop()
    assert gateway.run("nft", "-s", "list", "table", "inet", "operator").stdout == rules
    before = {line for line in tables.splitlines() if "ipsecq" not in line}
    after = {line for line in gateway.run("nft", "list", "tables").stdout.splitlines() if "ipsecq" not in line}
    assert before == after == {"table inet operator"}


def test_inner_traffic_that_is_source_natted_before_esp_finds_its_way_back(make_world):
    world = make_world(
        router=True, masquerade_inner="10.9.0.1", tunnel=lambda net: Tunnel(net, hidden={(1, 4): "10.9.0.1/32"})
    )
    one, two = world.network.sites
    with Capture(two.host, "eth0") as inside, Capture(world.network.router, "left") as wire:
        assert ping(one.host, two.host4) == 3
        assert tcp(one.host, two.host, two.host4, 5_000_000).digest_matches
        inside.settle()
    assert {frame.src for frame in inside.frames() if frame.protocol == 6} == {"10.9.0.1", two.host4}
    assert other_than_esp(wire.frames()) == []


def test_status_and_metrics_count_what_crossed(tunnel_net):
    one, two = tunnel_net.network.sites

    def esp(gateway, direction):
        return gateway.metric("ipsecq_protocol_packets_total", protocol="esp", direction=direction)

    sent, taken = esp(tunnel_net.one, "out"), esp(tunnel_net.two, "in")
    assert ping(one.host, two.host4, count=5) == 5
    assert esp(tunnel_net.one, "out") == sent + 5
    assert esp(tunnel_net.two, "in") == taken + 5
    status = tunnel_net.one.status()
    assert len(status["workers"]) == 2
    assert {int(worker["pid"]) for worker in status["workers"]} <= set(one.gateway.pids())
