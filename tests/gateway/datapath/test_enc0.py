"""The enc0 device against a real kernel: what is written into it is a packet like any other."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

import pytest
from datapath_io import inet, received

from ipsecq.datapath import enc0 as enc
from ipsecq.datapath import tun
from ipsecq.errors import DaemonError
from ipsecq.lab import topology, traffic
from ipsecq.lab.netns import wait_for
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.checksum import complete, ones_complement, verify_transport

pytestmark = pytest.mark.root


def udp4(src: str, dst: str, data: bytes, ttl: int = 64) -> bytes:
    length = 8 + len(data)
    return ipv4.header(inet(src), inet(dst), 17, length, ttl=ttl) + struct.pack(">HHHH", 9, 4000, length, 0) + data


@pytest.mark.parametrize("rp_filter", [0, 2])
def test_an_injected_packet_is_tracked_forwarded_and_passes_loose_rp_filter(pair, rp_filter):
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
    near.call(lambda: enc.create("enc0"))
    with near.call(lambda: enc.Enc0("enc0")) as device:
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
    space.call(lambda: tun.remove("enc0"))
    assert "enc0" not in space.run("ip", "link").stdout
    space.call(lambda: tun.remove("enc0"))


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
