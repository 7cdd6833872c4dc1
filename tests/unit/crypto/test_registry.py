"""The algorithm table and the combinations that may make an SA."""

import pytest

from ipsecq.crypto import registry
from ipsecq.errors import AlgorithmError
from ipsecq.numbers import Protocol
from ipsecq.secret import Key

NONE = Key(b"")


def key(bits):
    return Key(bytes(range(bits // 8)))


def check(protocol, enc=None, enc_bits=0, auth=None, auth_bits=0, **options):
    registry.check_combination(protocol, enc, key(enc_bits), auth, key(auth_bits), **options)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("rijndael-cbc", "aes-cbc"), ("AES-GCM", "aes-gcm-16"), ("null-aes-gmac", "aes-gmac"), ("aes-ccm", "aes-ccm-16")],
)
def test_encryption_names_are_those_of_setkey_in_any_case(alias, name):
    assert registry.encryption(alias).name == name


def test_no_name_or_number_means_two_algorithms():
    for dialect in ("linux", "freebsd"):
        numbers = [row.number(dialect) for row in registry.ENCRYPTION.values() if row.number(dialect) is not None]
        assert len(numbers) == len(set(numbers))
        for row in registry.ENCRYPTION.values():
            if row.number(dialect) is not None:
                assert registry.encryption_by_number(row.number(dialect), dialect) is row
        for row in registry.AUTHENTICATION.values():
            for bits in row.key_bits:
                assert registry.authentication_by_number(row.number(dialect, bits), dialect) is row


def test_number_15_is_chacha_for_freebsd_and_ccm_for_linux():
    assert registry.encryption_by_number(15, "freebsd").name == "chacha20-poly1305"
    assert registry.encryption_by_number(15, "linux").name == "aes-ccm-12"


def test_aes_gmac_of_ah_has_a_number_for_each_key_length():
    row = registry.authentication("aes-256-gmac")
    assert [row.number("freebsd", bits) for bits in (160, 224, 288)] == [11, 12, 13]


@pytest.mark.parametrize("number", [0, registry.SADB_X_AALG_NULL])
def test_null_authentication_is_none(number):
    assert registry.authentication_by_number(number) is None


@pytest.mark.parametrize("look_up", [registry.encryption, registry.authentication, registry.compression])
def test_an_unknown_name_is_refused_with_the_names_that_exist(look_up):
    with pytest.raises(AlgorithmError, match=r"'blowfish-cbc'.*use one of"):
        look_up("blowfish-cbc")


@pytest.mark.parametrize("number", [99, 250])
def test_an_unknown_number_is_refused(number):
    with pytest.raises(AlgorithmError, match=str(number)):
        registry.encryption_by_number(number, "freebsd")
    with pytest.raises(AlgorithmError, match=str(number)):
        registry.authentication_by_number(number)
    with pytest.raises(AlgorithmError, match=str(number)):
        registry.compression_by_number(number)


def test_every_aead_stands_alone_with_each_of_its_key_lengths():
    for row in registry.ENCRYPTION.values():
        for bits in row.key_bits if row.aead else ():
            check(Protocol.ESP, row.name, bits)


def test_every_separate_pair_is_allowed():
    for enc in registry.ENCRYPTION.values():
        if enc.aead:
            continue
        for auth in registry.AUTHENTICATION.values():
            if auth.name == "aes-gmac" and enc.name != "null":
                continue
            key_octets = Key(bytes(range(enc.key_bits[0] // 8)))
            registry.check_combination(
                Protocol.ESP, enc.name, key_octets, auth.name, key(auth.key_bits[0]), allow_legacy=True
            )


def test_ah_takes_every_authentication():
    for row in registry.AUTHENTICATION.values():
        for bits in row.key_bits:
            check(Protocol.AH, auth=row.name, auth_bits=bits, allow_legacy=True)


REFUSED = [
    ("esp without anything", (Protocol.ESP,), "needs an encryption algorithm"),
    ("null alone", (Protocol.ESP, "null"), "protects nothing"),
    ("cbc alone", (Protocol.ESP, "aes-cbc", 128), "without authentication"),
    ("ctr alone", (Protocol.ESP, "aes-ctr", 160), "without authentication"),
    ("aead and mac", (Protocol.ESP, "aes-gcm-16", 160, "hmac-sha1", 160), "authenticates by itself"),
    ("cbc and gmac", (Protocol.ESP, "aes-cbc", 128, "aes-gmac", 160), "null encryption only"),
    ("gcm without salt", (Protocol.ESP, "aes-gcm-16", 128), "160, 224 or 288 bits, the last 32 of them salt"),
    ("ccm with four octets", (Protocol.ESP, "aes-ccm-16", 160), "152, 216 or 280 bits"),
    ("gmac", (Protocol.ESP, "aes-gmac", 256), "160, 224 or 288"),
    ("chacha without salt", (Protocol.ESP, "chacha20-poly1305", 256), "must be 288 bits"),
    ("short hmac key", (Protocol.AH, None, 0, "hmac-sha2-256", 160), "must be 256 bits"),
    ("long hmac key", (Protocol.AH, None, 0, "hmac-sha1", 256), "must be 160 bits"),
    ("null with key", (Protocol.ESP, "null", 64, "hmac-sha1", 160), "must be 0 bits"),
    ("3des", (Protocol.ESP, "3des-cbc", 192, "hmac-sha1", 160), "allow_legacy"),
    ("md5", (Protocol.AH, None, 0, "hmac-md5", 128), "allow_legacy"),
    ("ah with cipher", (Protocol.AH, "aes-cbc", 128, "hmac-sha1", 160), "ah does not encrypt"),
    ("ah alone", (Protocol.AH,), "needs an authentication algorithm"),
    ("ipcomp with keys", (Protocol.IPCOMP, "aes-cbc", 128), "compression algorithm only"),
]


@pytest.mark.parametrize(("arguments", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_weak_and_incomplete_combinations_are_refused_with_the_reason(arguments, reason):
    with pytest.raises(AlgorithmError, match=reason):
        check(*arguments)


def test_3des_with_two_keys_is_refused():
    two = Key(bytes(range(8)) + bytes(range(8, 16)) + bytes(range(8)))
    with pytest.raises(AlgorithmError, match="equal parts"):
        registry.check_combination(Protocol.ESP, "3des-cbc", two, "hmac-sha1", key(160), allow_legacy=True)


def test_a_capture_may_be_read_without_its_authentication_key():
    check(Protocol.ESP, "aes-cbc", 128, "hmac-sha1", 0, allow_unauthenticated=True)
    check(Protocol.ESP, "aes-cbc", 128, allow_unauthenticated=True)
    with pytest.raises(AlgorithmError, match="hmac-sha1 key of 64 bits"):
        check(Protocol.ESP, "aes-cbc", 128, "hmac-sha1", 64, allow_unauthenticated=True)


def test_no_message_holds_key_octets():
    secret = Key(b"\xde\xad\xbe\xef" * 3)
    with pytest.raises(AlgorithmError) as caught:
        registry.check_combination(Protocol.ESP, "aes-gcm-16", secret, None, NONE)
    assert "dead" not in str(caught.value).lower()
    assert "\\xde" not in str(caught.value)
