"""Route-based tunnels: an ipsec0 at each gateway, static routes into it, no policy in the SPD.

The wire is the link between the gateways, and the operator's firewall lets the LANs' packets in by the name of the device
alone.  A second route to the far LAN leads over the wire in clear: a packet that went around the device would show.
"""

import time

import pytest
from world import started

from ipsecq.lab.capture import Capture, other_than_esp, repeated_sequence_numbers
from ipsecq.lab.gateway import Gateway, kill_process, start_all
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.routed import DEVICE, RoutedTunnel
from ipsecq.lab.topology import build
from ipsecq.lab.traffic import MARKER, ping, tcp, udp_echo
from ipsecq.pfkey.client import PfkeyClient
from ipsecq.pfkey.constants import MessageType
from ipsecq.pfkey.messages import Message

pytestmark = pytest.mark.root

RULES = """
    table inet operator {
        chain forward {
            type filter hook forward priority filter; policy drop;
            ct state established,related accept
            iifname "lan" oifname { "ipsec0", "ipsec6" } counter accept
            iifname { "ipsec0", "ipsec6" } oifname "lan" counter accept
            iifname "lan" oifname "wan" accept
        }
    }
"""


class World:
    def __init__(self, lab):
        self.network = build(lab)
        self.one, self.two = self.network.sites
        self.tunnel = RoutedTunnel(self.network)
        self.over6 = RoutedTunnel(self.network, outer=6, reqid=106, spi=0x2010, udp=True)
        setkey = self.tunnel.setkey() + "\n".join(self.over6.lines)
        self.gateways = [
            Gateway(site.gateway, setkey, settings=self.tunnel.settings(site) + self.over6.settings(site, "ipsec6"))
            for site in self.network.sites
        ]
        started[:] = self.gateways
        start_all(self.gateways)
        for site in self.network.sites:
            site.gateway.nft(RULES)
            # Where the packets would go if the device did not take them: to the other gateway, in clear.
            far = self.tunnel.far(site)
            site.gateway.run("ip", "route", "add", far.lan4, "via", far.wan4, "metric", "9999")
            site.gateway.run("ip", "-6", "route", "add", far.lan6, "via", far.wan6, "metric", "9999")
        self.routes()

    def routes(self):
        for site in self.network.sites:
            self.tunnel.route(site)

    def wire(self, **options):
        return Capture(self.one.gateway, "wan", **options)

    def answers(self, count=3, wait=5.0):
        return ping(self.one.host, self.two.host4, count=count, wait=wait)


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        yield World(lab)


def test_everything_crosses_and_the_wire_shows_esp_alone(world):
    one, two = world.one, world.two
    with world.wire(bulk=True) as wire:
        for version in (4, 6):
            assert ping(one.host, two.host_address(version)) == 3
            assert ping(two.host, one.host_address(version)) == 3
            for reverse in (False, True):
                transfer = tcp(one.host, two.host, two.host_address(version), 5_000_000, reverse=reverse)
                assert transfer.digest_matches
                assert transfer.longest_pause < 3
            echoes = udp_echo(one.host, two.host, two.host_address(version), [1, 500, 1352, 1400, 9000], timeout=0.7)
            assert echoes.damaged == []
            again = udp_echo(one.host, two.host, two.host_address(version), echoes.lost)
            assert again.returned == echoes.lost  # what did not fit the MTU has taught it
        wire.settle()
    frames = wire.frames()
    assert wire.lost == 0
    assert other_than_esp(frames) == []
    assert not wire.contains(MARKER)
    assert repeated_sequence_numbers(frames) == []
    assert world.gateways[0].metric("ipsecq_events_total", event="super_packets") > 50
    assert world.gateways[1].metric("ipsecq_events_total", event="coalesced") > 50
    assert all(gateway.metric("ipsecq_events_total", event="fast_path") > 1000 for gateway in world.gateways)


def test_gateways_themselves_talk_through_it(world):
    one, two = world.one, world.two
    assert ping(one.gateway, two.host4, source=one.gateway4) == 3
    assert tcp(one.gateway, two.host, two.host4, 1_000_000, source=one.gateway4).digest_matches


@pytest.mark.parametrize("version", [4, 6])
def test_it_works_between_ipv6_addresses_and_in_udp(world, version):
    one, two = world.one, world.two
    for site in (one, two):
        world.over6.route(site, "ipsec6")
    try:
        with world.wire() as wire:
            assert ping(one.host, two.host_address(version)) == 3
            assert tcp(one.host, two.host, two.host_address(version), 2_000_000).digest_matches
            wire.settle()
    finally:
        world.routes()
    frames = wire.frames()
    assert len(frames) > 20  # bursts are captured as one
    assert {frame.src for frame in frames if frame.protocol == 17 and frame.esp} == {one.wan6, two.wan6}
    assert not wire.contains(MARKER)


