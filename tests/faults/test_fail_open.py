"""``-fail_open``: while nobody serves it, such a policy's traffic passes in clear, and no other policy's does."""

import pytest

from ipsecq.lab.capture import Capture, in_clear
from ipsecq.lab.gateway import start_all
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root


def test_a_fail_open_policy_passes_in_clear_while_the_daemon_is_dead_and_nothing_else_does(make_world):
    world = make_world()
    one, two = world.network.sites
    for gateway, site in zip(world.gateways, world.network.sites, strict=True):
        # IPv6 is open, IPv4 is not.
        text = gateway.policy.read_text()
        gateway.policy.write_text("".join(
            line.replace(" any -P", " any -fail_open -P") if line.startswith("spdadd fd00") else line
            for line in text.splitlines(keepends=True)
        ))  # fmt: skip
        gateway.command("reload")
        # The operator's own firewall lets in from the wire what comes out of the tunnel.
        site.gateway.nft('insert rule inet operator forward iifname "wan" oifname "lan" ct state new accept')
        assert gateway.metric("ipsecq_fail_open_policies") == 2
        assert "FAIL OPEN" in gateway.command("status").stdout
        assert "FAIL OPEN" in gateway.log.read_text()

    lans = [site.lan(version) for site in world.network.sites for version in (4, 6)]
    with Capture(one.gateway, "wan") as wire:
        assert ping(one.host, two.host6) == 3
        assert ping(one.host, two.host4) == 3
        wire.settle()
        assert in_clear(wire.frames(), *lans) == []  # a daemon that lives protects both

    for gateway, site in zip(world.gateways, world.network.sites, strict=True):
        workers = gateway.workers()
        gateway.kill()
        wait_for(lambda: not set(workers) & set(site.gateway.pids()), "the workers to end", 5)  # noqa: B023
    with Capture(one.gateway, "wan") as wire:
        assert ping(one.host, two.host6) == 3
        assert ping(two.host, one.host6) == 3
        assert ping(one.host, two.host4, count=2, wait=0.3) == 0
        assert ping(two.host, one.host4, count=2, wait=0.3) == 0
        wire.settle()
    assert in_clear(wire.frames(), one.lan6)
    assert in_clear(wire.frames(), one.lan4, two.lan4) == []

    start_all(world.gateways)
    with Capture(one.gateway, "wan") as wire:
        assert ping(one.host, two.host6) == 3
        assert ping(two.host, one.host4) == 3
        wire.settle()
    assert in_clear(wire.frames(), *lans) == []


def test_clear_packets_of_a_fail_open_policy_do_not_enter_while_the_daemon_lives(make_world):
    world = make_world()
    one, two = world.network.sites
    text = world.one.policy.read_text()
    world.one.policy.write_text(text.replace(" any -P", " any -fail_open -P"))
    world.one.command("reload")
    world.two.stop()
    two.gateway.run("nft", "flush", "ruleset")  # the far gateway protects nothing any more
    before = world.one.metric("ipsecq_drops_total", reason="in_polvio")
    with Capture(one.host, "eth0") as inside:
        one.gateway.nft('insert rule inet operator forward iifname "wan" oifname "lan" ct state new accept')
        for version in (4, 6):
            assert ping(two.host, one.host_address(version), count=2, wait=0.3) == 0
        inside.settle()
    assert [frame for frame in inside.frames() if frame.version and frame.src in (two.host4, two.host6)] == []
    assert world.one.metric("ipsecq_drops_total", reason="in_polvio") == before + 4
