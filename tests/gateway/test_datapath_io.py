"""The I/O around the engine against a real kernel: NFQUEUE, raw sockets, path MTU, enc0 and the worker's loop.

The engine in these tests puts a packet behind an IP header of protocol 50 and takes it off again; what is tested is
what the datapath promises: fates become verdicts, originals never leave, conntrack knows the flow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
import threading
import time

import pytest

from ipsecq.counters import COUNTERS_WORDS, HISTOGRAM_BASE, HISTOGRAM_BOUNDS, Counter, Fate
from ipsecq.datapath import enc0 as enc
from ipsecq.datapath.hold import Holder
from ipsecq.datapath.loop import WorkerLoop
from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.nfnetlink import NF_ACCEPT, NF_DROP, NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO
from ipsecq.datapath.output import RawOutput
from ipsecq.datapath.queue import Queue
from ipsecq.engine.emit import Acquire, PathMtuLearned
from ipsecq.errors import DaemonError, NetfilterError
from ipsecq.lab import topology, traffic
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.checksum import complete, ones_complement, verify_transport
from ipsecq.packet.segments import split

pytestmark = pytest.mark.root

DONE, STOLEN = 0x01000000, 0x02000000
QUEUE = 77


def inet(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


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
        near.run("ping", "-n", "-c", "1", "-W", "3", address)
    return near, far


def divert(space, chain: str, *match: str, table: str = "mangle", number: int = QUEUE) -> None:
    for program in ("iptables-nft", "ip6tables-nft"):
        space.run(program, "-t", table, "-A", chain, *match, "-j", "NFQUEUE", "--queue-num", str(number))


def read_some(queue: Queue, count: int, timeout: float = 5.0) -> list[tuple[int, int, int, int, bytes]]:
    """Packets as copies, whatever batches they come in."""
    packets: list[tuple[int, int, int, int, bytes]] = []
    deadline = time.monotonic() + timeout
    while len(packets) < count and time.monotonic() < deadline:
        if select.select([queue.fd], [], [], 0.1)[0]:
            packets += [(*packet[:4], bytes(packet[4])) for packet in queue.read()]
    return packets


def udp_pair(pair, port: int = 4000):
    near, far = pair
    receiver = far.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("10.9.0.2", port))
    receiver.settimeout(0.3)
    sender = near.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect(("10.9.0.2", port))
    return sender, receiver


def received(receiver: socket.socket, count: int = 0) -> list[bytes]:
    """``count`` packets, however late, and whatever else comes within the receiver's own timeout."""
    data: list[bytes] = []
    quiet = receiver.gettimeout()
    with contextlib.suppress(TimeoutError):
        while True:
            receiver.settimeout(5.0 if len(data) < count else quiet)
            data.append(receiver.recv(65536))
    receiver.settimeout(quiet)
    return data


# -- queue ---------------------------------------------------------------------------------------------------


def test_a_batch_is_read_whole_and_every_run_of_verdicts_meets_its_own_packets(pair):
    sender, receiver = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    with pair[0].call(lambda: Queue(QUEUE)) as queue:
        for n in range(40):
            sender.send(b"%d" % n)
        packets = read_some(queue, 40)
        assert [int(p[4][28:]) for p in packets] == list(range(40))
        assert {p[1] for p in packets} == {4}
        assert all(verify_transport(p[4]) for p in packets)
        for n, packet in enumerate(packets):
            queue.add_verdict(packet[0], NF_DROP if n in {0, 7, 8, 20, 39} else NF_ACCEPT)
        queue.flush()
        assert [int(data) for data in received(receiver, 35)] == [n for n in range(40) if n not in {0, 7, 8, 20, 39}]
        assert queue.errors == 0
        assert queue.stats().waiting == 0
        assert queue.stats().sequence == 40


def test_marks_are_read_and_set(pair):
    near, _ = pair
    sender, receiver = udp_pair(pair)
    sender.setsockopt(socket.SOL_SOCKET, 36, 0x55)
    divert(near, "OUTPUT", "-p", "udp")
    near.run("iptables-nft", "-t", "mangle", "-A", "POSTROUTING", "-m", "mark", "--mark", "0x2000055", "-j", "DROP")
    with near.call(lambda: Queue(QUEUE)) as queue:
        sender.send(b"stolen")
        sender.send(b"kept")
        packets = read_some(queue, 2)
        assert [(p[1], p[2]) for p in packets] == [(3, 0x55), (3, 0x55)]
        queue.add_verdict(packets[0][0], NF_ACCEPT, 0x55 | STOLEN)
        queue.add_verdict(packets[1][0], NF_ACCEPT)
        queue.flush()
        assert received(receiver, 1) == [b"kept"]


