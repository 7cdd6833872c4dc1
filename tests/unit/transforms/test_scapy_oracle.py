"""scapy.layers.ipsec, which shares no line with us, opens what we seal and seals what we open."""

import struct

import pytest
from scapy.layers.inet import IP, UDP, IPOption_LSRR, IPOption_Router_Alert, IPOption_Timestamp
from scapy.layers.inet6 import (
    HBHOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    RouterAlert,
)
from scapy.layers.ipsec import AH, ESP, SecurityAssociation
from scapy.packet import Raw

from ipsecq.crypto import cipher, registry
from ipsecq.packet.view import PacketView
from ipsecq.secret import Key
from ipsecq.transforms.ah import AhTransform
from ipsecq.transforms.esp import EspTransform

CRYPT = {  # setkey name: scapy's name and ICV length; scapy has no short tags of AES-GCM: tests/vectors has
    "aes-gcm-16": ("AES-GCM", 16),
    "aes-ccm-16": ("AES-CCM", 16),
    "aes-ccm-12": ("AES-CCM", 12),
    "aes-ccm-8": ("AES-CCM", 8),
    "aes-gmac": ("AES-NULL-GMAC", 16),
    "chacha20-poly1305": ("CHACHA20-POLY1305", 16),
    "aes-cbc": ("AES-CBC", None),
    "aes-ctr": ("AES-CTR", None),
    "null": ("NULL", None),
    "3des-cbc": ("3DES", None),
}
AUTH = {
    "hmac-sha1": "HMAC-SHA1-96",
    "hmac-sha2-256": "SHA2-256-128",
    "hmac-sha2-384": "SHA2-384-192",
    "hmac-sha2-512": "SHA2-512-256",
    "hmac-md5": "HMAC-MD5-96",
    "aes-cmac": "AES-CMAC-96",
}
SPI = 0x1234


def octets(bits):
    return bytes((13 * i + 1) % 256 for i in range(bits // 8))


def pairs():
    for enc in CRYPT:
        yield from [(enc, None)] if registry.encryption(enc).aead else [(enc, auth) for auth in AUTH]


def both(enc, auth, high):
    """Our transform and scapy's SA with the same keys; ``high`` is an ESN's high half or None."""
    row = registry.encryption(enc)
    enc_key = octets(row.key_bits[-1])
    auth_key = octets(registry.authentication(auth).key_bits[0]) if auth else None
    name, icv = CRYPT[enc]
    ours = cipher.build(enc, Key(enc_key), auth, Key(auth_key) if auth_key else None)
    theirs = SecurityAssociation(
        ESP, spi=SPI, crypt_algo=name, crypt_key=enc_key or None, crypt_icv_size=icv,
        auth_algo=AUTH.get(auth), auth_key=auth_key, esn_en=high is not None, esn=high or 0,
    )  # fmt: skip
    return EspTransform(SPI, ours, esn=high is not None), theirs


@pytest.mark.parametrize("high", [None, 3], ids=["32 bits", "esn"])
@pytest.mark.parametrize(("enc", "auth"), list(pairs()))
def test_esp_by_scapy_and_by_us_are_one_protocol(enc, auth, high):
    for length in (0, 1, 13, 64, 500):
        ours, theirs = both(enc, auth, high)
        clear = IP(src="10.0.0.1", dst="10.0.0.2") / UDP(sport=1, dport=2) / Raw(bytes(length))
        datagram = bytes(clear)
        sequence = (high or 0) << 32 | 77
        sealed = ours.seal(datagram[20:], 17, sequence, octets(8 * ours.random_length))
        outer = IP(src="10.0.0.1", dst="10.0.0.2", proto=50) / Raw(sealed)
        assert bytes(theirs.decrypt(IP(bytes(outer))))[20:] == datagram[20:]

        packet = bytes(theirs.encrypt(IP(datagram), seq_num=77))
        assert ours.open(packet, 20, sequence) == (0, 17, datagram[20:])


IPV4 = {
    "plain": IP(src="10.0.0.1", dst="10.0.0.2", tos=0x2E, ttl=17, id=9),
    "dont fragment": IP(src="10.0.0.1", dst="10.0.0.2", flags="DF"),
    "timestamp option": IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_Timestamp()]),
    "router alert": IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_Router_Alert()]),
    "source route, arrived": IP(
        src="10.0.0.1", dst="10.0.0.2", options=[IPOption_LSRR(routers=["10.0.0.9"], pointer=8)]
    ),
}
IPV6 = {
    "plain": IPv6(src="fd00::1", dst="fd00::2", tc=5, fl=0x12345, hlim=3),
    "hop by hop": IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrHopByHop(options=[RouterAlert()]),
    "mutable option": IPv6(src="fd00::1", dst="fd00::2")
    / IPv6ExtHdrHopByHop(options=[HBHOptUnknown(otype=0x3E, optdata=b"abcd")]),
    "options and routing": IPv6(src="fd00::1", dst="fd00::2")
    / IPv6ExtHdrDestOpt(options=[HBHOptUnknown(otype=0x1E, optdata=b"abcd")])
    / IPv6ExtHdrRouting(addresses=["fd00::3"], segleft=1),
}


@pytest.mark.parametrize("auth", AUTH)
@pytest.mark.parametrize("high", [None, 3], ids=["32 bits", "esn"])
@pytest.mark.parametrize("name", [*(("4", n) for n in IPV4), *(("6", n) for n in IPV6)], ids="-".join)
def test_ah_by_scapy_and_by_us_are_one_protocol(name, high, auth):
    header = IPV4[name[1]] if name[0] == "4" else IPV6[name[1]]
    key = octets(registry.authentication(auth).key_bits[0])
    ours = AhTransform(SPI, cipher.icv(auth, Key(key)), esn=high is not None)
    theirs = SecurityAssociation(
        AH, spi=SPI, auth_algo=AUTH[auth], auth_key=key, esn_en=high is not None, esn=high or 0
    )
    layer = type(header)
    clear = bytes(header / UDP(sport=5, dport=6) / Raw(b"data" * 5))
    sealed = bytes(theirs.encrypt(layer(clear), seq_num=99))
    view = PacketView()
    assert view.load(sealed)
    assert view.protocol == 51
    sequence = (high or 0) << 32 | 99
    reason, next_header, payload = ours.open(sealed, view.offset, sequence)
    assert (reason, next_header) == (0, 17)
    assert payload == clear[-28:]

    prefix = sealed[: view.offset]
    again = ours.seal(payload, 17, sequence, prefix)
    assert again == sealed
    assert struct.unpack(">H", again[view.offset + 2 : view.offset + 4]) == (0,)
    if IPv6ExtHdrRouting not in header:  # a receiver to scapy is one whom the routing header has reached
        assert bytes(theirs.decrypt(layer(again)))[-28:] == payload  # raises unless it verifies