def test_a_smaller_path_is_told_to_senders(world):
    one, two = world.one, world.two
    told = [f"mtu {mtu}" for mtu in range(1300 - 57, 1300 - 53)]

    def learned():
        # The kernel learns from an error about an echo request only while the socket that sent it is there.
        assert ping(one.host, two.host4, count=1, size=1372, df=True, wait=0.3) == 0
        route = one.host.run("ip", "route", "get", two.host4).stdout
        return any(each in route for each in told)

    for site in (one, two):
        site.gateway.run("ip", "link", "set", "wan", "mtu", "1300")
    try:
        time.sleep(1.1)  # the route's MTU is cached for a second
        wait_for(learned, "the MTU at the host")
        assert tcp(one.host, two.host, two.host6, 2_000_000).digest_matches
    finally:
        for site in (one, two):
            site.gateway.run("ip", "link", "set", "wan", "mtu", "1500")
            site.host.run("ip", "route", "flush", "cache")
            site.gateway.run("ip", "-6", "addr", "replace", f"{site.wan6}/64", "dev", "wan", "nodad")


def test_a_device_that_is_down_lets_nothing_in(world):
    gateway = world.gateways[1]
    before = gateway.metric("ipsecq_drops_total", reason="interface_down")
    world.two.gateway.run("ip", "link", "set", DEVICE, "down")
    try:
        with Capture(world.two.host, "eth0") as inside:
            assert world.answers(wait=0.3) == 0
            wait_for(lambda: gateway.metric("ipsecq_drops_total", reason="interface_down") == before + 3, "three drops")
            inside.settle()
        assert [frame for frame in inside.frames() if frame.protocol == 1] == []
        wait_for(lambda: gateway.metric("ipsecq_interface_up", interface=DEVICE) == 0, "the news of the device", 10)
        assert "DOWN" in gateway.command("interface").stdout
    finally:
        world.two.gateway.run("ip", "link", "set", DEVICE, "up")
        world.routes()
    assert world.answers() == 3


def test_an_sa_of_its_reqid_between_other_ends_opens_nothing(world):
    """Gateway 1 has a policy that seals for one address by an SA with the interface's reqid and a stranger's address."""
    one, two = world.gateways
    key = "0x" + "5a" * 20
    add = f"add 192.0.2.77 192.0.2.2 esp 0x7777 -m tunnel -u 100 -r 32 -E aes-gcm-16 {key};"
    policy = "spdadd 10.1.0.2/32 10.2.0.2/32 any -P out ipsec esp/tunnel/192.0.2.77-192.0.2.2/unique:100;"
    for gateway, text in ((one, add + policy), (two, add)):
        gateway.space.run("sh", "-c", f"echo '{text}' > {gateway.directory}/more.conf")
        gateway.command("setkey", "-f", str(gateway.directory / "more.conf"))
    world.one.gateway.run("ip", "route", "add", "10.2.0.2/32", "via", "192.0.2.2")
    before = two.metric("ipsecq_drops_total", reason="in_interface")
    try:
        assert world.answers(wait=0.3) == 0
        wait_for(lambda: two.metric("ipsecq_drops_total", reason="in_interface") == before + 3, "three drops", 10)
    finally:
        world.one.gateway.run("ip", "route", "del", "10.2.0.2/32")
        for gateway in (one, two):
            gateway.command("reload")
    assert world.answers() == 3


def test_without_an_sa_packets_wait_and_leave_when_it_comes(world):
    gateway = world.gateways[0]
    asked = gateway.metric("ipsecq_events_total", event="acquire")
    gateway.space.run("sh", "-c", f"echo 'delete 192.0.2.1 192.0.2.2 esp 0x2001;' > {gateway.directory}/gone.conf")
    gateway.command("setkey", "-f", str(gateway.directory / "gone.conf"))
    with Capture(world.one.gateway, "wan") as wire, Capture(world.two.host, "eth0") as inside:
        with PfkeyClient.connect(gateway.directory / "run" / "pfkey") as client:
            client.request(Message(MessageType.REGISTER, 3))
            assert world.answers(wait=0.3) == 0
            client.socket.settimeout(10)
            while (message := client.receive()).type != MessageType.ACQUIRE:
                pass
            (wanted,) = client.request(Message(MessageType.X_SPDGET, policy=message.policy)).policy.requests
        assert (wanted.reqid, wanted.src, wanted.dst) == (100, b"\xc0\0\2\1", b"\xc0\0\2\2")
        wire.settle()
        frames = [frame for frame in wire.frames() if frame.version and not frame.is_neighbour_discovery]
        assert [frame for frame in frames if not frame.is_keepalive] == []  # ipsec6's SAs send those
        assert gateway.metric("ipsecq_events_total", event="acquire") > asked
        assert "no outbound SA" in gateway.command("interface").stdout
        gateway.command("reload")
        wait_for(lambda: len([frame for frame in inside.frames() if frame.protocol == 1]) >= 3, "held packets", 10)
    assert world.answers() == 3


