"""An attacker on the wire: what it sends is dropped, counted under the right reason, and changes nothing."""

import socket
import struct

import pytest

from ipsecq.lab.capture import Capture, inject
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


def esp_towards(world, version):
    """A fresh ESP frame that gateway 1 has already taken, as the router put it on the link."""
    one, two = world.network.sites
    with Capture(world.network.router, "left") as wire:
        assert ping(one.host, two.host_address(version), count=1) == 1
        wire.settle()
    return next(frame for frame in wire.frames() if frame.esp and frame.dst == one.wan(version))


def offset_of_esp(frame):
    return len(frame.data) - len(frame.payload)


def drops(world, reason):
    return world.one.metric("ipsecq_drops_total", reason=reason)


def inject_and_count(world, reason, *frames):
    """Inject, and wait until gateway 1 has counted as many drops of that reason; all other reasons must stay."""
    before = world.one.metric("ipsecq_drops_total")
    counted = drops(world, reason)
    inject(world.network.router, "left", *frames)
    wait_for(lambda: drops(world, reason) == counted + len(frames), f"{len(frames)} drops by {reason}", 5)
    assert world.one.metric("ipsecq_drops_total") == before + len(frames)


@VERSIONS
def test_a_replayed_packet_is_dropped_as_replay(tunnel_net, version):
    frame = esp_towards(tunnel_net, version)
    inject_and_count(tunnel_net, "esp_replay", frame.data, frame.data)


@VERSIONS
def test_a_tampered_packet_is_dropped_as_badauth(tunnel_net, version):
    frame = esp_towards(tunnel_net, version)
    start = offset_of_esp(frame)
    sequence = frame.esp[1] + 5  # ahead of the window, so that only authentication can refuse it
    for place in (start + 8, start + 20, len(frame.data) - 1):
        data = bytearray(frame.data)
        struct.pack_into("!I", data, start + 4, sequence)
        data[place] ^= 1
        inject_and_count(tunnel_net, "esp_badauth", bytes(data))
    one, two = tunnel_net.network.sites
    assert ping(one.host, two.host_address(version)) == 3  # the window has not moved past the honest sender


@VERSIONS
def test_an_unknown_spi_is_dropped_as_notdb(tunnel_net, version):
    frame = esp_towards(tunnel_net, version)
    data = bytearray(frame.data)
    struct.pack_into("!I", data, offset_of_esp(frame), 0xDEAD)
    inject_and_count(tunnel_net, "esp_notdb", bytes(data))


@VERSIONS
def test_a_truncated_packet_is_dropped_and_counted(tunnel_net, version):
    frame = esp_towards(tunnel_net, version)
    start = offset_of_esp(frame)
    data = bytearray(frame.data[: start + 12])
    if version == 4:
        struct.pack_into("!H", data, 16, len(data) - 14)
        data[24:26] = b"\0\0"
        data[24:26] = checksum(data[14:34])
    else:
        struct.pack_into("!H", data, 18, len(data) - 54)
    before = tunnel_net.one.metric("ipsecq_drops_total")
    inject(tunnel_net.network.router, "left", bytes(data))
    wait_for(lambda: tunnel_net.one.metric("ipsecq_drops_total") == before + 1, "one drop", 5)


@VERSIONS
def test_clear_packets_for_the_protected_lan_do_not_enter(tunnel_net, version):
    """What policy wants protected is refused when it comes in clear, whatever its source claims."""
    one, two = tunnel_net.network.sites
    gateway_mac = one.gateway.run("cat", "/sys/class/net/wan/address").stdout.strip().replace(":", "")
    ethernet = bytes.fromhex(gateway_mac) + bytes(6) + (b"\x08\x00" if version == 4 else b"\x86\xdd")
    udp = struct.pack("!HHHH", 1234, 5999, 12, 0) + b"evil"
    if version == 4:
        header = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 32, 1, 0, 64, 17, 0, socket.inet_aton(two.host4), socket.inet_aton(one.host4)
        )
        packet = header[:10] + checksum(header) + header[12:] + udp
    else:
        pton = socket.inet_pton
        packet = struct.pack("!IHBB", 0x60000000, 12, 17, 64)
        packet += pton(socket.AF_INET6, two.host6) + pton(socket.AF_INET6, one.host6) + udp
    with Capture(one.host, "eth0") as inside:
        inject(tunnel_net.network.router, "left", ethernet + packet)
        assert ping(two.host, one.host_address(version)) == 3
        inside.settle()
    assert not inside.contains(b"evil")
    assert [frame for frame in inside.frames() if frame.protocol in (1, 58)]


def checksum(header):
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
