"""NFQUEUE against a real kernel: batches, verdicts, marks, copies, and what happens when one is full."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading

import pytest
from datapath_io import QUEUE, STOLEN, divert, read_some, received, udp_pair

from ipsecq.datapath.nfqueue import NF_ACCEPT, NF_DROP, NFQA_SKB_CSUMNOTREADY, NFQA_SKB_GSO
from ipsecq.datapath.queue import Queue
from ipsecq.errors import NetfilterError
from ipsecq.lab import traffic
from ipsecq.packet.checksum import verify_transport

pytestmark = pytest.mark.root


def accept_all(queue, packets):
    for packet in packets:
        queue.add_verdict(packet[0], NF_ACCEPT)
    queue.flush()


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


def test_a_single_verdict_leaves_its_neighbours_alone(pair):
    sender, receiver = udp_pair(pair)
    divert(pair[0], "POSTROUTING", "-p", "udp")
    with pair[0].call(lambda: Queue(QUEUE)) as queue:
        for n in range(3):
            sender.send(b"payload %d" % n)
        packets = read_some(queue, 3)
        queue.send_verdict(packets[1][0], NF_ACCEPT)
        assert received(receiver, 1) == [b"payload 1"]
        assert queue.stats().waiting == 2
        queue.add_verdict(packets[0][0], NF_DROP)
        accept_all(queue, packets[2:])
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
        accept_all(queue, packets)
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
        accept_all(queue, packets)
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
        accept_all(queue, packets)
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
