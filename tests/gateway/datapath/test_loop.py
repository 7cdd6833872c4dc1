"""The worker's loop against a real kernel: fates become verdicts, originals never leave, conntrack knows the flow.

The engine in these tests puts a packet behind an IP header of protocol 50 and takes it off again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest
from datapath_io import DONE, QUEUE, STOLEN, inet, received

from ipsecq.counters import COUNTERS_WORDS, HISTOGRAM_BASE, HISTOGRAM_BOUNDS, Counter, Fate
from ipsecq.datapath import enc0 as enc
from ipsecq.datapath.hold import Holder
from ipsecq.datapath.loop import WorkerLoop
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.queue import Queue
from ipsecq.engine.emit import Acquire, PathMtuLearned
from ipsecq.lab import topology, traffic
from ipsecq.lab.netns import wait_for
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.segments import split

pytestmark = pytest.mark.root


class Wrap:
    """Outbound: the packet behind an outer header.  Attributes say what to do instead."""

    def __init__(self, src: str, dst: str) -> None:
        self.src, self.dst = inet(src), inet(dst)
        self.fate = int(Fate.DONE)
        self.hold = Acquire(50, 2, self.src, self.dst, 0, 1)
        self.raise_on = b""
        self.long = 0
        self.events = []
        self.supers = []

    def process(self, packet, now, emit, mark=0):
        if self.raise_on and self.raise_on in bytes(packet):
            raise RuntimeError("bug")
        emit.events += self.events
        if self.fate == Fate.HOLD:
            emit.held = self.hold
        if self.fate != Fate.DONE:
            return self.fate
        body = b"\0\0\1\0\0\0\0\1" + bytes(packet) + bytes(self.long)
        make = ipv4.header if len(self.dst) == 4 else ipv6.header
        emit.wire.append(make(self.src, self.dst, 50, len(body)) + body)
        return Fate.DONE

    def process_run(self, packets, unfinished, now, emit, mark=0):
        return 0

    def process_super(self, packet, size, now, emit, mark=0):
        self.supers.append((len(packet), size))
        for segment in split(packet, size):
            self.process(segment, now, emit)
        return Fate.DONE


class Unwrap:
    def __init__(self) -> None:
        self.pass_all = False

    def process_run(self, packets, now, emit):
        return 0

    def process_super(self, packet, now, emit):
        return False

    def process(self, packet, now, emit):
        if self.pass_all:
            return Fate.PASS
        if (packet[0] >> 4 == 4 and packet[9] != 50) or (packet[0] >> 4 == 6 and packet[6] != 50):
            return Counter.IN_POLVIO
        emit.inner.append(bytes(packet[28 if packet[0] >> 4 == 4 else 48 :]))
        return Fate.DONE


class Gateway:
    """A WorkerLoop in a thread of a gateway's namespace."""

    def __init__(self, site, engine_out, engine_in=None, **options) -> None:
        space = site.gateway
        self.engine_out, self.engine_in = engine_out, engine_in or Unwrap()
        self.counters = memoryview(bytearray(8 * COUNTERS_WORDS)).cast("Q")
        self.wake, self.control = socket.socketpair()
        self.jobs, self.events = [], []
        gso, plain = options.pop("gso", False), options.pop("plain", False)
        space.nft(f"""
            table netdev ipsecq {{
                chain wan {{
                    type filter hook egress device "wan" priority 0;
                    meta mark & 0x03000000 == {STOLEN:#x} counter drop
                }}
            }}""")
        started = threading.Event()

        def body():
            enc.create()
            with contextlib.ExitStack() as stack:
                queue = stack.enter_context(Queue(QUEUE, gso=gso))
                device = stack.enter_context(enc.Enc0())
                options["plain_queue"] = stack.enter_context(Queue(QUEUE + 1)) if plain else None
                output = RawOutput(DONE)
                self.queue, self.output, self.device = queue, output, device
                self.loop = WorkerLoop(
                    queue, output, device, self.engine_out, self.engine_in, self.counters,
                    mark_stolen=STOLEN, path_mtu=PathMtu(mark=DONE), control_fd=self.control.fileno(),
                    on_control=self._on_control, on_events=self.events.extend, **options,
                )  # fmt: skip
                started.set()
                self.loop.run()
                output.close()

        self.thread = threading.Thread(target=space.call, args=(body,))
        self.thread.start()
        site.gateway.lab.on_close(self.close)
        assert started.wait(5)
        far = 3 - site.number
        mark = ("-m", "mark", "!", "--mark", f"{DONE:#x}/0x3000000")
        for program, lan in (("iptables-nft", f"10.{far}.0.0/24"), ("ip6tables-nft", f"fd00:{far}::/64")):
            queue = ("-j", "NFQUEUE", "--queue-num", str(QUEUE))
            space.run(program, "-t", "mangle", "-A", "POSTROUTING", "-o", "wan", "-d", lan, *mark, *queue)
            space.run(program, "-t", "raw", "-A", "PREROUTING", "-i", "wan", "-p", "50", *queue)

    def _on_control(self):
        self.control.recv(1)
        self.jobs.pop(0)()

    def run(self, job):
        """Run a function in the loop's thread and return its result."""
        result, ready = [], threading.Event()

        def wrapped():
            result.append(job())
            ready.set()

        self.jobs.append(wrapped)
        self.wake.send(b"x")
        assert ready.wait(5)
        return result[0]

    def close(self):
        if self.thread.is_alive():
            self.loop.stop()
            self.thread.join(5)


