"""What packets can make the datapath remember, and where it stops."""

import struct

from ipsecq.datapath import gso, mtu
from ipsecq.packet import ipv4


def segment(flow, sequence, octets):
    tcp = struct.pack("!HHIIBBHHH", flow & 0xFFFF, 80, sequence, 0, 5 << 4, 0x10, 100, 0, 0)
    return ipv4.header(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 6, 20 + octets) + tcp + bytes(octets)


def test_flows_with_a_segment_size_are_bounded(monkeypatch):
    monkeypatch.setattr(gso, "MAX_FLOWS", 20)
    sizes = gso.SegmentSizes()
    for flow in range(1, 200):
        whole = segment(flow, 1, 2800)
        sizes.divert(whole, gso.flow_of(whole), whole=True)
        sizes.learn(segment(flow, 1, 1400), 1.0)
        sizes.drained()
        assert len(sizes._sizes) <= 20
        assert not sizes._wanted
        assert not sizes.diverted
        assert sizes.size_of(whole, gso.flow_of(whole), 1.0) == 1400


def test_learned_and_looked_up_path_mtus_are_bounded(monkeypatch):
    monkeypatch.setattr(mtu, "_MAX_ENTRIES", 20)
    path = mtu.PathMtu()
    for number in range(200):
        dst = bytes([127, 0, number, 1])
        assert path.learn(dst, 1400, 1.0)
        assert path.mtu_of(dst) == 1400
        assert len(path._learned) <= 20
        assert len(path._cached) <= 20
