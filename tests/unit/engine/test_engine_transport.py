"""Transport mode as others send it: any headers in front of AH and ESP, and NATs that change what TCP and UDP summed."""

from __future__ import annotations

from typing import Any

import pytest
from engine_bundles import ALGORITHMS, HOSTS, Step, ends, pair
from engine_peers import Peer, address, udp

from ipsecq.counters import Counter, Fate
from ipsecq.crypto import cipher
from ipsecq.engine.inbound import Inbound
from ipsecq.numbers import Protocol
from ipsecq.packet import checksum, ipv4, ipv6
from ipsecq.packet.fragments import Reassembler, fragment
from ipsecq.sa.association import NatTraversal
from ipsecq.secret import Key
from ipsecq.transforms import natt
from ipsecq.transforms.ah import AhTransform
from ipsecq.transforms.esp import EspTransform
from ipsecq.transforms.ipcomp import IpcompTransform

ESP, AH, IPCOMP = Protocol.ESP, Protocol.AH, Protocol.IPCOMP
SRC, DST = (address(text) for text in HOSTS[6])
HOPS, ROUTING, OPTIONS = 0, 43, 60

CHAINS = [
    (), (HOPS,), (OPTIONS,), (ROUTING,), (HOPS, OPTIONS), (HOPS, ROUTING), (OPTIONS, ROUTING), (ROUTING, OPTIONS),
    (HOPS, OPTIONS, ROUTING, OPTIONS),
]  # fmt: skip
BUNDLES = {
    "esp": [Step(ESP, "gcm")],
    "esp cbc": [Step(ESP, "cbc")],
    "esp in udp": [Step(ESP, "gcm", 0, (("natt", NatTraversal()),))],
    "ah": [Step(AH, "sha256")],
    "ipcomp": [Step(IPCOMP, "deflate")],
    "ipcomp esp": [Step(IPCOMP, "deflate"), Step(ESP, "gcm")],
    "esp ah": [Step(ESP, "gcm"), Step(AH, "sha1")],
    "ipcomp esp ah": [Step(IPCOMP, "deflate"), Step(ESP, "null"), Step(AH, "sha256")],
}


def headers(chain: tuple[int, ...], follows: int, payload: int) -> tuple[bytes, int]:
    """IPv6 header and extension headers in front of ``payload`` octets, and which octet names what follows them."""
    extensions, named_by = b"", 6
    for kind, after in zip(chain, (*chain[1:], follows), strict=False):
        named_by = 40 + len(extensions)
        if kind == ROUTING:  # of type 2, used up
            extensions += bytes((after, 2, 2, 0, 0, 0, 0, 0)) + address("2001:db8::77")
        else:  # an option to skip whose data may change on the way
            extensions += bytes((after, 0, 0x3E, 4, 1, 2, 3, 4))
    first = chain[0] if chain else follows
    return ipv6.header(SRC, DST, first, len(extensions) + payload, hop_limit=9) + extensions, named_by


def sealed(steps: list[Step], chain: tuple[int, ...], payload: bytes, follows: int) -> bytes:
    """The datagram of a sender that puts its transforms behind all of the headers of ``chain``."""
    for place, step in enumerate(steps):
        spi, more, options = 0x1000 + 2 * place, ALGORITHMS[step.algorithm], dict(step.more)
        if step.protocol is ESP:
            built = cipher.build(
                more["encryption"], more.get("encryption_key", Key(b"")), more.get("authentication"),
                more.get("authentication_key"),
            )  # fmt: skip
            transform = EspTransform(spi, built)
            payload, follows = transform.seal(payload, follows, 1, bytes(range(transform.random_length))), int(ESP)
            if "natt" in options:
                payload, follows = natt.wrap(b"", options["natt"], 8 + len(payload)) + payload, 17
        elif step.protocol is IPCOMP:
            compressed = IpcompTransform(spi).seal(payload, follows)
            assert compressed is not None
            payload, follows = compressed, int(IPCOMP)
        else:
            ah = AhTransform(spi, cipher.icv(more["authentication"], more["authentication_key"]))
            front, _ = headers(chain, int(AH), ah.header_length(6) + len(payload))
            whole = ah.seal(payload, follows, 1, front)
            assert whole is not None
            payload, follows = whole[len(front) :], int(AH)
    front, _ = headers(chain, follows, len(payload))
    return front + payload


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(map(str, chain)) or "none")
@pytest.mark.parametrize("bundle", BUNDLES)
def test_all_headers_in_front_of_a_transform_stay(bundle: str, chain: tuple[int, ...]) -> None:
    segment = udp(*HOSTS[6], b"compressible " * 20)[40:]
    _, right = pair(BUNDLES[bundle], 6, knobs={"net.inet.ipsec.natt_cksum_policy": 1})
    expected = headers(chain, 17, len(segment))[0] + segment
    assert right.receive(sealed(BUNDLES[bundle], chain, segment, 17)) == (Fate.DONE, [expected])


@pytest.mark.parametrize("chain", [(), (HOPS,), (OPTIONS,), (ROUTING, OPTIONS)], ids=str)
@pytest.mark.parametrize("bundle", ["esp", "esp in udp", "ah", "ipcomp", "esp ah"])
def test_an_atomic_fragment_is_opened_as_if_it_had_been_reassembled(bundle: str, chain: tuple[int, ...]) -> None:
    segment = udp(*HOSTS[6], b"compressible " * 20)[40:]
    datagram = sealed(BUNDLES[bundle], chain, segment, 17)
    front, named_by = headers(chain, 17, len(segment))
    cut = bytearray(datagram)
    cut[len(front) : len(front)] = bytes((datagram[named_by], 0, 0, 0, 0, 0, 0, 7))
    cut[named_by] = 44
    cut[4:6] = (len(cut) - 40).to_bytes(2, "big")
    _, right = pair(BUNDLES[bundle], 6, knobs={"net.inet.ipsec.natt_cksum_policy": 1})
    assert right.receive(bytes(cut)) == (Fate.DONE, [front + segment])