@pytest.fixture
def network(lab):
    return topology.build(lab)


@pytest.fixture
def tunnel(network):
    """Both gateways run, each with an operator's stateful firewall."""
    one, two = network.one, network.two
    for site in (one, two):
        topology.firewall(site)
    return network, Gateway(one, Wrap(one.wan4, two.wan4)), Gateway(two, Wrap(two.wan4, one.wan4))


def test_tcp_and_ping_of_both_families_cross_two_loops_and_a_stateful_firewall(tunnel):
    network, one, two = tunnel
    a, b = network.one, network.two
    for version in (4, 6):
        a.host.run("ping", "-c3", "-i0.2", "-W2", b.host_address(version))
        b.host.run("ping", "-c3", "-i0.2", "-W2", a.host_address(version))
    # The wrapping engine knows no MTU: leave room for 28 octets.
    for site in (a, b):
        site.host.link_mtu("eth0", 1400)
    assert traffic.tcp(a.host, b.host, b.host4, 4 << 20).digest_matches
    entry = a.gateway.run("conntrack", "-L", "-p", "tcp", check=False).stdout
    assert "ASSURED" in entry
    assert f"src={a.host4} dst={b.host4}" in entry
    for side in (one, two):
        counters = side.counters
        assert counters[Counter.SEND_FAILED] == counters[Counter.INJECT_FAILED] == 0
        packets = sum(counters[HISTOGRAM_BASE : HISTOGRAM_BASE + len(HISTOGRAM_BOUNDS) + 1])
        assert packets > 2000
        assert 0 < counters[Counter.BATCHES] <= packets
        assert counters[Counter.BUSY_NS] > 0
    assert two.counters[Counter.COALESCED] > 0
    assert two.device.errors == {}


def test_originals_never_leave_in_clear(tunnel):
    network, _, _ = tunnel
    a, b = network.one, network.two
    tap = b.gateway.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    tap.bind(("wan", 3))
    tap.settimeout(0.3)
    a.host.run("ping", "-c3", "-i0.2", "-W2", b.host4)
    protocols = {frame[23] for frame in received(tap) if frame[12:14] == b"\x08\x00"}
    assert protocols == {50}


def test_fates_become_verdicts(network):
    a, b = network.one, network.two
    engine = Wrap(a.wan4, b.wan4)
    gateway = Gateway(a, engine)
    b.gateway.nft("""
        table inet t {
            counter seen { }
            chain input { type filter hook prerouting priority -300; ip protocol udp counter name seen; }
        }""")
    receiver = b.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((b.host4, 4000))
    receiver.settimeout(0.4)
    sender = a.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((b.host4, 4000))
    a.gateway.run("ip", "route", "replace", b.lan4, "via", b.wan4)
    engine.fate = int(Fate.PASS)
    sender.send(b"pass")
    assert received(receiver, 1) == [b"pass"]
    for fate in (Counter.OUT_NOSA, Fate.ABSORBED, Fate.HOLD):
        engine.fate = int(fate)
        sender.send(b"no")
        assert received(receiver) == []
    assert "packets 1 " in b.gateway.run("nft", "list", "counter", "inet", "t", "seen").stdout
    assert gateway.counters[Counter.OUT_HELD_OVERFLOW] == 0


def test_held_packets_leave_when_the_sa_comes_and_expire_when_it_does_not(network):
    a, b = network.one, network.two
    engine = Wrap(a.wan4, b.wan4)
    engine.fate = int(Fate.HOLD)
    now = [time.time()]
    first = Gateway(a, engine, clock=lambda: now[0], holder=Holder(max_packets_per_key=2, timeout=30.0))
    Gateway(b, Wrap(b.wan4, a.wan4))
    receiver = b.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((b.host4, 4000))
    receiver.settimeout(0.5)
    sender = a.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((b.host4, 4000))
    for n in range(3):
        sender.send(b"held %d" % n)
    wait_for(lambda: first.counters[Counter.OUT_HELD_OVERFLOW] == 1, "the overflow")
    assert first.run(first.loop.retry_held) == 0
    engine.fate = int(Fate.DONE)
    assert first.run(first.loop.retry_held) == 2
    assert received(receiver, 2) == [b"held 1", b"held 2"]
    engine.fate = int(Fate.HOLD)
    sender.send(b"too late")
    wait_for(lambda: first.loop._holder.waiting == 1, "the packet held")
    now[0] += 31
    wait_for(lambda: first.counters[Counter.OUT_NOSA] == 1, "the expiry")
    engine.fate = int(Fate.DONE)
    assert first.run(first.loop.retry_held) == 0


