"""Published vectors of the authentication algorithms: RFC 2202, 4231, 3566, 4493, 4494 and Project Wycheproof."""

import json
from pathlib import Path

import pytest

from ipsecq.crypto import cipher, registry
from ipsecq.crypto.mac import build_mac
from ipsecq.secret import Key

DATA = Path(__file__).parent / "data"
H = bytes.fromhex


def load(name):
    return json.loads((DATA / name).read_text())


def mac(name, key, *parts):
    context = build_mac(name, key).copy()
    for part in parts:
        context.update(part)
    return context.finalize()


@pytest.mark.parametrize("case", load("rfc_hmac.json"), ids=lambda case: f"{case['source']}-{case['algorithm']}")
def test_hmac_of_rfc_2202_and_4231(case):
    expected = H(case["mac"])
    assert mac(case["algorithm"], H(case["key"]), H(case["msg"]))[: len(expected)] == expected


XCBC = (  # RFC 3566 section 4.6: octets 0, 1, 2 … of the message, except the last, which is 1000 zeros
    (bytes(0), "75f0251d528ac01c4573dfd584d79f29"),
    (bytes(range(3)), "5b376580ae2f19afe7219ceef172756f"),
    (bytes(range(16)), "d2a246fa349b68a79998a4394ff7a263"),
    (bytes(range(20)), "47f51b4564966215b8985c63055ed308"),
    (bytes(range(32)), "f54f0ec8d2b9f3d36807734bd5283fd4"),
    (bytes(range(34)), "becbb3bccdb518a30677d5481fb6b4d8"),
    (bytes(1000), "f0dafee895db30253761103b5d84528f"),
)


@pytest.mark.parametrize(("message", "code"), XCBC, ids=lambda value: str(len(value)))
def test_aes_xcbc_of_rfc_3566(message, code):
    key = bytes(range(16))
    assert mac("aes-xcbc-mac", key, message).hex() == code
    assert mac("aes-xcbc-mac", key, message[:5], memoryview(message)[5:]).hex() == code
    assert cipher.icv("aes-xcbc-mac", Key(key)).compute((message,)).hex() == code[:24]


CMAC_MESSAGE = H(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52ef"
    "f69f2445df4f9b17ad2b417be66c3710"
)
CMAC = (  # RFC 4493 section 4; the first 12 octets are RFC 4494's
    (0, "bb1d6929e95937287fa37d129b756746"),
    (16, "070a16b46b4d4144f79bdd9dd04a287c"),
    (40, "dfa66747de9ae63030ca32611497c827"),
    (64, "51f0bebf7e3b9d92fc49741779363cfe"),
)


@pytest.mark.parametrize(("length", "code"), CMAC)
def test_aes_cmac_of_rfc_4493_and_4494(length, code):
    key = H("2b7e151628aed2a6abf7158809cf4f3c")
    message = CMAC_MESSAGE[:length]
    assert mac("aes-cmac", key, message).hex() == code
    assert cipher.icv("aes-cmac", Key(key)).compute((message,)).hex() == code[:24]


WYCHEPROOF = {
    "hmac_sha1": "hmac-sha1",
    "hmac_sha256": "hmac-sha2-256",
    "hmac_sha384": "hmac-sha2-384",
    "hmac_sha512": "hmac-sha2-512",
    "aes_cmac": "aes-cmac",
}


@pytest.mark.parametrize(("file", "name"), WYCHEPROOF.items())
def test_wycheproof_macs_accept_the_valid_and_refuse_the_rest(file, name):
    length = registry.authentication(name).icv_length
    refused = 0
    for case in load(f"wycheproof_{file}.json"):
        tag = H(case["tag"])
        if case["result"] == "invalid" and mac(name, H(case["key"]), H(case["msg"]))[:length] == tag[:length]:
            continue  # wrong only in octets that do not travel
        verdict = cipher.icv(name, Key(H(case["key"]))).verify((H(case["msg"]),), tag[:length])
        assert verdict == (case["result"] == "valid"), case["tcId"]
        refused += not verdict
    assert refused > 10


def test_wycheproof_gmac_accepts_the_valid_and_refuses_the_rest():
    cases = load("wycheproof_aes_gmac.json")
    for case in cases:
        iv = H(case["iv"])
        function = cipher.icv("aes-gmac", Key(H(case["key"]) + iv[:4]))
        verdict = function.verify((H(case["msg"]),), iv[4:] + H(case["tag"]))
        assert verdict == (case["result"] == "valid"), case["tcId"]
    assert {case["result"] for case in cases} == {"valid", "invalid"}
