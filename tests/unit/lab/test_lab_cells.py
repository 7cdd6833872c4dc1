"""A cell says the same thing in setkey's and in iproute2's words."""

import re

from ipsecq.lab.cells import AEAD, IPCOMP, Cell, Ends, ah, esp, setkey, xfrm

ENDS = Ends("192.0.2.1", "192.0.2.2", "10.1.0.0/24", "10.2.0.0/24")


def test_both_ends_get_the_same_keys_and_spis():
    cell = Cell((AEAD[0], ah("hmac-sha1")), "tunnel").keyed()
    ours, theirs = setkey(cell, ENDS), "\n".join(xfrm(cell, ENDS))
    keys = re.findall(r"0x[0-9a-f]{20,}", ours)
    assert len(set(keys)) == 4
    assert sorted(keys) == sorted(re.findall(r"0x[0-9a-f]{20,}", theirs))
    spis = re.findall(r"(?:esp|ah) (0x20\w\w)", ours)
    assert spis == re.findall(r"spi (0x20\w\w)", theirs)
    assert len(set(spis)) == 4


def test_only_the_first_transform_of_a_bundle_is_a_tunnel():
    cell = Cell((IPCOMP, esp("aes-cbc", "hmac-sha1"), ah("hmac-sha2-256")), "tunnel").keyed()
    text = setkey(cell, ENDS)
    assert text.count("-m tunnel") == 2
    assert text.count("-m transport") == 4
    assert "ipcomp/tunnel/192.0.2.1-192.0.2.2/require esp/transport//require ah/transport//require" in text


def test_directions_are_mirrored_at_the_kernels_end():
    lines = xfrm(Cell((AEAD[0],)).keyed(), ENDS)
    (out,) = [line for line in lines if " dir out " in line]
    (into,) = [line for line in lines if " dir in " in line]
    assert "src 10.2.0.0/24 dst 10.1.0.0/24" in out
    assert "tmpl src 192.0.2.2 dst 192.0.2.1" in out
    assert "src 10.1.0.0/24 dst 10.2.0.0/24" in into