def test_an_exception_costs_its_packet_only(network, caplog):
    a, b = network.one, network.two
    engine = Wrap(a.wan4, b.wan4)
    engine.raise_on = b"poison"
    first = Gateway(a, engine)
    Gateway(b, Wrap(b.wan4, a.wan4))
    receiver = b.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((b.host4, 4000))
    receiver.settimeout(0.5)
    sender = a.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((b.host4, 4000))
    for n in range(30):
        sender.send(b"poison" if n % 3 == 0 else b"%d" % n)
    assert [int(x) for x in received(receiver, 20)] == [n for n in range(30) if n % 3]
    assert first.counters[Counter.OUT_INVAL] == 10
    assert len([r for r in caplog.records if "made the engine fail" in r.message]) == 1


def test_a_datagram_longer_than_the_device_is_sent_in_fragments(network):
    a, b = network.one, network.two
    engine = Wrap(a.wan4, b.wan4)
    engine.long = 600
    first = Gateway(a, engine)
    Gateway(b, Wrap(b.wan4, a.wan4))
    # The far side's queue sees whole datagrams, as our own ruleset arranges it.
    b.gateway.nft("table inet t { chain c { type filter hook prerouting priority -500; ct state new counter; }; }")
    receiver = b.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((b.host4, 4000))
    receiver.settimeout(0.5)
    sender = a.host.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect((b.host4, 4000))
    sender.send(b"L" * 1200)
    assert received(receiver, 1) == [b"L" * 1200]
    assert first.counters[Counter.OUT_FRAGMENTED] == 1
    assert first.counters[Counter.SEND_FAILED] == 0


def test_learned_path_mtus_reach_the_cache_and_the_callback(network):
    a, b = network.one, network.two
    engine = Wrap(a.wan4, b.wan4)
    learned = PathMtuLearned(inet(b.wan4), 1000)
    engine.events = [learned]
    first = Gateway(a, engine)
    a.host.run("ping", "-c1", "-W1", b.host4, check=False)
    wait_for(lambda: first.events == [learned], "the event")
    assert first.run(lambda: first.loop._path_mtu.mtu_of(inet(b.wan4))) == 1000


def test_the_heart_beats_without_traffic(network):
    gateway = Gateway(network.one, Wrap("192.0.2.1", "192.0.2.2"))
    before = gateway.counters[Counter.HEARTBEAT]
    wait_for(lambda: gateway.counters[Counter.HEARTBEAT] - before >= 2, "two beats", 4.5)


def test_inbound_pass_is_accepted_as_it_is(network):
    a, b = network.one, network.two
    inbound = Unwrap()
    inbound.pass_all = True
    Gateway(b, Wrap(b.wan4, a.wan4), inbound)
    raw = b.gateway.socket(socket.AF_INET, socket.SOCK_RAW, 50)
    raw.settimeout(0.5)
    output = a.gateway.call(lambda: RawOutput(DONE))
    assert output.send([ipv4.header(inet(a.wan4), inet(b.wan4), 50, 8) + b"8 octets"]) == 1
    assert [data[20:] for data in received(raw, 1)] == [b"8 octets"]
    inbound.pass_all = False
    output.close()


def test_super_packets_are_dropped_and_counted_where_nobody_can_cut_them(network):
    a, b = network.one, network.two
    one = Gateway(a, Wrap(a.wan4, b.wan4), gso=True)
    Gateway(b, Wrap(b.wan4, a.wan4))
    if not one.queue.gso:
        pytest.skip("this kernel's queues have no GSO")
    for site in (a, b):
        site.host.link_mtu("eth0", 1400)
    with pytest.raises(Exception, match=r"arriv|timed out|no end|waited|stall"):
        traffic.tcp(a.host, b.host, b.host4, 1 << 20, timeout=3)
    # TCP goes on trying: the loop's own thread reads both between two batches.
    overload, supers = one.run(lambda: (one.counters[Counter.OVERLOAD], one.counters[Counter.SUPER_PACKETS]))
    assert overload == supers > 0
    assert one.engine_out.supers == []


def test_super_packets_are_cut_at_the_size_that_the_kernel_cut_the_first_one_at(network):
    a, b = network.one, network.two
    one = Gateway(a, Wrap(a.wan4, b.wan4), gso=True, plain=True)
    Gateway(b, Wrap(b.wan4, a.wan4))
    if not one.queue.gso:
        pytest.skip("this kernel's queues have no GSO")
    for site in (a, b):
        site.host.link_mtu("eth0", 1400)
    assert traffic.tcp(a.host, b.host, b.host4, 16 << 20, timeout=20).digest_matches
    # 1400 less the headers of IP and TCP, and the time stamps' twelve octets.
    assert {size for _, size in one.engine_out.supers} == {1348}
    assert max(length for length, _ in one.engine_out.supers) > 1400
    # The first one, and others now and then, went to the kernel.
    assert 0 < len(one.engine_out.supers) < one.counters[Counter.SUPER_PACKETS]
    assert one.counters[Counter.OVERLOAD] == one.counters[Counter.SEND_FAILED] == 0
