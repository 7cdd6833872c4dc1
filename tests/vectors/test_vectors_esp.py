"""Published vectors of ESP's ciphers, whole packets where the source has them, and Project Wycheproof."""

import json
import struct
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ipsecq.crypto import cipher
from ipsecq.secret import Key
from ipsecq.transforms.esp import EspTransform

DATA = Path(__file__).parent / "data"
H = bytes.fromhex
NO_MAC = {"unauthenticated": True}


def load(name):
    return json.loads((DATA / name).read_text())


def random_block_for(key, iv):
    """The block that makes a CBC cipher, whose context is new, send ``iv`` (its chain starts with zeros)."""
    return Cipher(algorithms.AES(key), modes.ECB()).decryptor().update(iv)


PING = "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f3031323334353637"
RFC_3602 = {  # section 4: key, SPI, sequence, IV, payload, next header, ciphertext
    "case 5, transport": (
        "90d382b410eeba7ad938c46cec1a82bf", 0x4321, 1, "e96e8c08ab465763fd098d45dd3ff893",
        "08000ebda70a00008e9c083db95b0700" + PING, 1,
        "f663c25d325c18c6a9453e194e120849a4870b66cc6b9965330013b4898dc856a4699e523a55db080b59ec3a8e4b7e52"
        "775b07d1db34ed9c538ab50c551b874aa269add047ad2d5913ac19b7cfbad4a6",
    ),
    "case 6, transport": (
        "90d382b410eeba7ad938c46cec1a82bf", 0x4321, 8, "69d08df7d203329db093fc4924e5bd80",
        "0800b5e8a80a0500a69c083d0b660e00" + "77" * 12, 1,
        "f51995881ec4e0c4488987ce742e8109689bb379d2d750c0d915dca346a89f75",
    ),
    "case 7, tunnel": (
        "0123456789abcdef0123456789abcdef", 0x8765, 2, "f4e765244f6407adf13dc1380f673f37",
        "45000054090400004001f988c0a87b03c0a87bc808009f76a90a0100b49c083d02a20400" + PING, 4,
        "773b5241a4c449225e4f3ce5ed611b0c237ca96cf74a93013c1b0ea1a0cf70f8e4ecaec78ac53aad7a0f022b859243c6"
        "47752e94a859352b8a4d4d2decd136e5c177f132ad3fbfb2201ac9904c74ee0a109e0ca1e4dfe9d5a100b842f1c22f0d",
    ),
    "case 8, tunnel": (
        "0123456789abcdef0123456789abcdef", 0x8765, 5, "85d47224b5f3dd5d2101d4ea8dffab22",
        "45000044090c00004001f990c0a87b03c0a87bc80800d63caa0a0200c69c083da3de0300" + "ff" * 32, 4,
        "15b92683819596a8047232cc00f7048fe45318e11f8a0f62ede3c3fc61203bb50f980a08c9843fd3a1b06d5c07ff9639"
        "b7eb7dfb3512e5de435e7207ed971ef3d2726d9b5ef6affc6d17a0decbb13892",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RFC_3602)
def test_aes_cbc_packets_of_rfc_3602(case):
    key, spi, sequence, iv, payload, next_header, ciphertext = RFC_3602[case]
    key, iv, payload = H(key), H(iv), H(payload)
    packet = struct.pack(">II", spi, sequence) + iv + H(ciphertext)
    transform = EspTransform(spi, cipher.build("aes-cbc", Key(key), **NO_MAC))
    assert transform.seal(payload, next_header, sequence, random_block_for(key, iv)) == packet
    assert transform.open(packet, 0, sequence) == (0, next_header, payload)


@pytest.mark.parametrize("case", load("rfc3686.json"), ids=lambda case: case["iv"])
def test_aes_ctr_of_rfc_3686(case):
    built = cipher.build("aes-ctr", Key(H(case["key"] + case["salt"])), **NO_MAC)
    header, iv, plaintext = bytes(8), H(case["iv"]), H(case["plaintext"])
    packet = header + iv + H(case["ciphertext"])
    assert built.seal(b"", header, iv, plaintext, b"") == packet
    assert built.open(packet, 0, b"") == plaintext


@pytest.mark.parametrize("case", load("gcm_esp.json"), ids=lambda case: case["aad"])
def test_aes_gcm_packets_of_the_gcm_test_draft(case):
    aad, nonce, plaintext = H(case["aad"]), H(case["nonce"]), H(case["plaintext"])
    spi = int.from_bytes(aad[:4], "big")
    sequence = int.from_bytes(aad[4:], "big")
    packet = aad[:4] + aad[-4:] + nonce[4:] + H(case["ciphertext"] + case["tag"])
    payload = plaintext[: -2 - plaintext[-2]]
    for name, cut in (("aes-gcm-16", 0), ("aes-gcm-12", 4), ("aes-gcm-8", 8)):
        built = cipher.build(name, Key(H(case["key"]) + nonce[:4]))
        transform = EspTransform(spi, built, esn=len(aad) == 12)
        expected = packet[: len(packet) - cut]
        assert transform.seal(payload, plaintext[-1], sequence, nonce[4:]) == expected
        assert transform.open(expected, 0, sequence) == (0, plaintext[-1], payload)


def test_chacha20_poly1305_packet_of_rfc_7634_appendix_a():
    key = bytes(range(0x80, 0xA4))
    payload = H("45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec1000073627" + PING)
    packet = H(
        "01020304000000051011121314151617"
        "24039428b97f417e3c13753a4f05087b67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95dfab4c02f7"
        "2aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da9165b82829f641e0"
        "76aaa8266b7fb0f7b11b369907e1ad43"
    )
    transform = EspTransform(0x01020304, cipher.build("chacha20-poly1305", Key(key)))
    assert transform.seal(payload, 4, 5, H("1011121314151617")) == packet
    assert transform.open(packet, 0, 5) == (0, 4, payload)


def test_chacha20_poly1305_of_rfc_8439_section_2_8_2():
    """Its associated data have 12 octets: an ESN's, as it happens."""
    plaintext = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, "
        b"sunscreen would be it."
    )
    built = cipher.build("chacha20-poly1305", Key(bytes(range(0x80, 0xA0)) + H("07000000")))
    packet = built.seal(b"", H("50515253c4c5c6c7"), H("4041424344454647"), plaintext, H("c0c1c2c3"))
    assert packet[16:].hex() == (
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
        "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691"
    )
    assert built.open(packet, 0, H("c0c1c2c3")) == plaintext


