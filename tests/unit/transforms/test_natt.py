"""UDP encapsulation: what is what on port 4500, and checksums behind a NAT."""

import ipaddress
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.packet.view import PacketView
from ipsecq.transforms import natt
from ipsecq.transforms.natt import Kind

PRIVATE, NAT, HERE = (ipaddress.ip_address(a).packed for a in ("192.168.1.5", "203.0.113.9", "198.51.100.1"))
PRIVATE6, NAT6, HERE6 = (ipaddress.ip_address(a).packed for a in ("fd00::5", "2001:db8::9", "2001:db8:1::1"))


@dataclass
class Ports:
    sport: int = 4500
    dport: int = 61000


@dataclass
class Originals:
    original_src: bytes | None = None
    original_dst: bytes | None = None


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        (b"\xff", Kind.KEEPALIVE),
        (b"\xfe", Kind.INVALID),
        (b"", Kind.INVALID),
        (b"\xff\xff", Kind.INVALID),
        (bytes(4), Kind.INVALID),
        (bytes(4) + b"IKE SA", Kind.IKE),
        (b"\0\0\x01\0" + bytes(4), Kind.ESP),
        (b"\xff" * 8, Kind.ESP),
        (b"\0\0\x01\0" + bytes(3), Kind.INVALID),
    ],
)
def test_keepalive_ike_and_esp_are_told_apart(payload, kind):
    assert natt.classify(payload) is kind
    assert natt.classify(memoryview(payload)) is kind


@given(st.binary(max_size=40))
def test_any_payload_is_something(payload):
    assert natt.classify(payload) in Kind


def udp4(payload, sport=61000, dport=4500, length=None):
    header = struct.pack(">HHHH", sport, dport, 8 + len(payload) if length is None else length, 0)
    return ipv4.header(NAT, HERE, 17, 8 + len(payload)) + header + payload


@pytest.mark.parametrize(
    ("packet", "offset"),
    [
        (udp4(b"\0\0\x01\0" + bytes(40)), 28),
        (udp4(b"\xff"), -1),
        (udp4(bytes(4) + b"IKE SA init"), 0),
        (udp4(b"\0\0\x01\0" + bytes(40), dport=4501), 0),
        (udp4(b"\0\0\x01\0" + bytes(40), length=30), 0),
        (udp4(b"\0\0\x01\0" + bytes(40), length=90), 0),
        (udp4(b""), 0),
    ],
)
def test_esp_offset_of_a_datagram(packet, offset):
    view = PacketView()
    assert view.load(packet)
    assert natt.esp_offset(packet, view) == offset
    padded = packet + bytes(18)  # Ethernet's padding is not part of the datagram
    assert view.load(padded)
    assert natt.esp_offset(padded, view) == offset


def test_esp_offset_on_another_port():
    packet = udp4(b"\0\0\x01\0" + bytes(40), dport=10000)
    view = PacketView()
    assert view.load(packet)
    assert natt.esp_offset(packet, view, frozenset((4500, 10000))) == 28


def test_wrap_sends_checksum_zero_over_ipv4_and_finish_fills_it_in_over_ipv6():
    esp = b"\0\0\x01\0" + bytes(37)
    header = natt.wrap(b"IP", Ports(), 8 + len(esp))
    assert header == b"IP" + struct.pack(">HHHH", 4500, 61000, 49, 0)
    assert natt.header(4500, 61000, 49) == header[2:]
    datagram = natt.wrap(ipv6.header(NAT6, HERE6, 17, 49), Ports(), 49) + esp
    finished = natt.finish(datagram)
    assert finished[46:48] != b"\0\0"
    assert checksum.verify_transport(finished)
    assert finished[:46] + b"\0\0" + finished[48:] == datagram


def test_finish_finds_udp_behind_extension_headers():
    body = struct.pack(">HHHH", 1, 2, 12, 0) + b"ESP!"
    datagram = ipv6.header(NAT6, HERE6, 0, 8 + 12) + bytes((17, 0, 1, 4, 0, 0, 0, 0)) + body
    assert checksum.verify_transport(natt.finish(datagram))


def test_a_checksum_that_comes_out_zero_is_sent_as_ffff():
    for number in range(65536):
        datagram = ipv6.header(NAT6, HERE6, 17, 10) + struct.pack(">HHHHH", 1, 2, 10, 0, number)
        if checksum.transport(NAT6, HERE6, 17, datagram[40:]) == 0:
            assert natt.finish(datagram)[46:48] == b"\xff\xff"
            return
    pytest.fail("no such datagram")


def test_keepalive_is_one_octet_of_ones():
    assert natt.keepalive(Ports()) == struct.pack(">HHHH", 4500, 61000, 9, 0) + b"\xff"