def test_a_reload_makes_changes_and_removes_interfaces(world):
    gateway, space = world.gateways[0], world.one.gateway
    text = gateway.config.read_text()
    third = world.tunnel.settings(world.one, "ipsec2").replace("reqid = 100", "reqid = 300")
    gateway.config.write_text(text.replace("mtu = 1400", "mtu = 1380", 1) + third)
    gateway.command("reload")
    assert "mtu 1380" in space.run("ip", "link", "show", DEVICE).stdout
    assert "ipsec2" in space.run("ip", "link", "show").stdout
    assert [each["name"] for each in gateway.status()["interfaces"]] == [DEVICE, "ipsec6", "ipsec2"]
    gateway.config.write_text(text + third.replace("ipsec2", "wan"))
    assert "wan" in gateway.command("reload", check=False).stderr  # not a TUN device: refused as a whole
    assert [each["name"] for each in gateway.status()["interfaces"]] == [DEVICE, "ipsec6", "ipsec2"]
    gateway.config.write_text(text)
    gateway.command("reload")
    links = space.run("ip", "link", "show").stdout
    assert "ipsec2" not in links
    assert "mtu 1400" in space.run("ip", "link", "show", DEVICE).stdout
    assert world.answers() == 3


def test_a_device_that_somebody_removes_is_made_again(world):
    space = world.one.gateway
    with world.wire() as wire:
        space.run("ip", "link", "del", DEVICE)
        wait_for(lambda: f"{DEVICE}:" in space.run("ip", "link", "show", "up").stdout, "the device", 10)
        world.routes()
        wait_for(lambda: world.answers(1, wait=1) == 1, "the workers", 10)
        assert world.answers() == 3
        wire.settle()
    assert other_than_esp(wire.frames()) == []


def test_dead_workers_and_dead_daemons_let_nothing_pass_and_come_back(world):
    """The daemon that comes back has an interface less, and no offloads."""
    gateway, space = world.gateways[0], world.one.gateway
    text = gateway.config.read_text()
    gateway.config.write_text(text + world.tunnel.settings(world.one, "ipsec2").replace("reqid = 100", "reqid = 300"))
    gateway.command("reload")
    with world.wire() as wire:
        victims = gateway.workers()
        for pid in victims:
            kill_process(pid)
        wait_for(
            lambda: all(each["up"] and each["pid"] not in victims for each in gateway.status()["workers"]),
            "new workers", 10,
        )  # fmt: skip
        wait_for(lambda: world.answers(1, wait=1) == 1, "the tunnel", 10)
        gateway.kill()
        assert world.answers(wait=0.3) == 0
        assert tcp_fails(world)
        assert "ipsec2" in space.run("ip", "link", "show").stdout
        gateway.config.write_text(f"{text}[offload]\ngso = false\ncoalesce = false\nudp_segment = false\n")
        gateway.start()
        assert "ipsec2" not in space.run("ip", "link", "show").stdout
        assert world.answers() == 3  # device and routes were there all the time
        for version in (4, 6):
            assert tcp(world.one.host, world.two.host, world.two.host_address(version), 1_000_000).digest_matches
        assert gateway.metric("ipsecq_events_total", event="super_packets") == 0
        gateway.stop()
        assert world.answers(wait=0.3) == 0
        wire.settle()
    assert other_than_esp(wire.frames()) == []
    gateway.config.write_text(text.replace("[daemon]", '[daemon]\non_stop = "remove"'))
    gateway.start()
    assert world.answers() == 3
    gateway.stop()
    assert DEVICE not in space.run("ip", "link", "show").stdout


def tcp_fails(world):
    with world.one.host.socket(2, 1) as probe:
        probe.settimeout(0.3)
        return probe.connect_ex((world.two.host4, 5999)) != 0