def test_null_encryption_of_rfc_2410_is_the_identity():
    payload = bytes(range(100))
    transform = EspTransform(7, cipher.build("null", Key(b""), **NO_MAC))
    assert transform.seal(payload, 6, 9) == struct.pack(">II", 7, 9) + payload + b"\x01\x02\x02\x06"


def test_nist_ccm_with_nonces_of_rfc_4309s_length():
    for case in load("nist_ccm_vnt.json"):
        nonce = H(case["Nonce"])
        built = cipher.build("aes-ccm-16", Key(H(case["Key"]) + nonce[:3]))
        sealed = built.seal(b"", H(case["Adata"]), nonce[3:], H(case["Payload"]), b"")
        assert sealed[len(H(case["Adata"])) + 8 :] == H(case["CT"])


def ccm_by_rfc_3610(key, nonce, plaintext, aad, tag_length):
    """AES-CCM written down from RFC 3610 section 2, for nonces of 11 octets."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update
    head = bytes((0x40 | (tag_length - 2) // 2 << 3 | 3,)) + nonce + len(plaintext).to_bytes(4, "big")
    covered = len(aad).to_bytes(2, "big") + aad
    blocks = head + covered + bytes(-len(covered) % 16) + plaintext + bytes(-len(plaintext) % 16)
    mac = bytes(16)
    for i in range(0, len(blocks), 16):
        mac = block(bytes(a ^ b for a, b in zip(mac, blocks[i : i + 16], strict=True)))
    stream = b"".join(block(b"\x03" + nonce + i.to_bytes(4, "big")) for i in range(len(plaintext) // 16 + 2))
    ciphertext = bytes(a ^ b for a, b in zip(plaintext, stream[16:], strict=False))
    return ciphertext + bytes(a ^ b for a, b in zip(mac, stream, strict=False))[:tag_length]


@pytest.mark.parametrize("icv", [8, 12, 16])
@pytest.mark.parametrize("high", [b"", b"\0\0\0\x01"], ids=["32 bits", "esn"])
def test_aes_ccm_is_that_of_rfc_3610_and_4309(icv, high):
    key, salt, header, iv = bytes(range(16)), b"\xaa\xbb\xcc", bytes(range(40, 48)), bytes(range(60, 68))
    built = cipher.build(f"aes-ccm-{icv}", Key(key + salt))
    for length in (4, 16, 52):
        plaintext = bytes(range(length))
        expected = ccm_by_rfc_3610(key, salt + iv, plaintext, header[:4] + high + header[4:], icv)
        assert built.seal(b"", header, iv, plaintext, high) == header + iv + expected


WYCHEPROOF_AEAD = {  # file: name and octets of salt
    "aes_gcm": ("aes-gcm-16", 4),
    "aes_ccm": ("aes-ccm-16", 3),
    "chacha20_poly1305": ("chacha20-poly1305", 4),
}


@pytest.mark.parametrize(("file", "algorithm"), WYCHEPROOF_AEAD.items())
def test_wycheproof_aead(file, algorithm):
    """Sealing with any associated data; opening where they have a length that ESP's can have."""
    name, salt_length = algorithm
    opened = 0
    for case in load(f"wycheproof_{file}.json"):
        if case["result"] != "valid":
            continue
        iv, aad, plaintext = H(case["iv"]), H(case["aad"]), H(case["msg"])
        built = cipher.build(name, Key(H(case["key"]) + iv[:salt_length]))
        sealed = H(case["ct"] + case["tag"])
        assert built.seal(b"", aad, iv[salt_length:], plaintext, b"") == aad + iv[salt_length:] + sealed, case["tcId"]
        if len(aad) in {8, 12}:
            packet = aad[:4] + aad[-4:] + iv[salt_length:] + sealed
            high = aad[4:8] if len(aad) == 12 else b""
            assert built.open(packet, 0, high) == plaintext
            opened += 1
            for wrong in (0, 8, len(packet) - 1):  # SPI, IV, tag
                flipped = bytearray(packet)
                flipped[wrong] ^= 1
                assert built.open(flipped, 0, high) is None
    assert opened >= 5


