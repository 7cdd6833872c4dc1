"""AH: what routers may change is not covered, everything else is; malformed packets are counted, none raises."""

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.counters import Counter
from ipsecq.crypto import cipher, registry
from ipsecq.packet import ipv4, ipv6
from ipsecq.packet.view import PacketView
from ipsecq.secret import Key
from ipsecq.transforms.ah import AhTransform, immutable

A4, B4, C4 = (bytes((10, 0, 0, n)) for n in (1, 2, 3))
A6, B6, C6, D6 = (ipaddress.ip_address(f"fd00::{n}").packed for n in (1, 2, 3, 4))
PAYLOAD = bytes(range(50))
AUTHS = list(registry.AUTHENTICATION)


def ah(auth="hmac-sha2-256", **options):
    bits = registry.authentication(auth).key_bits[-1]
    return AhTransform(0xABCD, cipher.icv(auth, Key(bytes(i % 251 for i in range(bits // 8)))), **options)


def header4(length, options=b"", **fields):
    """An IPv4 header for AH and ``length`` octets behind it."""
    assert len(options) % 4 == 0
    head = bytearray(ipv4.header(A4, B4, 51, length, **fields))
    head[0] = 0x45 + len(options) // 4
    head[2:4] = (20 + len(options) + length).to_bytes(2, "big")
    head += options
    ipv4.fix_checksum(head)
    return bytes(head)


def header6(length, extensions=(), dst=B6, **fields):
    """An IPv6 header, extension headers given as (type, octets after the next header octet), for AH."""
    kinds = [kind for kind, _ in extensions] + [51]
    chain = b"".join(
        bytes((following,)) + body for (_, body), following in zip(extensions, kinds[1:], strict=True)
    )
    return ipv6.header(A6, dst, kinds[0], len(chain) + length, **fields) + chain


def sealed4(sa, options=b"", sequence=7, **fields):
    knobs = {key: fields.pop(key) for key in ("cleartos", "offsetmask") if key in fields}
    head = header4(sa.header_length(4) + len(PAYLOAD), options, **fields)
    packet = sa.seal(PAYLOAD, 17, sequence, head, **knobs)
    assert packet is not None
    return bytearray(packet), len(head)


def sealed6(sa, extensions=(), sequence=7, **fields):
    head = header6(sa.header_length(6) + len(PAYLOAD), extensions, **fields)
    packet = sa.seal(PAYLOAD, 17, sequence, head)
    assert packet is not None
    return bytearray(packet), len(head)


GOOD = (0, 17, PAYLOAD)
BAD = (Counter.AH_BADAUTH, 0, b"")


@pytest.mark.parametrize("auth", AUTHS)
@pytest.mark.parametrize("esn", [False, True], ids=["32 bits", "esn"])
@pytest.mark.parametrize("version", [4, 6])
def test_open_of_seal_is_the_payload_and_no_other_high_half_will_do(auth, esn, version):
    sa = ah(auth, esn=esn)
    sequence = (9 << 32) + 5 if esn else 5
    packet, offset = (sealed4 if version == 4 else sealed6)(sa, sequence=sequence)
    view = PacketView()
    assert view.load(packet)
    assert (view.protocol, view.offset, view.length) == (51, offset, len(packet))
    assert sa.open(packet, offset, sequence) == GOOD
    assert sa.open(memoryview(packet), offset, sequence) == GOOD
    if esn:
        assert sa.open(packet, offset, 5) == BAD


@pytest.mark.parametrize("version", [4, 6])
@settings(max_examples=60, deadline=None)
@given(payload=st.binary(max_size=200), next_header=st.integers(0, 255), auth=st.sampled_from(AUTHS), esn=st.booleans())
def test_open_of_seal_for_any_payload(version, payload, next_header, auth, esn):
    sa = ah(auth, esn=esn)
    length = sa.header_length(version) + len(payload)
    head = header4(length) if version == 4 else header6(length)
    packet = sa.seal(payload, next_header, 3, head)
    assert packet is not None
    assert len(packet) == len(head) + length
    assert sa.open(packet, len(head), 3) == (0, next_header, payload)


LENGTHS = [  # RFC 4302 section 3.3.3.2.1 and errata 3643 of RFC 4543: multiples of 4 for IPv4, of 8 for IPv6
    ("hmac-sha1", 24, 24), ("aes-xcbc-mac", 24, 24), ("hmac-sha2-256", 28, 32), ("hmac-sha2-384", 36, 40),
    ("hmac-sha2-512", 44, 48), ("aes-gmac", 36, 40),
]  # fmt: skip


@pytest.mark.parametrize(("auth", "in4", "in6"), LENGTHS)
def test_header_lengths_and_linux_peers_that_align_ipv4_to_eight(auth, in4, in6):
    sa = ah(auth)
    assert (sa.header_length(4), sa.header_length(6)) == (in4, in6)
    linux = ah(auth, align=8)
    assert linux.header_length(4) == in6
    packet, offset = sealed4(linux)
    assert packet[offset + 1] == in6 // 4 - 2
    assert sa.open(packet, offset, 7) == GOOD
    packet, offset = sealed4(sa)
    assert linux.open(packet, offset, 7)[0] == (0 if in4 == in6 else Counter.AH_BADAUTHL)


def flips(packet, sa, offset, positions):
    """Those of the octets whose change the receiver notices."""
    noticed = set()
    for position in positions:
        for mask in (0x01, 0x80):
            packet[position] ^= mask
            if sa.open(packet, offset, 7)[0]:
                noticed.add(position)
            packet[position] ^= mask
    return noticed


@pytest.mark.parametrize("auth", AUTHS)
def test_ipv4_routers_may_change_tos_flags_offset_ttl_and_checksum_and_nothing_else(auth):
    sa = ah(auth)
    packet, offset = sealed4(sa, df=True)
    may_change = {1, 6, 7, 8, 10, 11}
    assert flips(packet, sa, offset, range(len(packet))) == set(range(len(packet))) - may_change


@pytest.mark.parametrize("auth", AUTHS)
def test_ipv6_routers_may_change_traffic_class_flow_label_and_hop_limit_and_nothing_else(auth):
    sa = ah(auth)
    packet, offset = sealed6(sa)
    noticed = flips(packet, sa, offset, range(1, len(packet)))
    assert noticed == set(range(1, len(packet))) - {1, 2, 3, 7}
    packet[0] ^= 0x0F  # high half of the traffic class
    assert sa.open(packet, offset, 7) == GOOD


def test_cleartos_zero_covers_the_tos():
    sa = ah()
    packet, offset = sealed4(sa, cleartos=False, tos=0x28)
    assert sa.open(packet, offset, 7, cleartos=False) == GOOD
    assert sa.open(packet, offset, 7) == BAD
    packet[1] ^= 4
    assert sa.open(packet, offset, 7, cleartos=False) == BAD


def test_offsetmask_covers_those_bits_of_flags_and_offset():
    sa = ah()
    packet, offset = sealed4(sa, offsetmask=0x4000, df=True)
    assert sa.open(packet, offset, 7, offsetmask=0x4000) == GOOD
    assert sa.open(packet, offset, 7) == BAD
    packet[7] ^= 1  # not under the mask
    assert sa.open(packet, offset, 7, offsetmask=0x4000) == GOOD
    packet[6] ^= 0x40
    assert sa.open(packet, offset, 7, offsetmask=0x4000) == BAD


OPTIONS4 = {  # option, and whether its contents are covered (RFC 4302 appendix A1)
    "no operation": (b"\x01\x01\x01\x01", True),
    "security": (bytes.fromhex("820b") + bytes(9) + b"\x00", True),
    "extended security": (bytes.fromhex("85040102"), True),
    "commercial security": (bytes.fromhex("8606000000010000"), True),
    "router alert": (bytes.fromhex("94040000"), True),
    "sender directed delivery": (bytes.fromhex("95080102030405060708")[:8], True),
    "record route": (bytes.fromhex("070b08") + A4 + bytes(4) + b"\0", False),
    "timestamp": (bytes.fromhex("440c0500") + bytes(8), False),
    "traceroute": (bytes.fromhex("520c000100020003") + A4, False),
    "stream id": (bytes.fromhex("88040007"), False),
    "unknown": (bytes.fromhex("9e040102"), False),
}


@pytest.mark.parametrize("name", OPTIONS4)
def test_ipv4_options_are_covered_or_zeroed_by_their_kind(name):
    option, covered = OPTIONS4[name]
    sa = ah()
    packet, offset = sealed4(sa, option)
    assert sa.open(packet, offset, 7) == GOOD
    kind_length = 1 if option[0] == 1 else 2
    packet[20 + kind_length] ^= 0x01 if option[0] != 1 else 0x02  # NOP becomes 3, an option of its own
    assert (sa.open(packet, offset, 7) == GOOD) is not covered


@pytest.mark.parametrize("kind", [0x83, 0x89], ids=["loose", "strict"])
def test_a_source_routed_packet_opens_at_its_final_destination(kind):
    """Sent to B by way of C: the receiver B sees itself as the destination and the pointer behind the route."""
    sa = ah()
    sent, offset = sealed4(sa, bytes((kind, 7, 4)) + C4 + b"\0")
    assert sent[16:20] == B4
    assert sa.open(sent, offset, 7) == GOOD  # B is only the first hop; the ICV sees C
    arrived = bytearray(sent)
    arrived[16:20] = C4
    arrived[22] = 8
    arrived[23:27] = B4
    assert sa.open(arrived, offset, 7) == GOOD
    arrived[16:20] = A4
    assert sa.open(arrived, offset, 7) == BAD


def tlv(kind, data):
    body = bytes((kind, len(data))) + data
    padding = -(2 + len(body)) % 8
    if padding == 1:
        body += b"\0"
    elif padding:
        body += bytes((1, padding - 2)) + bytes(padding - 2)
    return bytes(((2 + len(body)) // 8 - 1,)) + body


@pytest.mark.parametrize("header", [0, 60], ids=["hop by hop", "destination"])
@pytest.mark.parametrize(("kind", "covered"), [(0x1E, True), (0x3E, False), (0x05, True), (0x26, False)])
def test_ipv6_options_are_covered_or_zeroed_by_their_change_bit(header, kind, covered):
    sa = ah()
    packet, offset = sealed6(sa, [(header, tlv(kind, b"abcd"))])
    assert sa.open(packet, offset, 7) == GOOD
    packet[44] ^= 1  # data
    assert (sa.open(packet, offset, 7) == GOOD) is not covered
    packet[44] ^= 1
    packet[42] ^= 0x40  # type: covered in either case
    assert sa.open(packet, offset, 7) == BAD


def routing(kind, left, *addresses):
    return bytes((len(addresses) * 2, kind, left)) + bytes(4) + b"".join(addresses)


def test_a_routing_header_enters_the_icv_in_its_final_state():
    """RFC 8200 section 4.4: A sends to B by way of C and D; D sees (D; B, C)."""
    sa = ah()
    sent, offset = sealed6(sa, [(43, routing(0, 2, C6, D6))], dst=B6)
    for dst, left, first, second in ((C6, 1, B6, D6), (D6, 0, B6, C6)):
        arrived = bytearray(sent)
        arrived[24:40] = dst
        arrived[40:80] = bytes((51,)) + routing(0, left, first, second)
        assert sa.open(arrived, offset, 7) == GOOD
        arrived[79] ^= 1
        assert sa.open(arrived, offset, 7) == BAD


def test_a_mobile_node_is_known_by_its_home_address():
    """RFC 6275 section 11.3.2: what is on the wire has the care-of address as its source, the ICV the home address."""
    sa = ah()
    option = bytes((2, 1, 2, 0, 0, 0xC9, 16)) + C6
    packet, offset = sealed6(sa, [(60, option)])
    assert packet[46:48] == bytes((0xC9, 16))
    covered = immutable(bytes(packet[:offset]))
    assert covered is not None
    assert covered[8:24] == C6
    assert covered[48:64] == A6
    assert sa.open(packet, offset, 7) == GOOD


MALFORMED = {
    "ipv4 option without length": header4(80, b"\x01\x01\x01\x44"),
    "ipv4 option of length 1": header4(80, b"\x44\x01\x00\x00"),
    "ipv4 option too long": header4(80, b"\x44\x09\x00\x00"),
    "ipv4 source route of length 3.5": header4(80, b"\x83\x06\x04\x00\x00\x00\x00\x00"),
    "ipv6 option too long": header6(80, [(0, bytes((0, 0x3E, 9, 0, 0, 0, 0)))]),
    "ipv6 routing header with more left than there are": header6(80, [(43, routing(0, 3, C6, D6))]),
    "ipv6 routing header of odd length": header6(80, [(43, bytes((1, 0, 1)) + bytes(12))]),
    "ipv6 home address of 4 octets": header6(80, [(60, bytes((0, 0xC9, 4)) + bytes(4))]),
    "ipv6 extension header past the end": header6(80, [(0, bytes((9, 1, 4)) + bytes(4))]),
    "version 5": b"\x55" + header4(80)[1:],
    "ipv4 header length": b"\x46" + header4(80)[1:],
    "too short": header4(80)[:19],
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers_are_refused_by_both_sides(name):
    sa = ah()
    head = MALFORMED[name]
    assert immutable(head) is None
    assert sa.seal(PAYLOAD, 17, 1, head) is None
    version = head[0] >> 4
    packet = head + bytes((17, sa.header_length(version) // 4 - 2)) + bytes(100)
    assert sa.open(packet, len(head), 1) == (Counter.AH_HDROPS, 0, b"")


def test_wrong_lengths_of_ah_are_badauthl_and_short_packets_hdrops():
    sa = ah()
    packet, offset = sealed4(sa)
    for length in {*range(256)} - {packet[offset + 1], 6}:
        wrong = bytearray(packet)
        wrong[offset + 1] = length
        assert sa.open(wrong, offset, 7) == (Counter.AH_BADAUTHL, 0, b"")
    for end in range(len(packet)):
        reason = sa.open(packet[:end], offset, 7)[0]
        if end < offset + 12:
            assert reason == Counter.AH_HDROPS
        else:
            assert reason == (Counter.AH_BADAUTHL if end < offset + 28 else Counter.AH_BADAUTH)


@settings(max_examples=300, deadline=None)
@given(packet=st.binary(max_size=150), offset=st.integers(0, 160), auth=st.sampled_from(AUTHS), esn=st.booleans())
def test_hostile_octets_are_dropped_with_a_reason_and_nothing_raised(packet, offset, auth, esn):
    reason, next_header, payload = ah(auth, esn=esn).open(packet, offset, 5)
    assert reason in {Counter.AH_HDROPS, Counter.AH_BADAUTHL, Counter.AH_BADAUTH}
    assert (next_header, payload) == (0, b"")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_hostile_options_and_extension_headers_are_dropped(data):
    sa = ah("hmac-sha1")
    kind = data.draw(st.sampled_from([0, 43, 60]))
    body = data.draw(st.binary(min_size=7, max_size=7 + 24).filter(lambda b: len(b) % 8 == 7))
    head = header6(24 + 20, [(kind, body)]) if data.draw(st.booleans()) else header4(44, (body + b"\0"))
    packet = head + bytes((17, 4)) + bytes(22 + 20)
    assert sa.open(packet, len(head), 5)[0] in {Counter.AH_HDROPS, Counter.AH_BADAUTH}


def test_aes_gmac_sends_the_sequence_number_as_its_iv():
    sa = ah("aes-gmac", esn=True)
    packet, offset = sealed4(sa, sequence=(1 << 35) + 2)
    assert packet[offset + 12 : offset + 20] == ((1 << 35) + 2).to_bytes(8, "big")