def test_a_single_verdict_replaces_the_payload_and_leaves_its_neighbours_alone(pair):
    sender, receiver = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    with pair[0].call(lambda: Queue(QUEUE)) as queue:
        for n in range(3):
            sender.send(b"payload %d" % n)
        packets = read_some(queue, 3)
        changed = bytearray(packets[1][4])
        changed[28:] = b"another"[:7] + b"!!"
        changed[26:28] = b"\0\0"
        queue.send_verdict(packets[1][0], NF_ACCEPT, payload=bytes(changed))
        assert received(receiver, 1) == [b"another!!"]
        queue.drop_batch(packets[0][0])
        queue.accept_batch(packets[2][0])
        assert received(receiver, 1) == [b"payload 2"]


def test_packets_of_64k_come_whole(pair):
    near, far = pair
    near.link_mtu("eth0", 65535)
    far.link_mtu("eth0", 65535)
    sender, receiver = udp_pair(pair)
    divert(near, "POSTROUTING", "-p", "udp")
    with near.call(lambda: Queue(QUEUE)) as queue:
        data = os.urandom(65000)
        sender.send(data)
        packets = read_some(queue, 1)
        assert packets[0][4][28:] == data
        queue.accept_batch(packets[0][0])
        assert received(receiver, 1) == [data]


def test_a_packet_beyond_the_copy_range_is_dropped_never_used_cut_off(pair):
    sender, receiver = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    with pair[0].call(lambda: Queue(QUEUE, copy_range=500)) as queue:
        sender.send(b"small")
        sender.send(bytes(900))
        sender.send(b"also small")
        packets = read_some(queue, 2)
        assert [p[4][28:] for p in packets] == [b"small", b"also small"]
        assert queue.truncated == 1
        queue.accept_batch(packets[-1][0])
        assert received(receiver, 2) == [b"small", b"also small"]


def test_a_queue_serves_although_the_kernels_counts_may_not_be_read(lab):
    """The table in /proc is for group root; a daemon with a user of its own may lack that group."""
    code = (
        "import os\n"
        "from ipsecq.daemon import privileges\n"
        "from ipsecq.datapath.queue import Queue\n"
        "privileges._prctl(8, 1)\n"  # PR_SET_KEEPCAPS
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "privileges.keep_capabilities([privileges.CAP_NET_ADMIN])\n"
        "queue = Queue(7)\n"
        "print(queue.blind, *queue.stats(), len(queue.read()), sep='|')\n"
        "queue.close()\n"
    )
    done = lab.namespace("near").run(sys.executable, "-c", code)
    assert done.stdout == "/proc/thread-self/net/netfilter/nfnetlink_queue: Permission denied|0|0|0|0|0\n"


def test_a_full_queue_drops_and_stats_say_so(pair):
    sender, _ = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    with pair[0].call(lambda: Queue(QUEUE, max_length=8)) as queue:
        for _ in range(20):
            with contextlib.suppress(OSError):  # EPERM: the sender's own packet was dropped
                sender.send(b"x")
        stats = queue.stats()
        assert (stats.waiting, stats.dropped) == (8, 12)


def test_a_full_socket_buffer_loses_packets_and_stops_nothing(pair):
    sender, receiver = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    with pair[0].call(lambda: Queue(QUEUE, max_length=4000, receive_buffer=4096)) as queue:
        for n in range(100):
            with contextlib.suppress(OSError):
                sender.send(b"%d" % n + bytes(1000))
        assert queue.stats().user_dropped > 0
        packets = read_some(queue, 1) + read_some(queue, 100, timeout=0.5)
        assert 0 < len(packets) < 100
        queue.accept_batch(packets[-1][0])
        assert len(received(receiver, len(packets))) == len(packets)


def test_a_queue_has_one_owner(pair):
    with pair[0].call(lambda: Queue(QUEUE)), pytest.raises(NetfilterError, match="queue 77: cannot bind"):
        pair[0].call(lambda: Queue(QUEUE))
    pair[0].call(lambda: Queue(QUEUE)).close()


def test_without_a_listener_packets_are_dropped(pair):
    sender, receiver = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    pair[0].call(lambda: Queue(QUEUE)).close()
    with contextlib.suppress(OSError):
        sender.send(b"leak?")
    assert received(receiver) == []


