"""What may enter the SAD."""

from dataclasses import replace

import pytest

from ipsecq.errors import AlgorithmError, SadError
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.sa.association import Lifetime, NatTraversal, SecurityAssociation
from ipsecq.sa.replay import MAX_REPLAY_WINDOW
from ipsecq.sa.validate import validate
from ipsecq.secret import Key

A, B = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
SECRET = Key(bytes(range(100, 120)))
ESP = SecurityAssociation(Protocol.ESP, 0x100, A, B, Mode.TUNNEL, encryption="aes-gcm-16", encryption_key=SECRET)
AH = SecurityAssociation(Protocol.AH, 0x100, A, B, authentication="hmac-sha2-256", authentication_key=Key(bytes(32)))
IPCOMP = SecurityAssociation(Protocol.IPCOMP, 0x100, A, B, compression="deflate")


@pytest.mark.parametrize("sa", [
    ESP, AH, IPCOMP, replace(IPCOMP, spi=2), replace(ESP, spi=0xFFFFFFFF),
    replace(ESP, esn=True, replay_window=MAX_REPLAY_WINDOW),
    replace(ESP, natt=NatTraversal(4500, 1024)),
    replace(ESP, src=bytes(15) + b"\1", dst=bytes(15) + b"\2", tfc_pad=1400),
    replace(ESP, soft=Lifetime(addtime=5), hard=Lifetime(addtime=6)),
    SecurityAssociation(Protocol.ESP, 0x100, A, B, state=SaState.LARVAL),
])  # fmt: skip
def test_sound_sas_are_taken(sa):
    validate(sa)


@pytest.mark.parametrize("sa", [
    replace(ESP, spi=0), replace(ESP, spi=1), replace(ESP, spi=255), replace(ESP, spi=1 << 32),
    replace(IPCOMP, spi=0), replace(IPCOMP, spi=64), replace(IPCOMP, spi=255), replace(IPCOMP, spi=0x10000),
    replace(IPCOMP, spi=3),
    replace(ESP, src=bytes(16)), replace(ESP, src=b"\1" * 5, dst=b"\1" * 5), replace(ESP, dst=bytes(4)),
    replace(ESP, replay_window=MAX_REPLAY_WINDOW + 1), replace(ESP, esn=True),
    replace(IPCOMP, replay_window=32), replace(AH, natt=NatTraversal()), replace(ESP, natt=NatTraversal(0, 4500)),
    replace(ESP, mode=Mode.TRANSPORT, tfc_pad=100), replace(AH, tfc_pad=100), replace(ESP, tfc_pad=65536),
    replace(ESP, soft=Lifetime(bytes=7), hard=Lifetime(bytes=6)), replace(ESP, reqid=1 << 32),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(sa):
    with pytest.raises(SadError):
        validate(sa)


@pytest.mark.parametrize("sa", [
    replace(AH, encryption="aes-cbc", encryption_key=Key(bytes(16))), replace(IPCOMP, compression=None),
    replace(ESP, compression="deflate"), replace(ESP, encryption=None), replace(ESP, encryption_key=Key(bytes(3))),
    replace(ESP, authentication="hmac-sha2-256", authentication_key=Key(bytes(32))),
    replace(ESP, encryption="null", encryption_key=Key(b"")),
])  # fmt: skip
def test_bad_algorithms_are_refused_and_no_key_is_shown(sa):
    with pytest.raises(AlgorithmError) as caught:
        validate(sa)
    assert SECRET.octets.hex() not in str(caught.value)


def test_legacy_algorithms_need_permission():
    old = replace(ESP, encryption="3des-cbc", encryption_key=Key(bytes(range(24))), authentication="hmac-sha1",
                  authentication_key=Key(bytes(20)))  # fmt: skip
    with pytest.raises(AlgorithmError, match="legacy"):
        validate(old)
    validate(old, allow_legacy=True)
