"""Every MTU from 576 to 9000: TCP never stalls, and senders learn the tunnel's MTU from ICMP."""

import re

import pytest

from ipsecq.lab.capture import Capture, in_clear
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping, tcp, udp_echo

pytestmark = pytest.mark.root

MTUS = [576, 900, 1280, 1400, 1492, 1500, 4000, 9000]


@pytest.mark.parametrize("router", [False, True], ids=["own-link", "behind-a-router"])
@pytest.mark.parametrize("mtu", MTUS)
def test_tcp_and_udp_cross_a_wire_of_any_mtu(make_world, mtu, router):
    """The LAN's MTU is 9000: every sender starts too big.  Behind a router only ICMP tells gateway 1 of the MTU."""
    world = make_world(lan_mtu=9000, wire_mtu=mtu, router=router)
    one, two = world.network.sites
    router_space = world.network.router
    with Capture(*((router_space, "left") if router else (one.gateway, "wan"))) as wire:
        for version in (4, 6) if mtu >= 1280 else (4,):
            for reverse in (False, True):
                transfer = tcp(
                    one.host, two.host, two.host_address(version), 4_000_000, reverse=reverse, timeout=20
                )
                assert transfer.digest_matches
                assert transfer.longest_pause < 3
            sizes = [1, 500, 1400, 3000, 9000, 1400, 9000]
            echoes = udp_echo(one.host, two.host, two.host_address(version), sizes, timeout=2)
            assert echoes.damaged == []
            # A datagram may be what teaches a sender the MTU (one at each host); sent again, each arrives.
            assert len(echoes.lost) <= 3
            again = udp_echo(one.host, two.host, two.host_address(version), echoes.lost)
            assert again.returned == echoes.lost
        wire.settle()
    assert in_clear(wire.frames(), one.lan4, two.lan4, one.lan6, two.lan6) == []


def route_mtu(host, destination):
    """The path MTU that a host has learned towards a destination."""
    found = re.search(r"mtu (\d+)", host.run("ip", "route", "get", destination).stdout)
    return int(found[1]) if found else 1500


@pytest.mark.parametrize("mtu", [1280, 1400, 1500])
def test_a_sender_with_df_learns_the_tunnels_mtu(make_world, mtu):
    world = make_world(lan_mtu=1500, wire_mtu=mtu)
    one, two = world.network.sites

    def learned():
        """The kernel's own forwarding answers first, with the link's MTU; what then fits the link meets the tunnel's."""
        ping(one.host, two.host4, count=1, size=route_mtu(one.host, two.host4) - 28, df=True, wait=0.2)
        known = route_mtu(one.host, two.host4)
        # AES-GCM in an IPv4 tunnel: outer header 20, ESP header 8, IV 8, ICV 16, trailer 2, padding to four octets.
        return known if mtu - 57 <= known <= mtu - 54 else 0

    size = wait_for(learned, "the tunnel's MTU", 15) - 28
    assert ping(one.host, two.host4, count=3, size=size, df=True) == 3


@pytest.mark.parametrize("mtu", [1400, 1500])
def test_an_ipv6_sender_learns_the_tunnels_mtu(make_world, mtu):
    world = make_world(lan_mtu=1500, wire_mtu=mtu)
    one, two = world.network.sites

    def learned():
        ping(one.host, two.host6, count=1, size=1452, wait=0.2)
        return mtu - 77 <= route_mtu(one.host, two.host6) <= mtu - 74

    wait_for(learned, "the tunnel's MTU", 15)
    assert ping(one.host, two.host6, count=3, size=1452) == 3  # in fragments now
