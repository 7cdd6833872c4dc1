"""Packet rings: ESP past the queues, the same packets for the ring and for the rule that drops them, and nothing twice."""

import os
import signal
import socket
import threading

import pytest

from ipsecq.datapath import ring as rings
from ipsecq.datapath.queue import queue_table
from ipsecq.datapath.ring import FRAMES, PacketRing, Rings
from ipsecq.lab import topology
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.traffic import ping, tcp
from ipsecq.netfilter.compile import DIRECT_OCTETS, compile_ruleset
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.steering import inbound_queue
from ipsecq.packet import ipv4, ipv6
from ipsecq.sysctl import Sysctl

pytestmark = pytest.mark.root

QUEUES = 6
ENDS = {4: ("192.0.2.1", "192.0.2.2"), 6: ("fd00:9::1", "fd00:9::2")}


def packed(text):
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


class Bench:
    """One end sends raw datagrams, the other has rings, our table, and behind its first chain a count of what is left."""

    def __init__(self, lab):
        self.near, self.far = lab.namespace("near"), lab.namespace("far")
        lab.link(self.near, "eth0", self.far, "eth0", mtu=4000)
        for space, at in ((self.near, 0), (self.far, 1)):
            topology.address(space, "eth0", f"{ENDS[4][at]}/24", f"{ENDS[6][at]}/64")
            space.run("ip", "link", "set", "lo", "up")
        for _, address in ENDS.values():
            self.near.run("ping", "-n", "-c", "1", "-W", "3", address)
        self.opened = self.far.call(lambda: Rings(QUEUES))
        assert not self.opened.problem
        settings = NetfilterSettings(workers=2, lanes=3, direct=True, defragment="none")
        self.far.nft(compile_ruleset([], settings, Sysctl()))
        self.far.nft(
            "table inet count { counter left { }; chain c { type filter hook prerouting priority -440; "
            "meta l4proto 50 counter name left drop; }; }"
        )
        self.mac = bytes.fromhex(self.far.run("cat", "/sys/class/net/eth0/address").stdout.strip().replace(":", ""))
        self.out = self.near.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self.rings = [PacketRing(each._replace(descriptor=os.dup(each.descriptor))) for each in self.opened.sockets]

    def send(self, datagram, mac=b""):
        """A frame to the far end, or to somebody else's MAC address."""
        kind = 0x0800 if datagram[0] >> 4 == 4 else 0x86DD
        self.out.sendto(datagram, ("eth0", kind, 0, 0, mac or self.mac))

    def arrived(self):
        """(queue, datagram) of what is in the rings."""
        found = []
        for described, ring in zip(self.opened.sockets, self.rings, strict=True):
            datagrams = ring.read(FRAMES[described.family])
            if not datagrams:
                ring.find()
                datagrams = ring.read(FRAMES[described.family])
            found += [(described.queue, datagram) for datagram in datagrams]
        return found

    def left(self):
        """Datagrams that the first chain let through, so far."""
        words = self.far.run("nft", "list", "counter", "inet", "count", "left").stdout.split()
        return int(words[words.index("packets") + 1])


@pytest.fixture
def bench():
    with Lab() as lab:
        yield Bench(lab)


def whole(version, size=100, spi=0x1000, protocol=50, dst=None):
    """A datagram of ``size`` octets behind its header."""
    ends = [packed(each) for each in ENDS[version]]
    header = ipv4.header if version == 4 else ipv6.header
    return header(ends[0], packed(dst) if dst else ends[1], protocol, size) + spi.to_bytes(4, "big") + os.urandom(size - 4)


def changed(datagram, at, value, *, right=True):
    """An IPv4 datagram with two octets of its header changed."""
    head = bytearray(datagram[:20])
    head[at : at + 2] = value.to_bytes(2, "big")
    if right:
        ipv4.fix_checksum(head)
    return bytes(head) + datagram[20:]


def test_the_ring_takes_what_the_rule_drops_and_nothing_else(bench):
    """(datagram, in the ring, left for the queue)."""
    cases = [
        (whole(4), 1, 0),
        (whole(6), 1, 0),
        (whole(4, DIRECT_OCTETS - 20), 1, 0),
        (whole(6, DIRECT_OCTETS - 40), 1, 0),
        (whole(4, DIRECT_OCTETS - 19), 0, 1),
        (whole(6, DIRECT_OCTETS - 39), 0, 1),
        (changed(whole(4), 6, 0x4000), 1, 0),  # DF
        (changed(whole(4), 6, 0x2000), 0, 1),  # the first fragment
        (changed(whole(4), 6, 0x0010), 0, 1),  # the last one
        (whole(4, protocol=51), 0, 0),
        (whole(6, protocol=17), 0, 0),
        (whole(4, dst="198.51.100.7"), 1, 1),  # only passes through: the workers leave it alone
        (whole(6, dst="fd00:77::1"), 1, 1),
        (changed(whole(4), 4, 7, right=False), 0, 0),  # a wrong checksum: the kernel drops it, and the reader does
    ]
    before = bench.left()
    for number, (datagram, taken, left) in enumerate(cases):
        bench.send(datagram)
        found = [got for _, got in bench.arrived()]
        after = bench.left()
        assert (found, after - before) == ([datagram] * taken, left), number
        before = after