@pytest.mark.parametrize("gso", [False, True])
def test_tcp_super_packets_come_whole_with_gso_and_as_finished_segments_without(pair, gso):
    near, far = pair
    divert(near, "POSTROUTING", "-p", "tcp", "--dport", "5001")
    sizes, infos, bad = [], set(), []
    with near.call(lambda: Queue(QUEUE, gso=gso)) as queue:
        assert queue.gso == gso
        stop = threading.Event()

        def accept():
            while not stop.is_set():
                if not select.select([queue.fd], [], [], 0.05)[0]:
                    continue
                for cookie, _, _, info, packet in queue.read():
                    sizes.append(len(packet))
                    infos.add(info & (NFQA_SKB_GSO | NFQA_SKB_CSUMNOTREADY))
                    if not info & NFQA_SKB_CSUMNOTREADY and not verify_transport(bytes(packet)):
                        bad.append(bytes(packet))
                    queue.add_verdict(cookie, NF_ACCEPT)
                queue.flush()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            assert traffic.tcp(near, far, "10.9.0.2", 4 << 20, timeout=10).digest_matches
        finally:
            stop.set()
            thread.join()
    assert not bad
    if gso:
        assert max(sizes) > 1500
        assert NFQA_SKB_GSO | NFQA_SKB_CSUMNOTREADY in infos
    else:
        assert max(sizes) <= 1500
        assert infos == {0}


def test_a_requeued_super_packet_comes_back_from_the_plain_queue_in_segments(pair):
    near, far = pair
    divert(near, "POSTROUTING", "-p", "tcp", "--dport", "5001")
    whole, cut = [], []
    stop = threading.Event()
    with near.call(lambda: Queue(QUEUE, gso=True)) as queue, near.call(lambda: Queue(QUEUE + 1)) as plain:

        def serve():
            while not stop.is_set():
                select.select([queue.fd, plain.fd], [], [], 0.05)
                for cookie, _, _, info, packet in queue.read():
                    if info & NFQA_SKB_GSO:
                        whole.append(len(packet))
                        queue.add_requeue(cookie, QUEUE + 1)
                    else:
                        queue.add_verdict(cookie, NF_ACCEPT)
                queue.flush()
                for cookie, _, _, info, packet in plain.read():
                    cut.append((len(packet), info & NFQA_SKB_GSO, verify_transport(bytes(packet))))
                    plain.add_verdict(cookie, NF_ACCEPT)
                plain.flush()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert traffic.tcp(near, far, "10.9.0.2", 4 << 20, timeout=10).digest_matches
        finally:
            stop.set()
            thread.join()
    assert max(whole) > 1500
    assert {entry[1:] for entry in cut} == {(0, True)}
    assert max(entry[0] for entry in cut) <= 1500


# -- output --------------------------------------------------------------------------------------------------


def wire_datagrams(version: int, sizes: list[int]) -> list[bytes]:
    if version == 4:
        return [ipv4.header(inet("10.9.0.1"), inet("10.9.0.2"), 50, n) + os.urandom(n) for n in sizes]
    return [ipv6.header(inet("fd00:9::1"), inet("fd00:9::2"), 50, n) + os.urandom(n) for n in sizes]


@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("version", [4, 6])
def test_datagrams_of_both_families_leave_in_order_and_too_long_ones_come_back(pair, version, count):
    near, far = pair
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    raw = far.socket(family, socket.SOCK_RAW, 50)
    raw.settimeout(0.5)
    raw.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)
    header = 20 if version == 4 else 40
    output = near.call(lambda: RawOutput(DONE))
    datagrams = wire_datagrams(version, [100 + n % 1000 for n in range(count)])
    datagrams[1:1] = wire_datagrams(version, [1501 - header])
    other = wire_datagrams(10 - version, [64])
    assert output.send(datagrams + other) == count + 1
    assert output.too_big == [datagrams[1]]
    got = [data[20:] if version == 4 else data for data in received(raw, count)]
    assert got == [d[header:] for d in datagrams if len(d) <= 1500]
    assert output.send(datagrams[:1]) == 1
    assert output.too_big == []
    output.close()


def test_output_carries_the_mark_and_meets_the_operators_rules(pair):
    near, _ = pair
    near.nft(f"""
        table inet operator {{
            counter seen {{ }}
            chain output {{
                type filter hook output priority 0;
                meta mark & {DONE:#x} == {DONE:#x} ip protocol 50 counter name seen
                ip protocol 50 ip length 120 drop
            }}
        }}""")
    output = near.call(lambda: RawOutput(DONE))
    for count in (2, 40):
        output.errors.clear()
        assert output.send(wire_datagrams(4, [100] + [90] * (count - 1))) == count - 1
        assert output.errors == {errno.EPERM: 1}
    assert "packets 42" in near.run("nft", "list", "counter", "inet", "operator", "seen").stdout
    output.close()


