"""Transport mode as others send it: any headers in front of AH and ESP."""

from __future__ import annotations

import pytest
from engine_bundles import ALGORITHMS, HOSTS, Step, pair
from engine_peers import address, udp

from ipsecq.counters import Fate
from ipsecq.crypto import cipher
from ipsecq.numbers import Protocol
from ipsecq.packet import ipv6
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
