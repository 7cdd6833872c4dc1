# ruff: noqa: E101  # the tabs are iproute2's
import pytest

from ipsecq.numbers import Direction, Level, Mode, Protocol
from ipsecq.setkey import commands as c
from ipsecq.setkey.parser import parse
from ipsecq.setkey.xfrm import convert

STATE = """src 192.0.2.1 dst 192.0.2.2
	proto esp spi 0x00001000 reqid 5 mode tunnel
	replay-window 32 flag af-unspec
	auth-trunc hmac(sha256) 0x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f 128
	enc cbc(aes) 0x000102030405060708090a0b0c0d0e0f
	anti-replay context: seq 0x0, oseq 0x0, bitmap 0x00000000
	sel src 0.0.0.0/0 dst 0.0.0.0/0
src 192.0.2.2 dst 192.0.2.1
	proto esp spi 0x00001001 reqid 5(0x00000005) mode tunnel
	replay-window 0 flag esn
	aead rfc4106(gcm(aes)) 0x000102030405060708090a0b0c0d0e0f10111213 128
	encap type espinudp sport 4500 dport 4501 addr 0.0.0.0
	anti-replay esn context:
	 seq-hi 0x0, seq 0x0, oseq-hi 0x0, oseq 0x0
	 replay_window 128, bitmap-length 4
	 00000000 00000000 00000000 00000000
src 2001:db8::1 dst 2001:db8::2
	proto ah spi 0x00001002 reqid 0 mode transport
	replay-window 4
	auth-trunc hmac(sha1) 0x000102030405060708090a0b0c0d0e0f10111213 96
	sel src 2001:db8::1/128 dst 2001:db8::2/128
src 192.0.2.1 dst 192.0.2.9
	proto esp spi 0x00001003 reqid 0 mode beet
	enc cbc(aes) 0x00
"""
POLICY = """src 10.1.0.0/24 dst 10.2.0.0/24
	dir out priority 20 ptype main
	tmpl src 192.0.2.1 dst 192.0.2.2
		proto esp reqid 5 mode tunnel
src 10.2.0.0/24 dst 10.1.0.0/24
	dir fwd priority 20
	tmpl src 192.0.2.2 dst 192.0.2.1
		proto esp reqid 5 mode tunnel
src 10.2.0.0/24 dst 10.1.0.0/24
	dir in priority 20
	tmpl src 192.0.2.2 dst 192.0.2.1
		proto esp reqid 5 mode tunnel
src 10.1.0.0/24 dst 10.2.0.9/32 proto tcp dport 25
	dir out action block priority 10
src 0.0.0.0/0 dst 0.0.0.0/0
	socket in priority 0 ptype main
"""


def test_every_record_becomes_a_sentence_that_the_grammar_takes_or_a_comment_with_the_reason():
    sentences, refused = convert(STATE + POLICY)
    assert refused == 1
    assert [line for line in sentences if line.startswith("#")] == ["# src 192.0.2.1 dst 192.0.2.9: mode beet"]
    commands = parse("\n".join(sentences))
    sas = [command.sa for command in commands if isinstance(command, c.Add)]
    assert [(sa.spi, sa.mode, sa.reqid, sa.replay_window, sa.esn) for sa in sas] == [
        (0x1000, Mode.TUNNEL, 5, 32, False), (0x1001, Mode.TUNNEL, 5, 128, True), (0x1002, Mode.TRANSPORT, 0, 8, False),
    ]  # fmt: skip
    assert [(sa.encryption, sa.authentication) for sa in sas] == [
        ("aes-cbc", "hmac-sha2-256"), ("aes-gcm-16", None), (None, "hmac-sha1"),
    ]  # fmt: skip
    assert (sas[1].natt.sport, sas[1].natt.dport) == (4500, 4501)
    assert sas[2].protocol is Protocol.AH


def test_policies_keep_their_order_and_forward_policies_are_part_of_in():
    commands = parse("\n".join(convert(POLICY)[0]))
    policies = [command.policy for command in commands]
    assert [policy.direction for policy in policies] == [Direction.OUT, Direction.OUT, Direction.IN]
    assert policies[0].selector.dport_first == 25
    (transform,) = policies[1].transforms
    assert (transform.level, transform.reqid) == (Level.UNIQUE, 5)


@pytest.mark.parametrize("text", ["", "\n", "nonsense\n"])
def test_nothing_gives_nothing(text):
    assert convert(text) == ([], 0)