def test_a_missing_route_and_a_link_local_destination_are_counted(lab):
    lonely = lab.namespace("lonely")
    output = lonely.call(lambda: RawOutput(DONE))
    assert output.send(wire_datagrams(4, [10])) == 0
    assert set(output.errors) == {errno.ENETUNREACH}
    output.errors.clear()
    local = ipv6.header(inet("fe80::1"), inet("fe80::2"), 50, 8) + bytes(8)
    assert output.send([local]) == 0
    assert output.send([local] * 20) == 0
    assert output.errors == {errno.EDESTADDRREQ: 21}
    output.close()


def test_a_link_local_destination_leaves_by_the_given_interface(pair):
    near, far = pair

    def addresses(space):
        shown = space.run("ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link").stdout
        return shown.split()[3].split("/")[0]

    here, there = inet(addresses(near)), inet(addresses(far))
    raw = far.socket(socket.AF_INET6, socket.SOCK_RAW, 50)
    raw.settimeout(1.0)
    index = near.call(lambda: socket.if_nametoindex("eth0"))
    output = near.call(lambda: RawOutput(DONE, link_scope=index))
    datagram = ipv6.header(here, there, 50, 8) + b"8 octets"
    assert output.send([datagram]) == 1
    assert output.send([datagram] * 10) == 10
    assert received(raw, 11) == [b"8 octets"] * 11
    output.close()


# -- path MTU ------------------------------------------------------------------------------------------------


def test_the_path_mtu_follows_the_route_within_a_second(pair):
    near, _ = pair

    def check():
        path = PathMtu(mark=DONE)
        path.advance(1.0)
        dst4, dst6 = inet("10.9.0.2"), inet("fd00:9::2")
        assert (path.mtu_of(dst4), path.mtu_of(dst6)) == (1500, 1500)
        assert (path.source_for(dst4), path.source_for(dst6)) == (inet("10.9.0.1"), inet("fd00:9::1"))
        near.link_mtu("eth0", 1300)
        path.advance(1.5)
        assert path.mtu_of(dst4) == 1500  # from the cache
        path.advance(2.1)
        assert (path.mtu_of(dst4), path.mtu_of(dst6)) == (1300, 1300)
        near.link_mtu("eth0", 1400)
        path.invalidate()
        assert path.mtu_of(dst4) == 1400

    near.call(check)


# -- enc0 ----------------------------------------------------------------------------------------------------


def udp4(src: str, dst: str, data: bytes, ttl: int = 64) -> bytes:
    length = 8 + len(data)
    return ipv4.header(inet(src), inet(dst), 17, length, ttl=ttl) + struct.pack(">HHHH", 9, 4000, length, 0) + data


@pytest.mark.parametrize("vnet_hdr", [False, True])
@pytest.mark.parametrize("rp_filter", [0, 2])
def test_an_injected_packet_is_tracked_forwarded_and_passes_loose_rp_filter(pair, vnet_hdr, rp_filter):
    near, far = pair
    receiver = far.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("10.9.0.2", 4000))
    receiver.settimeout(0.5)
    receiver6 = far.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    receiver6.bind(("fd00:9::2", 4000))
    receiver6.settimeout(0.5)
    topology.forward(near)
    topology.default_route(near, "10.9.0.2", "fd00:9::2")
    topology.default_route(far, "10.9.0.1", "fd00:9::1")
    near.sysctl("net.ipv4.conf.all.rp_filter", rp_filter)
    near.nft("""
        table inet operator {
            chain forward {
                type filter hook forward priority 0; policy drop;
                ct state established,related accept
                iifname "enc0" ct state new accept
            }
        }""")
    near.call(lambda: enc.create("enc0", vnet_hdr=vnet_hdr))
    with near.call(lambda: enc.Enc0("enc0", vnet_hdr=vnet_hdr)) as device:
        assert device.write([udp4("10.77.0.5", "10.9.0.2", b"inner")] * 3) == 3
        assert received(receiver, 3) == [b"inner"] * 3
        data = b"inner six"
        head = ipv6.header(inet("fd00:77::5"), inet("fd00:9::2"), 17, 8 + len(data))
        assert device.write([complete(head + struct.pack(">HHHH", 9, 4000, 8 + len(data), 0) + data)]) == 1
        assert received(receiver6, 1) == [data]
        assert "10.77.0.5" in near.run("conntrack", "-L", check=False).stdout
        assert device.write([b"\x75" + bytes(30)]) == 0  # no IP version
        assert sum(device.errors.values()) == 1
        # What the dummy address is for: loose filtering refuses everything from a device without any address.
        near.run("ip", "addr", "flush", "dev", "enc0")
        assert device.write([udp4("10.77.0.5", "10.9.0.2", b"bare")]) == 1
        expected = [b"bare"] if rp_filter == 0 else []
        assert received(receiver, len(expected)) == expected