def test_wycheproof_refuses_every_altered_aead():
    """The cases whose tag or ciphertext was altered, with their own (empty or odd) associated data in ESP's place."""
    refused = 0
    for file, (name, salt_length) in WYCHEPROOF_AEAD.items():
        for case in load(f"wycheproof_{file}.json"):
            if case["result"] != "invalid":
                continue
            iv = H(case["iv"])
            built = cipher.build(name, Key(H(case["key"]) + iv[:salt_length]))
            aad = H(case["aad"])
            sealed = built.seal(b"", aad, iv[salt_length:], H(case["msg"]), b"")[len(aad) + 8 :]
            assert sealed != H(case["ct"] + case["tag"]), case["tcId"]
            refused += 1
    assert refused > 100


def test_wycheproof_aes_cbc():
    for case in load("wycheproof_aes_cbc_pkcs5.json"):
        if case["result"] != "valid":
            continue  # those are about PKCS #5 padding, which ESP does not use
        key, iv, message = H(case["key"]), H(case["iv"]), H(case["msg"])
        pad = 16 - len(message) % 16
        built = cipher.build("aes-cbc", Key(key), **NO_MAC)
        packet = bytes(8) + iv + H(case["ct"])
        assert built.seal(b"", bytes(8), random_block_for(key, iv), message + bytes((pad,)) * pad, b"") == packet
        assert built.open(packet, 0, b"") == message + bytes((pad,)) * pad