# -- behind a NAT -----------------------------------------------------------------------------------------------------

PRIVATE = {4: "10.9.9.9", 6: "fd09::9"}


def through_nat(version: int, protocol: int, extension: bytes = b"", wrong: int = 0) -> bytes:
    """A packet that was summed with the private address behind the NAT, and has the other one already."""
    src, dst = (address(text) for text in HOSTS[version])
    body = b"compressible " * 20
    if protocol == 17:
        segment = bytearray(udp(PRIVATE[version], HOSTS[version][1], body)[20 if version == 4 else 40 :])
        field = 6
    else:
        segment = bytearray(bytes.fromhex("03e8005000000001000000025018010000000000") + body)
        segment[16:18] = checksum.transport(address(PRIVATE[version]), dst, 6, segment).to_bytes(2, "big")
        field = 16
    segment[field] ^= wrong
    if version == 4:
        return ipv4.header(src, dst, protocol, len(segment), identification=9) + segment
    return ipv6.header(src, dst, OPTIONS if extension else protocol, len(extension) + len(segment)) + extension + segment


def behind_nat(steps: list[Step], version: int, policy: int, known: bool) -> tuple[Peer, Peer]:
    ports = NatTraversal(original_src=address(PRIVATE[version]) if known else None)
    steps = [Step(s.protocol, s.algorithm, s.outer, (("natt", ports),) if s.protocol is ESP else ()) for s in steps]
    return pair(steps, version, knobs={"net.inet.ipsec.natt_cksum_policy": policy})


NATTED: dict[str, Any] = {
    "esp": [Step(ESP, "gcm")],
    "ipcomp esp": [Step(IPCOMP, "deflate"), Step(ESP, "gcm")],
    "ah esp": [Step(AH, "sha256"), Step(ESP, "gcm")],
    "ipcomp ah esp": [Step(IPCOMP, "deflate"), Step(AH, "sha1"), Step(ESP, "cbc")],
}


@pytest.mark.parametrize("bundle", NATTED)
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("extension", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.parametrize("policy", [0, 1])
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_the_checksum_fits_the_addresses_whatever_else_is_between_esp_and_the_upper_layer(
    bundle: str, version: int, extension: bool, protocol: int, policy: int, known: bool
) -> None:
    if extension and version == 4:
        return
    options = bytes((protocol, 0, 1, 4, 0, 0, 0, 0)) if extension else b""
    packet = through_nat(version, protocol, options)
    assert not checksum.verify_transport(packet)
    left, right = behind_nat(NATTED[bundle], version, policy, known)
    _, wire = left.send(packet)
    fate, inner = right.receive(wire[0])
    assert fate == Fate.DONE
    assert checksum.verify_transport(inner[0])
    at = (20 if version == 4 else 40) + len(options) + (6 if protocol == 17 else 16)
    assert inner[0][:at] + inner[0][at + 2 :] == packet[:at] + packet[at + 2 :]
    assert (inner[0][at : at + 2] == b"\0\0") == (version == 4 and protocol == 17 and not policy and not known)


@pytest.mark.parametrize("bundle", NATTED)
def test_what_was_wrong_when_it_was_sealed_stays_wrong_where_the_original_address_is_known(bundle: str) -> None:
    left, right = behind_nat(NATTED[bundle], 4, 0, True)
    fate, inner = right.receive(left.send(through_nat(4, 6, wrong=4))[1][0])
    assert fate == Fate.DONE
    assert not checksum.verify_transport(inner[0])


def test_the_checksum_of_a_datagram_that_came_in_fragments_fits() -> None:
    left, right = behind_nat(NATTED["ah esp"], 4, 1, False)
    right.inbound = Inbound(right.tables, Reassembler(1 << 20, 8, 30.0))
    datagram = left.send(through_nat(4, 6))[1][0]
    pieces = fragment(datagram, 200, int.from_bytes(datagram[4:6], "big"))
    assert len(pieces) > 1
    *waiting, last = [right.receive(piece) for piece in pieces]
    assert all(each == (Fate.ABSORBED, []) for each in waiting)
    assert last[0] == Fate.DONE
    assert checksum.verify_transport(last[1][0])


@pytest.mark.parametrize(("protocol", "algorithm"), [(ESP, "cbc"), (AH, "sha1"), (IPCOMP, "deflate")])
def test_a_tunnel_inside_is_none_of_the_nats_affairs(protocol: Protocol, algorithm: str) -> None:
    steps = [Step(protocol, algorithm, 4), Step(ESP, "gcm", 0, (("natt", NatTraversal()),))]
    left, right = pair(steps, knobs={"net.inet.ipsec.natt_cksum_policy": 1})
    packet = through_nat(4, 6)
    _, wire = left.send(packet)
    assert (wire[0][9], wire[0][12:16]) == (17, ends(0, 4)[0])
    assert right.receive(wire[0]) == (Fate.DONE, [packet])
    assert right.count(Counter.ESP_INPUT) >= 1
