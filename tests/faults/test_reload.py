"""A reload is a transaction: all of the files or nothing, and no packet of an unchanged flow is lost either way."""

import pytest
from flow import Flow

from ipsecq.lab.gateway import Tunnel
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root


def sa(gateway, spi):
    return next(each for each in gateway.status()["sas"] if int(each["spi"], 16) == spi)


def without_flush(text):
    return text.replace("spdflush;\n", "").replace("flush;\n", "")


def test_a_broken_file_is_refused_with_its_place_and_a_good_one_adds_a_tunnel_and_neither_loses_a_packet(make_world):
    world = make_world(tunnel=lambda network: Tunnel(network, versions=(4,)))
    more = Tunnel(world.network, versions=(6,), spi=0x2000)
    one, two = world.network.sites
    before = {gateway: gateway.policy.read_text() for gateway in world.gateways}
    assert ping(one.host, two.host4) == 3
    with Flow(one.host, two.host4) as flow:
        counted = sa(world.one, world.tunnel.spi_from(one, 4))["packets"]
        for gateway, site in zip(world.gateways, world.network.sites, strict=True):
            gateway.policy.write_text(
                before[gateway].replace("spdadd", "#spdadd") + without_flush(more.setkey(site)) + "spdadd 10.1.0.0/16 x;\n"
            )
            line = gateway.policy.read_text().count("\n")
            refused = gateway.command("reload", check=False)
            assert refused.returncode == 2
            assert refused.stdout == ""
            assert f"{gateway.policy}:{line}:20: " in refused.stderr
            assert refused.stderr.count("\n") == 1
            status = gateway.status()
            assert (status["sa_count"], status["policy_count"]) == (2, 2)
            assert status["reload"]["success"] is False
            assert "\nipsecq_reload_last_success 0.0\n" in gateway.metrics_text()
        flow.goes_on()
        for gateway, site in zip(world.gateways, world.network.sites, strict=True):
            gateway.policy.write_text(before[gateway] + without_flush(more.setkey(site)))
            gateway.command("reload")
            status = gateway.status()
            assert (status["sa_count"], status["policy_count"]) == (4, 4)
            assert status["reload"]["success"] is True
        for _ in range(3):
            world.one.command("reload")
        assert ping(one.host, two.host6) == 3
        flow.goes_on()
        assert sa(world.one, world.tunnel.spi_from(one, 4))["packets"] > counted
    assert (flow.sent, flow.received) == (flow.sent, flow.sent)


def test_a_reload_that_takes_a_tunnel_away_ends_it_and_leaves_the_other(make_world):
    world = make_world()
    one, two = world.network.sites
    assert ping(one.host, two.host6) == 3
    fewer = Tunnel(world.network, versions=())
    fewer.versions, fewer.lines = (4,), [line for line in world.tunnel.lines if ":" not in line.split()[1]]
    with Flow(one.host, two.host4) as flow:
        for gateway, site in zip(world.gateways, world.network.sites, strict=True):
            gateway.policy.write_text(fewer.setkey(site))
            gateway.reload()  # SIGHUP
        wait_for(lambda: [gateway.status()["sa_count"] for gateway in world.gateways] == [2, 2], "the reloads", 20)
        flow.goes_on(60)
    assert flow.received == flow.sent


def test_the_kernel_follows_when_policies_change_places(make_world):
    """Of overlapping policies with one priority the first wins, whichever was there first and whatever its id is."""
    world = make_world()
    one, two = world.network.sites
    lines = world.one.policy.read_text()
    flush, rest = lines.split("spdadd", 1)
    exception = f"spdadd {one.lan4} {two.host4}/32 any -P out none;\n"

    def protected():
        """In clear the far gateway refuses it."""
        return ping(one.host, two.host4, count=1, wait=1.0) == 1

    # Alone at first, it is the oldest.
    before, behind = f"{flush}{exception}spdadd{rest}", lines + exception
    for text, wanted in ((flush + exception, False), (before, False), (behind, True), (before, False), (behind, True)):
        world.one.policy.write_text(text)
        world.one.command("reload")
        assert protected() is wanted
    for priority, wanted in (("prio high", False), ("prio low", True), ("", True)):
        change = f"spdupdate {one.lan4} {two.host4}/32 any -P out {priority} none;"
        world.one.command("setkey", "-c", stdin=change)
        assert protected() is wanted


def test_what_cannot_change_in_a_reload_is_named(make_world):
    world = make_world()
    text = world.one.config.read_text()
    world.one.config.write_text(text.replace("workers = 2", "workers = 3"))
    refused = world.one.command("reload", check=False)
    assert refused.returncode != 0
    assert "[daemon] workers cannot change in a reload: restart ipsecq for it" in refused.stderr
    assert len(world.one.workers()) == 2
    assert ping(world.network.one.host, world.network.two.host4) == 3
