# ruff: noqa: E101  # the tabs are iproute2's
import pytest

from ipsecq.numbers import Direction, Level, Mode, Protocol
from ipsecq.sa.association import Lifetime
from ipsecq.sa.validate import validate
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
    assert [policy.direction for policy in policies] == [Direction.OUT, Direction.IN, Direction.OUT]
    assert policies[0].selector.dport_first == 25
    (transform,) = policies[2].transforms
    assert (transform.level, transform.reqid) == (Level.UNIQUE, 5)


@pytest.mark.parametrize("text", ["", "\n"])
def test_nothing_gives_nothing(text):
    assert convert(text) == ([], 0)


@pytest.mark.parametrize("text", ["nonsense\n", "\tenc cbc(aes) 0x5ec7e7\n", "src 192.0.2.1 dst 192.0.2.2\n"])
def test_what_is_no_record_is_told_without_its_words(text):
    sentences, refused = convert(text)
    assert refused == 1
    assert sentences[0].endswith(": not understood")
    assert "5ec7e7" not in sentences[0]


def policy(selector="src 10.0.0.0/24 dst 10.1.0.0/24", way="out", *lines, rest=""):
    text = f"{selector} \n\tdir {way} priority 0 ptype main {rest}\n" + "".join(f"\t{line}\n" for line in lines)
    if "action" not in rest:
        text += "\ttmpl src 192.0.2.1 dst 192.0.2.2\n\t\tproto esp reqid 0 mode tunnel\n"
    return text


@pytest.mark.parametrize("part", [
    policy("src 10.0.0.0/24 dst 10.1.0.0/24 proto gre key 5"),
    policy("src 10.0.0.0/24 dst 10.1.0.0/24 dev lo"),
    policy("src 10.0.0.0/24 dst 10.1.0.0/24 uid 1000"),
    policy("src 10.0.0.0/24 dst 10.1.0.0/24 proto mobility-header type 5"),
    policy("src 10.0.0.0/24 dst 10.1.0.0/24", "out", "mark 0x5/0xff"),
    policy("src 10.0.0.0/24 dst 10.1.0.0/24", "out", "if_id 0x2a"),
    policy("src 10.0.0.0/24 dst 10.1.0.0/24", "out", "security context x"),
    policy(rest="flag icmp"),
    policy(rest="ptype sub"),
    policy().replace("reqid 0", "spi 0x00000100 reqid 0"),
    policy() + "\t\tlevel 7 \n",
    policy() + "\t\tenc-mask ffffffff auth-mask 00000001 comp-mask ffffffff\n",
    policy() + "\tlifetime config:\n\t  limit: soft (INF)(bytes), hard 1000(bytes)\n",
    policy().replace("mode tunnel", "mode beet"),
    policy(way="fwd", rest="action block"),
    policy(way="fwd", rest="action allow"),
])  # fmt: skip
def test_a_policy_of_which_a_part_would_get_lost_is_a_comment_and_no_wider_policy(part):
    sentences, refused = convert(part)
    assert refused == 1
    assert [line for line in sentences if not line.startswith("#")] == []


@pytest.mark.parametrize(("selector", "protocol", "sport", "dport"), [
    ("proto ipv6-icmp type 135", 58, (135, 135), (0, 65535)),
    ("proto ipv6-icmp type 135 code 0", 58, (135, 135), (0, 0)),
    ("proto ipv6-icmp type 0", 58, (0, 0), (0, 65535)),
    ("proto ipv6-icmp", 58, (0, 65535), (0, 65535)),
    ("proto tcp sport 5 dport 0", 6, (5, 5), (0, 0)),
    ("proto gre", 47, (0, 65535), (0, 65535)),
])  # fmt: skip
def test_ports_types_and_codes_of_a_selector_are_kept(selector, protocol, sport, dport):
    sentences, refused = convert(policy(f"src ::/0 dst ::/0 {selector}", rest="action allow"))
    assert refused == 0
    (command,) = parse("\n".join(sentences))
    kept = command.policy.selector
    assert (kept.protocol, (kept.sport_first, kept.sport_last), (kept.dport_first, kept.dport_last)) == (
        protocol, sport, dport
    )  # fmt: skip


@pytest.mark.parametrize(("inbound", "forward", "fits"), [
    (policy(way="in"), policy(way="fwd"), True),
    (policy(way="in").replace("reqid 0", "reqid 7"), policy(way="fwd"), True),
    (policy(way="in"), policy(way="fwd").replace("reqid 0", "reqid 7"), False),
    (policy(way="in", rest="action allow"), policy(way="fwd", rest="action block"), False),
    (policy(way="in"), policy(way="fwd").replace("priority 0", "priority 9"), False),
])  # fmt: skip
def test_a_fwd_policy_that_says_something_else_than_its_in_policy_is_a_comment(inbound, forward, fits):
    sentences, refused = convert(forward + inbound)
    assert refused == (not fits)
    assert len([line for line in sentences if " -P in " in line]) == 1


def test_of_one_priority_the_policy_that_was_added_first_and_listed_last_comes_first():
    nets = [f"src 10.0.0.0/24 dst 10.1.{number}.0/24" for number in range(3)]
    sentences, _ = convert("".join(policy(net) for net in nets))
    assert [line.split()[2] for line in sentences] == ["10.1.2.0/24[any]", "10.1.1.0/24[any]", "10.1.0.0/24[any]"]


