"""Raw sockets and path MTU against a real kernel: what leaves, in which order, and what is too long."""

from __future__ import annotations

import errno
import os
import socket

import pytest
from datapath_io import DONE, inet, received

from ipsecq.datapath.mtu import PathMtu
from ipsecq.datapath.output import RawOutput
from ipsecq.packet import ipv4, ipv6

pytestmark = pytest.mark.root


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
