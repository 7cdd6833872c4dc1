"""What fuzzing has found in the engine, as packets that people can read."""

from __future__ import annotations

from dataclasses import replace

from engine_peers import address, make_peer, policy, udp

from ipsecq.counters import Fate
from ipsecq.numbers import Mode, Protocol
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key


def test_an_uncompressed_packet_of_an_ipcomp_tunnel_inside_an_esp_tunnel_arrives_without_its_middle_header() -> None:
    a, b = address("192.0.2.1"), address("192.0.2.2")
    a6, b6 = address("2001:db8::1"), address("2001:db8::2")
    esp = SecurityAssociation(
        Protocol.ESP, 0x1001, a, b, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=Key(bytes(range(20)))
    )
    ipcomp = SecurityAssociation(Protocol.IPCOMP, 0x1002, a6, b6, Mode.TUNNEL, compression="deflate")
    text = "ipsec ipcomp/tunnel/2001:db8::1-2001:db8::2/use esp/tunnel/192.0.2.1-192.0.2.2/require"
    left = make_peer([esp, ipcomp], [policy("out", "10.1.0.0/24", "10.2.0.0/24", text)])
    right = make_peer([replace(esp), replace(ipcomp)], [policy("in", "10.1.0.0/24", "10.2.0.0/24", text)])
    for size in (10, 1000):  # too short for compression, and long enough
        packet = udp("10.1.0.2", "10.2.0.2", bytes(size))
        fate, wire = left.send(packet)
        assert (fate, len(wire)) == (Fate.DONE, 1)
        assert right.receive(wire[0]) == (Fate.DONE, [packet])
