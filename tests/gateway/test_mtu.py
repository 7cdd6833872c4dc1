"""Every MTU from 576 to 9000: TCP never stalls, and senders learn the tunnel's MTU from ICMP."""

import contextlib
import errno
import json
import re
import socket

import pytest

from ipsecq.datapath.output import IP_MTU_DISCOVER
from ipsecq.lab.capture import Capture, in_clear
from ipsecq.lab.gateway import Tunnel
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import PMTUDISC_DO, ping, tcp, udp_echo
from ipsecq.packet import icmp, ipv4

pytestmark = pytest.mark.root

PMTUDISC_DONT = 0

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
    found = re.search(r"mtu (?:lock )?(\d+)", host.run("ip", "route", "get", destination).stdout)
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


LARGE = 1400
"""With any headers it is more than the wire behind the router carries, and less than the sender's own link does."""


def told(space, kind, protocol, payload, *, address, bind=None):
    """How a socket that must not fragment learns the path MTU: it goes on sending until the kernel says "too long"."""
    with space.socket(socket.AF_INET, kind, protocol) as sender:
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        if bind:
            sender.bind(bind)

        def refused():
            try:
                sender.sendto(payload, address)
            except OSError as error:
                return error.errno == errno.EMSGSIZE
            return False

        wait_for(refused, "EMSGSIZE", 15)


def test_a_program_on_the_nat_t_port_learns_its_path_mtu(make_world):
    """IKE beside ESP in UDP: after the non-ESP marker the packets are not ours, and neither are errors about them."""
    world = make_world(lan_mtu=1500, wire_mtu=1400, router=True)
    one, two = world.network.sites
    ike = bytes(4) + bytes([7]) * (LARGE - 4)
    told(one.gateway, socket.SOCK_DGRAM, 0, ike, address=(two.wan4, 4500), bind=(one.wan4, 4500))
    assert route_mtu(one.gateway, two.wan4) == 1400
    assert world.one.metric("ipsecq_events_total", event="pmtu_refused") == 0


@pytest.mark.parametrize("protocol", ["esp", "esp-in-udp"])
def test_a_host_behind_our_nat_with_ipsec_of_its_own_learns_its_path_mtu(make_world, protocol):
    world = make_world(lan_mtu=1500, wire_mtu=1400, router=True)
    one, two = world.network.sites
    esp = (0x0BADCAFE).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes(LARGE - 8)
    if protocol == "esp":
        told(one.host, socket.SOCK_RAW, 50, esp, address=(two.wan4, 0))
    else:
        told(one.host, socket.SOCK_DGRAM, 0, esp, address=(two.wan4, 4500), bind=(one.host4, 4500))
    assert route_mtu(one.host, two.wan4) == 1400


class SixTunnel(Tunnel):
    """IPv4 through an IPv6 tunnel."""

    def setkey(self, near):
        far = self.network.two if near is self.network.one else self.network.one
        ends = near.wan6, far.wan6
        return "\n".join([
            *self.lines,
            f"spdadd {near.lan4} {far.lan4} any -P out ipsec esp/tunnel/{ends[0]}-{ends[1]}/require;",
            f"spdadd {far.lan4} {near.lan4} any -P in ipsec esp/tunnel/{ends[1]}-{ends[0]}/require;",
        ])  # fmt: skip


@pytest.mark.parametrize("udp", [False, True], ids=["esp", "esp-in-udp"])
def test_an_ipv6_tunnel_learns_the_mtu_from_an_error_about_a_fragment_of_its_own(make_world, udp):
    """Datagrams without DF, that are too long for the first link already: what the router quotes is a fragment."""
    world = make_world(
        lan_mtu=1500, wire_mtu=1400, router=True, tunnel=lambda network: SixTunnel(network, versions=(6,), udp=udp)
    )
    one, two = world.network.sites
    with (
        two.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        one.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((two.host4, 7777))
        receiver.setblocking(False)
        sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DONT)

        def arrives():
            sender.sendto(bytes(1440), (two.host4, 7777))
            with contextlib.suppress(BlockingIOError):
                return len(receiver.recv(9000))
            return 0

        assert wait_for(arrives, "a datagram", 15) == 1440
    assert world.one.metric("ipsecq_events_total", event="pmtu_learned") > 0
    assert world.one.metric("ipsecq_events_total", event="pmtu_refused") == 0


def path_mtu(gateway, *flow):
    """What the daemon knows of the way to the flow's tunnel end."""
    return json.loads(gateway.command("explain", *flow, "--live", "--json").stdout)["path_mtu"]


@pytest.mark.parametrize("udp", [False, True], ids=["esp", "esp-in-udp"])
def test_forged_errors_that_the_kernel_believes_do_not_bring_a_tunnel_below_min_pmtu(make_world, udp):
    """An error about a ping's answer names no socket and no SA: the kernel lets anybody lower a route's MTU with one."""
    world = make_world(
        router=True, lan_mtu=1500, wire_mtu=1500, tunnel=lambda network: Tunnel(network, udp=udp),
        settings="[sysctl]\nnet.inet.ipsec.min_pmtu = 1280\n",
    )  # fmt: skip
    one, two = world.network.sites
    ends = [socket.inet_aton(site.wan4) for site in (one, two)]
    answer = ipv4.header(*ends, 1, 64) + bytes(64)
    forged = icmp.too_big(answer, 100, socket.inet_aton("192.0.2.254"))

    def lowered():
        with world.network.router.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as forger:
            forger.sendto(forged, (one.wan4, 0))
        return route_mtu(one.gateway, two.wan4) < 600

    wait_for(lowered, "the kernel to believe it", 15)
    flow = one.host4, two.host4, "tcp", "1", "2"
    wait_for(lambda: path_mtu(world.one, *flow) == 1280, "the daemon to ask again", 15)
    with Capture(world.network.router, "left") as wire:
        assert tcp(one.host, two.host, two.host4, 200_000).digest_matches
        assert udp_echo(one.host, two.host, two.host4, [3000]).lost == []
        wire.settle()
    lengths = [len(frame.ip) for frame in wire.frames() if frame.version == 4 and frame.ip[12:16] == ends[0]]
    assert max(lengths) > 1200
    assert world.one.metric("ipsecq_events_total", event="pmtu_learned") == 0


def test_a_link_and_a_route_that_are_smaller_than_min_pmtu_are_obeyed(make_world):
    world = make_world(lan_mtu=1500, wire_mtu=900, settings="[sysctl]\nnet.inet.ipsec.min_pmtu = 1400\n")
    one, two = world.network.sites
    flow = one.host4, two.host4, "tcp", "1", "2"
    assert path_mtu(world.one, *flow) == 900
    assert tcp(one.host, two.host, two.host4, 200_000).digest_matches
    one.gateway.ip(f"route add {two.wan4}/32 dev wan mtu 700")
    wait_for(lambda: path_mtu(world.one, *flow) == 700, "the route's MTU", 15)
    assert tcp(one.host, two.host, two.host4, 200_000).digest_matches