def test_the_rings_wait_for_the_kernel_together(monkeypatch):
    """It takes some ten milliseconds for each, and the daemon's start waits for all."""
    together = threading.Barrier(2 * QUEUES)
    allocate = rings._allocate

    def meet(*arguments):
        together.wait(60)
        allocate(*arguments)

    monkeypatch.setattr(rings, "_allocate", meet)
    with Lab() as lab:
        opened = lab.namespace("alone").call(lambda: Rings(QUEUES))
        assert not opened.problem
        assert [each.queue for each in opened.sockets] == [*range(QUEUES)] * 2
        opened.close()


def test_frames_to_another_station_are_nobodys(bench):
    before = bench.left()
    bench.send(whole(4), mac=bytes.fromhex("02dead00beef"))
    assert (bench.arrived(), bench.left()) == ([], before)


@pytest.mark.parametrize("version", [4, 6])
def test_an_spi_goes_to_the_ring_of_its_queue(bench, version):
    for spi in (*range(256, 300), 0xFFFFFFFF, 0x80000001):
        bench.send(datagram := whole(version, spi=spi))
        assert bench.arrived() == [(inbound_queue(spi, QUEUES), datagram)]


def test_a_full_ring_loses_the_newest_and_counts_them_and_the_next_reader_finds_the_oldest(bench):
    sent = [whole(4) for _ in range(FRAMES[socket.AF_INET] + 10)]
    for datagram in sent[:700]:
        bench.send(datagram)
    queue = inbound_queue(0x1000, QUEUES)
    (place,) = (place for place, each in enumerate(bench.opened.sockets) if each[:2] == (socket.AF_INET, queue))
    assert bench.rings[place].read(600) == sent[:600]
    described = bench.opened.sockets[place]
    ring = PacketRing(described._replace(descriptor=os.dup(described.descriptor)))  # as a worker that takes over does
    assert ring.read(1) == sent[600:601]
    for datagram in sent[700:]:
        bench.send(datagram)
    assert ring.read(2000) == sent[601:]
    assert ring.lost() == 0
    for datagram in sent:
        bench.send(datagram)
    assert ring.lost() == 10
    assert ring.read(2000) == sent[:-10]


@pytest.mark.parametrize("wanted", [True, False])
def test_esp_comes_by_the_ring_and_not_by_the_queue(make_world, wanted):
    world = make_world(settings=f"[offload]\nring = {str(wanted).lower()}\n")
    one, two = world.network.sites
    for version in (4, 6):
        assert ping(one.host, two.host_address(version)) == 3
        assert tcp(one.host, two.host, two.host_address(version), 4_000_000).digest_matches
    taken = world.two.metric("ipsecq_events_total", event="fast_path")
    queued = sum(stats.sequence for stats in two.gateway.call(queue_table).values())
    assert taken > 5000
    # The answers on their way out come by the queue, and they are few.
    assert (queued < taken / 2) == wanted
    assert world.two.metric("ipsecq_drops_total", reason="esp_replay") == 0
    assert world.two.metric("ipsecq_drops_total", reason="esp_notdb") == 0


def test_what_comes_while_a_worker_is_replaced_waits_in_the_ring(make_world):
    world = make_world()
    one, two = world.network.sites
    assert ping(one.host, two.host4) == 3
    before = world.two.workers()
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    one.host.run("ping", "-n", "-c", "3", "-i", "0.05", "-W", "0.1", two.host4, check=False)
    with two.host.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as listener:
        listener.settimeout(20)
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            assert listener.recv(100)[20] == 8  # echo requests, from the new worker's hands
    wait_for(lambda: all(worker["up"] for worker in world.two.status()["workers"]), "workers that serve", 20)


def test_esp_that_passes_through_is_left_alone(make_world):
    world = make_world()
    one, two = world.network.sites
    one.gateway.run("ip", "route", "add", "203.0.113.0/24", "via", two.wan4)
    two.gateway.run("ip", "route", "add", "203.0.113.0/24", "via", two.host4)
    two.gateway.nft("insert rule inet operator forward ip protocol esp accept")
    before = world.two.metric("ipsecq_drops_total", reason="esp_notdb")
    with two.host.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as seen:
        seen.settimeout(5)
        with one.gateway.socket(socket.AF_INET, socket.SOCK_RAW, 50) as out:
            for _ in range(20):
                out.sendto(bytes(64), ("203.0.113.9", 0))
        for _ in range(20):
            assert seen.recv(2048)[9] == 50
    assert world.two.metric("ipsecq_drops_total", reason="esp_notdb") == before
    assert ping(one.host, two.host4) == 3