def segment(protocol, src, dst, wrong=0):
    """A TCP or UDP segment as the sender behind the NAT made it."""
    if protocol == 6:
        body = bytearray(struct.pack(">HHIIBBHHH", 1000, 80, 1, 2, 0x50, 0x18, 999, 0, 0) + b"data!")
        field = 16
    else:
        body = bytearray(struct.pack(">HHHH", 1000, 53, 13, 0) + b"data!")
        field = 6
    value = checksum.transport(src, dst, protocol, body) ^ wrong
    body[field : field + 2] = value.to_bytes(2, "big")
    return bytes(body)


FAMILIES = {4: (PRIVATE, NAT, HERE), 6: (PRIVATE6, NAT6, HERE6)}


def fix(payload, protocol, version, original, policy, extension=b""):
    """What becomes of a payload that arrives, all transforms off, behind an extension header that names it."""
    _, nat, here = FAMILIES[version]
    header = ipv4.header if version == 4 else ipv6.header
    follows = 60 if extension else protocol
    packet = header(nat, here, follows, len(extension) + len(payload)) + extension + payload
    view = PacketView()
    assert view.load(packet)
    fixed = natt.fix_checksum(packet, view, original, policy)
    assert fixed[: view.offset] == packet[: view.offset]
    return fixed[view.offset :]


def right(version, protocol, payload):
    _, nat, here = FAMILIES[version]
    return checksum.transport(nat, here, protocol, payload) == 0


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [6, 17])
class TestChecksumPolicy:
    def test_original_addresses_make_it_incremental(self, version, protocol):
        private, _, here = FAMILIES[version]
        sent = segment(protocol, private, here)
        assert not right(version, protocol, sent)
        for known in (Originals(private, here), Originals(private)):
            fixed = fix(sent, protocol, version, known, 0)
            assert right(version, protocol, fixed)

    def test_incremental_keeps_an_error_an_error(self, version, protocol):
        private, _, here = FAMILIES[version]
        sent = segment(protocol, private, here, wrong=0x0400)
        fixed = fix(sent, protocol, version, Originals(private), 0)
        assert not right(version, protocol, fixed)

    def test_without_original_addresses_the_checksum_is_ignored(self, version, protocol):
        private, _, here = FAMILIES[version]
        sent = segment(protocol, private, here, wrong=0x0400)
        fixed = fix(sent, protocol, version, Originals(), 0)
        if protocol == 17 and version == 4:
            assert fixed == sent[:6] + b"\0\0" + sent[8:]
        else:  # nobody can tell the kernel to ignore it, so it gets one that is right
            assert right(version, protocol, fixed)

    def test_policy_1_always_computes_it_anew(self, version, protocol):
        private, _, here = FAMILIES[version]
        sent = segment(protocol, private, here, wrong=0x0400)
        for known in (Originals(), Originals(private)):
            assert right(version, protocol, fix(sent, protocol, version, known, 1))

    def test_no_segment_is_changed_but_for_its_checksum(self, version, protocol):
        private, _, here = FAMILIES[version]
        sent = segment(protocol, private, here)
        field = 16 if protocol == 6 else 6
        for policy in (0, 1):
            for known in (Originals(), Originals(private)):
                fixed = fix(sent, protocol, version, known, policy)
                assert fixed[:field] + fixed[field + 2 :] == sent[:field] + sent[field + 2 :]


def test_udp_without_a_checksum_stays_without_one_over_ipv4():
    sent = struct.pack(">HHHH", 1000, 53, 13, 0) + b"data!"
    for policy in (0, 1):
        assert fix(sent, 17, 4, Originals(PRIVATE), policy) == sent


@pytest.mark.parametrize(
    ("protocol", "payload"), [(1, b"ping" * 5), (6, bytes(19)), (17, bytes(7)), (6, b""), (132, b"x" * 30)]
)
def test_other_protocols_and_short_segments_are_left_alone(protocol, payload):
    for policy in (0, 1):
        assert fix(payload, protocol, 4, Originals(PRIVATE), policy) == payload


@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize("policy", [0, 1])
def test_the_checksum_behind_destination_options_is_found(protocol, policy):
    options = bytes((protocol, 0, 1, 4, 0, 0, 0, 0))
    sent = segment(protocol, PRIVATE6, HERE6)
    for known in (Originals(), Originals(PRIVATE6)):
        assert right(6, protocol, fix(sent, protocol, 6, known, policy, options))


@pytest.mark.parametrize("policy", [0, 1])
def test_fragments_keep_the_checksum_of_the_whole(policy):
    for offset in (1, 8):  # the first one, and a later one
        sent = segment(17, PRIVATE6, HERE6) + bytes(3)
        packet = ipv6.header(NAT6, HERE6, 44, 8 + len(sent)) + struct.pack(">BxHI", 17, offset, 9) + sent
        view = PacketView()
        assert view.load(packet)
        assert natt.fix_checksum(packet, view, Originals(), policy) == packet