def test_the_listing_with_statistics_says_the_same_and_its_limits_are_kept():
    text = """src 10.0.0.0/24 dst 10.8.1.0/24 proto icmp type 8 uid 0
	dir out action allow index 24 priority 7 ptype main share any flag localok (0x00000001)
	lifetime config:
	  limit: soft (INF)(bytes), hard (INF)(bytes)
	  limit: soft (INF)(packets), hard (INF)(packets)
	  expire add: soft 0(sec), hard 50(sec)
	  expire use: soft 0(sec), hard 0(sec)
	lifetime current:
	  0(bytes), 0(packets)
	  add 2026-11-26 11:09:17 use -
	tmpl src 192.0.2.1 dst 192.0.2.2
		proto esp spi 0x00000000(0) reqid 70000(0x00011170) mode tunnel
		level required share any
		enc-mask ffffffff auth-mask ffffffff comp-mask ffffffff
src 192.0.2.1 dst 192.0.2.2
	proto esp spi 0x00001000(4096) reqid 70000(0x00011170) mode tunnel
	replay-window 32 seq 0x00000000 flag af-unspec (0x00100000)
	auth-trunc hmac(sha256) 0x0001 (256 bits) 128
	enc cbc(aes) 0x0002 (128 bits)
	anti-replay context: seq 0x0, oseq 0x0, bitmap 0x00000000
	lifetime config:
	  limit: soft 5(bytes), hard 9(bytes)
	  limit: soft (INF)(packets), hard 8(packets)
	  expire add: soft 0(sec), hard 50(sec)
	  expire use: soft 0(sec), hard 0(sec)
	lifetime current:
	  0(bytes), 0(packets)
	  add 2026-11-26 11:09:17 use -
	stats:
	  replay-window 0 replay 0 failed 0
"""
    sentences, refused = convert(text)
    assert refused == 0
    sa, policy_ = (command.sa if isinstance(command, c.Add) else command.policy for command in parse("\n".join(sentences)))
    assert (sa.hard, sa.soft) == (Lifetime(allocations=8, bytes=9, addtime=50), Lifetime(bytes=5))
    assert (sa.spi, sa.reqid, sa.replay_window) == (0x1000, 70000, 32)
    assert (policy_.lifetime, policy_.transforms[0].reqid, policy_.selector.sport_first) == (50, 70000, 8)


def sa(*lines, protocol="esp", mode="tunnel", ends="src 192.0.2.1 dst 192.0.2.2"):
    head = f"{ends}\n\tproto {protocol} spi 0x00001000 reqid 0 mode {mode}\n\treplay-window 0 \n"
    return head + "".join(f"\t{line}\n" for line in lines)


ENC = "enc cbc(aes) 0x00"


@pytest.mark.parametrize("text", [
    sa(ENC, "mark 0x5/0xff"),
    sa(ENC, "if_id 0x2a"),
    sa(ENC, "output-mark 0x1"),
    sa(ENC, "coa 192.0.2.9"),
    sa(ENC, "encap type espinudp sport 4500 dport 4500 addr 10.0.0.1"),
    sa(ENC, "sel src 10.0.0.0/24 dst 10.1.0.0/24"),
    sa(ENC, "sel src 192.0.2.1/32 dst 192.0.2.2/32 proto tcp", mode="transport"),
    sa(ENC).replace("replay-window 0", "replay-window 0 flag noecn"),
    sa(ENC).replace("replay-window 0", "replay-window 0 seq 0x0 flag  extra_flag oseq-may-wrap"),
    sa("enc cbc(aes) <<Keys hidden>>"),
    sa("auth-trunc digest_null  0", protocol="ah"),
])  # fmt: skip
def test_an_sa_of_which_a_part_would_get_lost_is_a_comment(text):
    sentences, refused = convert(text)
    assert (refused, len(sentences)) == (1, 1)
    assert sentences[0].startswith("# src 192.0.2.1 dst 192.0.2.2: ")


@pytest.mark.parametrize(("name", "bits", "octets", "ours"), [
    *(("rfc4309(ccm(aes))", bits, 19, f"aes-ccm-{bits // 8}") for bits in (64, 96, 128)),
    ("rfc4543(gcm(aes))", 128, 20, "aes-gmac"),
])  # fmt: skip
def test_combined_algorithms_that_ipsecq_has_are_named(name, bits, octets, ours):
    sentences, refused = convert(sa(f"aead {name} 0x{'00' * octets} {bits}"))
    assert refused == 0
    (command,) = parse("\n".join(sentences))
    assert (command.sa.encryption, command.sa.encryption_key.bits) == (ours, octets * 8)
    validate(command.sa, allow_legacy=False)


@pytest.mark.parametrize(("line", "ours"), [
    (f"auth-trunc cmac(aes) 0x{'00' * 16} 96", "aes-cmac"),
    (f"auth-trunc hmac(md5) 0x{'00' * 16} 96", "hmac-md5"),
    ("auth-trunc digest_null  0", None),
    ("auth digest_null ", None),
])  # fmt: skip
def test_separate_authentication_is_named_and_digest_null_is_none(line, ours):
    sentences, refused = convert(sa(line, ENC))
    assert refused == 0
    (command,) = parse("\n".join(sentences))
    assert (command.sa.encryption, command.sa.authentication) == ("aes-cbc", ours)


@pytest.mark.parametrize(("ends", "flag", "align"), [
    ("src 192.0.2.1 dst 192.0.2.2", "", 8), ("src 192.0.2.1 dst 192.0.2.2", "flag align4", 0),
    ("src 2001:db8::1 dst 2001:db8::2", "", 0),
])  # fmt: skip
def test_ah_is_filled_up_as_the_kernel_did_it(ends, flag, align):
    line = f"auth-trunc hmac(sha256) 0x{'00' * 32} 128"
    text = sa(line, "dir in", protocol="ah", ends=ends).replace("replay-window 0", f"replay-window 0 {flag}")
    (command,) = parse("\n".join(convert(text)[0]))
    assert command.sa.ah_align == align
