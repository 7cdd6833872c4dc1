"""New headers and old headers around new payloads, against scapy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.packet import Raw
from scapy.utils import inet_ntoa

from ipsecq.packet import datagram, ipv4, ipv6
from ipsecq.packet.view import PacketView

A4 = st.binary(min_size=4, max_size=4)


@given(A4, A4, st.integers(0, 255), st.integers(0, 65515), st.integers(0, 255), st.integers(0, 255),
       st.integers(0, 65535), st.booleans())  # fmt: skip
def test_an_ipv4_header_is_scapys(src, dst, protocol, size, tos, ttl, identification, df):
    ours = ipv4.header(src, dst, protocol, size, tos=tos, ttl=ttl, identification=identification, df=df)
    scapys = IP(src=inet_ntoa(src), dst=inet_ntoa(dst), proto=protocol, len=size + 20, tos=tos, ttl=ttl,
                id=identification, flags="DF" if df else 0)  # fmt: skip
    assert ours == bytes(scapys)


def test_an_ipv6_header_is_scapys():
    packet = IPv6(src="2001:db8::1", dst="2001:db8::2", tc=0xB9, fl=0xABCDE, hlim=3, nh=50, plen=1234)
    src, dst = bytes(packet)[8:24], bytes(packet)[24:40]
    assert ipv6.header(src, dst, 50, 1234, traffic_class=0xB9, flow_label=0xABCDE, hop_limit=3) == bytes(packet)


@pytest.mark.parametrize("options", [[], [IPOption_Router_Alert()]])
def test_an_ipv4_payload_is_replaced_and_nothing_else(options):
    fields = {"src": "10.0.0.1", "dst": "10.0.0.2", "id": 9, "flags": "DF", "tos": 4, "ttl": 7, "options": options}
    packet = bytes(IP(**fields) / UDP() / Raw(b"clear"))
    view = PacketView()
    assert view.load(packet)
    header = memoryview(packet)[: view.header_length]
    new = datagram.replace_payload(header, 50, [b"SPI.", bytes(1000), b"ICV"], view.header_nexthdr)
    assert new == bytes(IP(**fields, proto=50) / Raw(b"SPI." + bytes(1000) + b"ICV"))


def test_an_ipv6_payload_is_replaced_behind_the_per_hop_headers():
    fields = {"src": "2001:db8::1", "dst": "2001:db8::2", "fl": 5}
    packet = bytes(IPv6(**fields) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP() / Raw(b"clear"))
    view = PacketView()
    assert view.load(packet)
    new = datagram.replace_payload(packet[: view.header_length], 50, [bytes(40)], view.header_nexthdr)
    assert new == bytes(IPv6(**fields) / IPv6ExtHdrHopByHop(nh=50) / Raw(bytes(40)))
    new = datagram.replace_payload(packet[: view.offset], 50, [bytes(40)], view.nexthdr_offset)
    assert new == bytes(IPv6(**fields) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(nh=50) / Raw(bytes(40)))


def test_a_payload_that_cannot_fit_gives_nothing():
    v4, v6 = ipv4.header(bytes(4), bytes(4), 0, 0), ipv6.header(bytes(16), bytes(16), 0, 0)
    assert len(datagram.replace_payload(v4, 50, [bytes(65515)], 9)) == 65535
    assert datagram.replace_payload(v4, 50, [bytes(65516)], 9) == b""
    assert len(datagram.replace_payload(v6, 50, [bytes(65535)], 6)) == 65575
    assert datagram.replace_payload(v6, 50, [bytes(65536)], 6) == b""