def test_packets_routed_into_enc0_are_thrown_away(pair):
    near, _ = pair
    near.call(enc.create)
    near.run("ip", "route", "add", "10.66.0.0/24", "dev", "enc0")
    with near.call(enc.Enc0) as device:
        sender = near.socket(socket.AF_INET, socket.SOCK_DGRAM)

        def astray():
            sender.sendto(b"astray", ("10.66.0.1", 9))
            return device.discard()

        wait_for(astray, "the device's carrier")
        for _ in range(5):
            sender.sendto(b"astray", ("10.66.0.1", 9))
        assert device.discard() == 5
        assert device.discard() == 0
        assert device.discarded >= 6
        state = near.run("ip", "-6", "addr", "show", "dev", "enc0").stdout
        assert "fe80" not in state


def test_enc0_is_made_once_serves_many_workers_and_goes_at_the_end(lab):
    space = lab.namespace("gw")
    space.call(enc.create)
    space.call(enc.create)
    workers = [space.call(enc.Enc0) for _ in range(4)]
    for worker in workers:
        worker.close()
    assert "192.0.0.8/32 scope host enc0" in space.run("ip", "addr", "show", "dev", "enc0").stdout
    with pytest.raises(DaemonError, match="lo: cannot attach: the name belongs to another kind of device"):
        space.call(lambda: enc.create("lo"))
    space.call(enc.remove)
    assert "enc0" not in space.run("ip", "link").stdout
    space.call(enc.remove)


def test_coalesced_tcp_enters_as_one_packet_and_leaves_as_valid_segments(pair):
    near, far = pair
    topology.forward(near)
    near.call(enc.create)
    near.sysctl("net.ipv4.conf.all.rp_filter", 0)
    far.run("ethtool", "-K", "eth0", "gro", "off")
    near.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off", "tx", "off")
    raw = far.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    raw.bind(("eth0", 0x0800))
    data = os.urandom(5 * 1000 + 300)
    tcp = bytearray(struct.pack(">HHIIBBHHH", 1234, 5001, 1000, 1, 0x50, 0x18, 512, 0, 0))
    head = ipv4.header(inet("10.77.0.5"), inet("10.9.0.2"), 6, 20 + len(data))
    pseudo = inet("10.77.0.5") + inet("10.9.0.2") + struct.pack(">HH", 6, 20 + len(data))
    struct.pack_into(">H", tcp, 16, ones_complement(pseudo))
    with near.call(enc.Enc0) as device:
        assert traffic.ping(near, "10.9.0.2", count=1) == 1
        assert device.write_coalesced([head + bytes(tcp), data], version=4, offset=20, header=40, size=1000)
        segments = []
        with contextlib.suppress(TimeoutError):
            while True:
                raw.settimeout(5.0 if len(segments) < 6 else 0.5)
                frame = raw.recv(65536)
                if frame[23] == 6 and frame[26:30] == inet("10.77.0.5"):
                    segments.append(frame[14:])
    assert [len(s) for s in segments] == [1040] * 5 + [340]
    assert all(verify_transport(s) for s in segments)
    assert b"".join(s[40:] for s in segments) == data
    assert [s[33] for s in segments] == [0x10] * 5 + [0x18]


def test_written_tcp_segments_enter_together_and_other_packets_stay_alone(pair):
    near, _ = pair
    near.call(enc.create)
    tap = near.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    tap.bind(("enc0", 0x0800))
    tap.settimeout(0.3)
    segments = []
    for n in range(4):
        tcp = struct.pack(">HHIIBBHHH", 1234, 5001, 1000 + n * 500, 1, 0x50, 0x10, 512, 0, 0) + os.urandom(500)
        segments.append(complete(ipv4.header(inet("10.77.0.5"), inet("10.9.0.1"), 6, 520, df=True) + tcp))
    lone = udp4("10.77.0.5", "10.9.0.1", b"alone")
    with near.call(enc.Enc0) as device:
        assert device.write([*segments, lone]) == 5
        assert device.coalesced == 3
        assert sorted(map(len, received(tap, 2))) == [33, 2040]
    with near.call(lambda: enc.Enc0(coalescing=False)) as device:
        assert device.write(segments) == 4
        assert device.coalesced == 0
        assert received(tap, len(segments)) == segments


# -- loop ----------------------------------------------------------------------------------------------------


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
    assert traffic.tcp(a.host, b.host, b.host4, 4 << 20, timeout=10).digest_matches
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

