"""The grammar of setkey(8)."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.errors import ConfigError
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.sa.association import Lifetime, NatTraversal
from ipsecq.setkey import commands as c
from ipsecq.setkey.parser import parse

A, B = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
ENDS = "10.0.0.1 10.0.0.2"
GCM = "-E aes-gcm-16 0x" + "ab" * 20

SAMPLE = """
# A KAME administrator's file.
flush ;
spdflush;

add 3ffe:501:4819::1 3ffe:501:481d::1 esp 123457
        -E aes-gcm-16 0x3ffe050148193ffe050148193ffe050148193ffe ;
add -6n 3ffe:501:4819::1 3ffe:501:481d::1 ah 123456 -A hmac-sha2-256 "AH SA configuration! 32 octets!!" ;
get 3ffe:501:4819::1 3ffe:501:481d::1 ah 123456 ;
dump esp ;
spdadd 10.0.11.41/32[21] 10.0.11.33/32[any] any
        -P out ipsec esp/tunnel/192.168.0.1-192.168.1.2/require ;   # comments; anywhere
spdadd ::/0 ::/0 icmp6 135,0 -P in none;
"""


def one(text: str) -> c.Command:
    (command,) = parse(text)
    return command


def sa(text: str):
    command = one(text)
    assert isinstance(command, c.Add)
    return command.sa


def policy(text: str):
    command = one(text)
    assert isinstance(command, c.SpdAdd)
    return command.policy


def test_the_examples_of_the_manual_load_as_they_are():
    commands = parse(SAMPLE, "ipsec.conf")
    assert [(type(command).__name__, command.line) for command in commands] == [
        ("Flush", 3), ("SpdFlush", 4), ("Add", 6), ("Add", 8), ("Get", 9), ("Dump", 10), ("SpdAdd", 11), ("SpdAdd", 13),
    ]  # fmt: skip
    assert commands[2].sa.encryption_key.octets == bytes.fromhex("3ffe050148193ffe050148193ffe050148193ffe")
    assert commands[3].sa.authentication_key.octets == b"AH SA configuration! 32 octets!!"
    assert commands[3].sa.label == "ipsec.conf:8"
    tunnel = commands[6].policy
    assert (tunnel.direction, tunnel.action) == (Direction.OUT, Action.IPSEC)
    assert (tunnel.selector.sport_first, tunnel.selector.sport_last, tunnel.selector.dport_last) == (21, 21, 65535)
    assert tunnel.transforms[0].level is Level.REQUIRE
    solicitation = commands[7].policy.selector
    assert (solicitation.protocol, solicitation.sport_first, solicitation.sport_last) == (58, 135, 135)
    assert (solicitation.dport_first, solicitation.dport_last) == (0, 65535)  # code 0 is any, as in the kernels


def test_every_extension_of_add():
    got = sa(f"add {ENDS} esp 0x1000 -m tunnel -r 32 -u 77 -f random-pad -f nocyclic-seq -lh 3600 -ls 3000 -bh 1000 "
             f"-bs 900 -uh 8 -us 7 -ah 6 -as 5 -esn -tfc 1400 {GCM} ;")  # fmt: skip
    assert (got.spi, got.mode, got.replay_window, got.reqid, got.esn, got.tfc_pad) == (
        0x1000, Mode.TUNNEL, 256, 77, True, 1400)  # fmt: skip
    assert got.hard == Lifetime(6, 1000, 3600, 8)
    assert got.soft == Lifetime(5, 900, 3000, 7)
    assert got.flags == c.SADB_X_EXT_PRAND


@pytest.mark.parametrize(("text", "protocol", "names"), [
    (f"esp 300 {GCM}", Protocol.ESP, ("aes-gcm-16", None, None)),
    ("esp 300 -E rijndael-cbc 0x" + "00" * 16 + " -A hmac-sha256 0x" + "00" * 32, Protocol.ESP,
     ("aes-cbc", "hmac-sha2-256", None)),
    ("esp 300 -E null -A hmac-sha1 0x" + "00" * 20, Protocol.ESP, ("null", "hmac-sha1", None)),
    ("esp 300 -E aes-ctr 0x" + "00" * 20 + " -A null", Protocol.ESP, ("aes-ctr", None, None)),
    ("ah 300 -A aes-xcbc-mac 0x" + "00" * 16, Protocol.AH, (None, "aes-xcbc-mac", None)),
    ("ipcomp 300 -C deflate", Protocol.IPCOMP, (None, None, "deflate")),
])  # fmt: skip
def test_algorithms_by_every_name_of_the_family(text, protocol, names):
    got = sa(f"add {ENDS} {text} ;")
    assert got.protocol is protocol
    assert (got.encryption, got.authentication, got.compression) == names


def test_keys_are_text_or_hexadecimal_digits_also_an_odd_number_of_them():
    assert sa(f'add {ENDS} esp 300 -E aes-cbc "16 octets, ; # !" ;').encryption_key.octets == b"16 octets, ; # !"
    assert sa(f"add {ENDS} esp 300 -E aes-cbc 0x123 ;").encryption_key.octets == b"\x01\x23"
    raw = bytes(range(128, 160))
    text = f'add {ENDS} ah 300 -A hmac-sha2-256 "'.encode() + raw + b'" ;'
    assert sa(text.decode("utf-8", "surrogateescape")).authentication_key.octets == raw


def test_nat_traversal_in_both_dialects():
    ipsec_tools = f"add 10.0.0.1[4500] 10.0.0.2[1024] esp-udp 192.168.1.1 300 {GCM} ;"
    assert sa(ipsec_tools).natt == NatTraversal(4500, 1024, bytes([192, 168, 1, 1]), None)
    freebsd = f"add {ENDS} esp 300 -natt 192.168.1.1[4500] 10.9.9.9[1024] -natt_mtu 1400 {GCM} ;"
    assert sa(freebsd).natt == NatTraversal(4500, 1024, bytes([192, 168, 1, 1]), bytes([10, 9, 9, 9]))
    assert sa(f"add {ENDS} esp-udp 300 -rebind {GCM} ;").natt == NatTraversal(rebind=True)
    assert sa(f"add {ENDS} esp 300 {GCM} ;").natt is None


def test_commands_about_one_or_many_sas():
    assert one(f"delete {ENDS} esp 0x100 -m tunnel;") == c.Delete(A, B, Protocol.ESP, 256, line=1, column=1)
    assert one(f"get -4 {ENDS} ipcomp 300 ;") == c.Get(A, B, Protocol.IPCOMP, 300, line=1, column=1)
    assert one(f"deleteall {ENDS} ah;") == c.DeleteAll(A, B, Protocol.AH, line=1, column=1)
    assert one(f"deleteall {ENDS};") == c.DeleteAll(A, B, None, line=1, column=1)
    assert one("flush ah;") == c.Flush(Protocol.AH, line=1, column=1)
    assert one("dump;") == c.Dump(None, line=1, column=1)


def test_selectors_in_every_form():
    got = policy("spdadd 10.0.0.0/8[1000-2000] 192.168.0.5-192.168.0.9 udp -P in discard;").selector
    assert (got.src_first, got.src_last) == (bytes([10, 0, 0, 0]), bytes([10, 255, 255, 255]))
    assert (got.dst_first, got.dst_last) == (bytes([192, 168, 0, 5]), bytes([192, 168, 0, 9]))
    assert (got.sport_first, got.sport_last, got.protocol) == (1000, 2000, 17)
    assert policy("spdadd 10.0.0.9/8 10.0.0.1 tcp -P in none;").selector.src_first == bytes([10, 0, 0, 0])
    assert policy("spdadd any 10.0.0.1 any -P in none;").selector.src_last == b"\xff" * 4
    assert policy("spdadd any 2001:db8::1 any -P in none;").selector.src_first == bytes(16)
    assert policy("spdadd 10.0.0.1[0] 10.0.0.2[any] 47 -P in none;").selector.has_ports is False
    assert policy("spdadd 10.0.0.1[ssh] 10.0.0.2 tcp -P in none;").selector.sport_first == 22
    icmp = policy("spdadd 10.0.0.1 10.0.0.2 icmp 3,1-4 -P in none;").selector
    assert (icmp.sport_first, icmp.sport_last, icmp.dport_first, icmp.dport_last) == (3, 3, 1, 4)
    zero = policy("spdadd 10.0.0.1 10.0.0.2 icmp 0-0,0 -P in none;").selector
    assert (zero.sport_first, zero.sport_last, zero.dport_last) == (0, 0, 65535)


def test_any_on_both_sides_means_both_families_unless_an_option_says_which():
    both = parse("spdadd any any any -P in discard;")
    assert [command.policy.selector.family for command in both] == [4, 6]
    assert policy("spdadd -6 any any any -P in discard;").selector.family == 6
    assert len(parse("spddelete any any any -P in;")) == 2


def test_policies_span_lines_and_comments_do_not_end_them():
    got = policy("spdadd 10.0.0.1 10.0.0.2 any -P out prio high + 3 ipsec # one; two\n esp/transport//use\n"
                 "\tah/transport//unique:5 ;")  # fmt: skip
    assert [(rule.protocol, rule.level, rule.reqid) for rule in got.transforms] == [
        (Protocol.ESP, Level.USE, 0), (Protocol.AH, Level.UNIQUE, 5)]  # fmt: skip
    assert got.priority < 0


def test_own_options_of_policies():
    got = policy("spdadd 10.0.0.1 10.0.0.2 any -lh 60 -fail_open -P out none;")
    assert (got.lifetime, got.fail_open) == (60, True)
    assert policy("spdadd 10.0.0.1 10.0.0.2 any -P out none;").fail_open is False


def test_spddelete_needs_a_direction_only():
    command = one("spddelete 10.0.0.0/8 10.0.0.1 tcp -P out;")
    assert isinstance(command, c.SpdDelete)
    assert command.direction is Direction.OUT
    assert one("spddelete 10.0.0.0/8 10.0.0.1 tcp -P out ipsec esp/transport//use;") == command


def test_nothing_after_exit_is_read():
    assert [type(command) for command in parse("flush; exit; this is not setkey")] == [c.Flush, c.Exit]


@pytest.mark.parametrize(("text", "place", "part"), [
    ("flush", "1:6", "expected a protocol"),
    ("flush;\nfluhs;", "2:1", "expected a command"),
    ("add host.example 10.0.0.2 esp 300;", "1:5", "names are not resolved"),
    ("add 10.0.0.1 ::1 esp 300;", "1:14", "one family"),
    ("add -6 10.0.0.1 10.0.0.2 esp 300;", "1:8", "IPv6 address"),
    (f"add {ENDS} esp-old 300;", "1:23", "RFC 1827"),
    (f"add {ENDS} ah-old 300;", "1:23", "RFC 1826"),
    (f"add {ENDS} tcp 300;", "1:23", "TCP-MD5"),
    (f"add {ENDS} esp 0x100000000 {GCM};", "1:27", "SPI"),
    (f"add {ENDS} esp x {GCM};", "1:27", "SPI"),
    (f"add {ENDS} esp 300;", "1:30", "an algorithm"),
    (f"add {ENDS} esp 300 -m foo {GCM};", "1:34", "mode"),
    (f"add {ENDS} esp 300 -r 16385 {GCM};", "1:34", "16384"),
    (f"add {ENDS} esp 300 -z 1 {GCM};", "1:31", "an extension"),
    (f"add {ENDS} esp 300 -E des-cbc 0x0011223344556677;", "1:34", "unknown encryption algorithm"),
    (f'add {ENDS} esp 300 -ctx 1 1 "x" {GCM};', "1:31", "security contexts"),
    (f"add 10.0.0.1[500] 10.0.0.2[500] esp 300 {GCM};", "1:37", "only esp-udp"),
    (f"add {ENDS} ah 300 -natt 1.1.1.1[1] 2.2.2.2[2] -A hmac-sha1 0x00;", "1:30", "esp only"),
    ("spdadd 10.0.0.0/33 10.0.0.1 any -P in none;", "1:17", "prefix length"),
    ("spdadd 10.0.0.9-10.0.0.1 10.0.0.1 any -P in none;", "1:8", "lower address first"),
    ("spdadd 10.0.0.1 ::1 any -P in none;", "1:17", "one family"),
    ("spdadd 10.0.0.1[70000] 10.0.0.1 tcp -P in none;", "1:17", "65535"),
    ("spdadd 10.0.0.1[22] 10.0.0.1 icmp -P in none;", "1:8", "TYPE,CODE"),
    ("spdadd 10.0.0.1 10.0.0.1 tcp 1,2 -P in none;", "1:30", "only icmp"),
    ("spdadd 10.0.0.1 10.0.0.1 nosuch -P in none;", "1:26", "upper-layer"),
    ("spdadd 10.0.0.1 10.0.0.1 any in none;", "1:30", "-P"),
    ("spdadd 10.0.0.1 10.0.0.1 any -P in;", "1:35", "an action"),
    ("spdadd 10.0.0.1 10.0.0.1 any -P in bypass;", "1:30", "use none"),
    ("spdadd 10.0.0.1 10.0.0.1 any\n -P out ipsec\n  esp/transport//\n  ah/transprt//use;", "4:6", "mode"),
    ('spdadd tagged "x" -P in none;', "1:8", "tagged"),
    (f"getspi {ENDS} esp 300;", "1:1", "getspi"),
    ("flush ^;", "1:7", "found '^'"),
    (f'add {ENDS} esp 300 -E aes-cbc "open', "1:42", "closing"),
])  # fmt: skip
def test_errors_name_file_line_column_and_what_was_expected(text, place, part):
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.conf")
    assert str(caught.value).startswith(f"f.conf:{place}: ")
    assert part in str(caught.value)


SECRET = "deadbeefcafe0123456789abcdef"


@pytest.mark.parametrize("text", [
    f"add {ENDS} esp 300 -E aes-cbc {SECRET} ;",
    f"add {ENDS} esp 300 -E {SECRET} aes-cbc ;",
    f"add {ENDS} esp 300 -E 0x{SECRET} ;",
    f'add {ENDS} esp 300 -E "{SECRET}" ;',
    f"add {ENDS} esp 300 -E aes-cbc 0x{SECRET}zz ;",
    f'add {ENDS} esp 300 -E aes-cbc "a"{SECRET}" ;',
    f"add {ENDS} esp 300 -E aes-cbc 0x00 -A {SECRET} ;",
    f"add {ENDS} esp 300 -E aes-cbc 0x00 {SECRET} ;",
    f"add {ENDS} esp 300 -E aes-cbc 0x00 -{SECRET} ;",
    f'add {ENDS} esp 300 -E aes-cbc "{SECRET} ;',
    f"add {ENDS} esp 300 -E aes-cbc 0x{SECRET} esp ;",
    f"add {ENDS} esp 0x{SECRET} -E aes-cbc 0x00 ;",
    f"add {ENDS} esp {SECRET} -E aes-cbc 0x00 ;",
    f"add {ENDS} esp 300 -r 0x{SECRET} ;",
    f"add {ENDS} esp 300 -E aes-cbc 0x00 -r 0x{SECRET} ;",
    f"add {ENDS} esp 300 -m {SECRET} ;",
    f"add {ENDS} esp 300 -m tunnel {SECRET} ;",
    f"add {ENDS} esp 300 -f {SECRET} ;",
    f"add {ENDS} esp 300 -z{SECRET} ;",
    f"add {SECRET} 10.0.0.1 esp 300 ;",
    f"add {ENDS} esp 300 -E aes-cbc 0x00 ; {SECRET} ;",
    f"spdadd 10.0.0.1 10.0.0.2 {SECRET} -P in none ;",
    f"spdadd 10.0.0.1 10.0.0.2 any -P out {SECRET} ;",
    f"spdadd 10.0.0.1 10.0.0.2 any -P out ipsec 0x{SECRET} ;",
    f"spdadd 10.0.0.1 10.0.0.2 any -P out ipsec esp/transport//unique:{SECRET} ;",
])  # fmt: skip
def test_a_key_is_in_no_error_wherever_it_was_written(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert SECRET[:8] not in str(caught.value)
    assert str(int(SECRET, 16)) not in str(caught.value)


@pytest.mark.parametrize(("text", "found"), [
    ("flush;\nfluhs;", "'fluhs'"),
    ("add host.example 10.0.0.2 esp 300;", "'host.example'"),
    ("add 2001:db8:1111:2222:3333:4444:5555:66666 ::1 esp 300;", "a word of 39 characters"),
    ("add 2001:db8:1111:2222:3333:4444:5555:g ::1 esp 300;", "a word of 35 characters"),
    ("add 192.168.100.300 10.0.0.2 esp 300;", "'192.168.100.300'"),
    ("spdadd 192.168.100.1-192.168.100.300 10.0.0.2 any -P in none;", "'192.168.100.300'"),
    (f"add {ENDS} esp 4294967296 {GCM};", "'4294967296'"),
    (f"add {ENDS} esp 300 {GCM} spdadd any any any -P in none;", "'spdadd'"),
    (f"add {ENDS} esp 300 {GCM} -P in none;", "'-P'"),
    (f"add {ENDS} esp 300 {GCM} ; spddadd any any any -P in none;", "'spddadd'"),
    (f'add {ENDS} esp 300 -E aes-cbc "one ; two" ; spddadd any any any -P in none;', "a word of 7 characters"),
])  # fmt: skip
def test_what_is_no_key_is_shown_as_it_was_found(text, found):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).endswith(f"found {found}")


@pytest.mark.parametrize("text", [
    "add 10.0.0.1 10.0.0.2 esp {} ;",
    "add 10.0.0.1 10.0.0.2 esp 300 -bh {} ;",
    "spdadd 10.0.0.1[{}] 10.0.0.2 any -P in none ;",
    "spdadd 10.0.0.1 10.0.0.2 {} -P in none ;",
    "spdadd 10.0.0.1 10.0.0.2 icmp {},0 -P in none ;",
    "spdadd 10.0.0.1 10.0.0.2 any -P in prio {} none ;",
    "spdadd 10.0.0.1 10.0.0.2 any -P in ipsec esp/transport//unique:{} ;",
])  # fmt: skip
def test_a_number_of_thousands_of_digits_is_too_large_like_any_other(text):
    for digits in ("9" * 30, "9" * 5000):
        with pytest.raises(ConfigError, match="expected"):
            parse(text.format(digits))


HEX_KEYS = ("deadbeefcafe0123456789abcdeffedcba98765432", "00112233445566778899AABBCCDDEEFF01020304", "1" * 32, "29" * 16)
TEXT_KEYS = ("horses stay; batteries\n go", "; staple # correct", "unspoken-password", "bright/sandal[9] x")
FULL = [
    f'add {ENDS} esp 0x1001 -m tunnel -E aes-gcm-16 0x{HEX_KEYS[0]} -r 64 ;',
    f'add {ENDS} esp 0x1002 -r 32 -E aes-cbc 0x{HEX_KEYS[2]} -A hmac-sha1 0x{HEX_KEYS[1]} -u 7 ;',
    f'add {ENDS} esp 0x1003 -E aes-cbc "{TEXT_KEYS[0]}" -A hmac-sha1 "{TEXT_KEYS[1]}" -lh 3600 ;',
    f'add {ENDS} esp-udp 192.0.2.1 0x1004 -E aes-cbc "{TEXT_KEYS[2]}" -A hmac-sha1 0x{HEX_KEYS[3]} ;',
    f'add {ENDS} ah 0x1005 -A hmac-sha1 "{TEXT_KEYS[3]}" ;',
    "spdadd 10.1.0.0/16[80] 10.2.0.0/16 tcp -P out ipsec esp/tunnel/10.0.0.1-10.0.0.2/require ;",
    f"spdadd any any icmp 8,0 -lh 60 -P in none ; deleteall {ENDS} ; flush esp ;",
]  # fmt: skip
TOKENS = re.compile(r'"[^"]*"|[\w.:,-]+|\s+|.', re.DOTALL)
ELEVEN_DIGITS = re.compile(r"[0-9a-f]{11}")
PIECES = sorted({piece for key in TEXT_KEYS for piece in re.findall(r"\w{5,}", key)})


@st.composite
def damaged(draw):
    """A file with keys of every form, some of its pieces lost, doubled or in each other's place; then, perhaps, its end."""
    text = "\n".join(draw(st.lists(st.sampled_from(FULL), min_size=1, max_size=4)))
    # Words within quotes, quotes and single characters can be lost, too; they do not go elsewhere by themselves.
    form = draw(st.sampled_from([TOKENS, TOKENS, re.compile(r"[\w.:,-]+|\s+|.", re.DOTALL), re.compile(".", re.DOTALL)]))
    parts = form.findall(text)
    kinds = ["delete", "blank", "0x"] + ["double", "swap", "move"] * (form is TOKENS)
    for _ in range(draw(st.integers(1, 3))):
        at, other = (draw(st.integers(0, len(parts) - 1)) for _ in range(2))
        match draw(st.sampled_from(kinds)):
            case "delete":
                parts[at] = ""
            case "blank":
                parts[at] = " "
            case "double":
                parts.insert(other, parts[at])
            case "swap":
                parts[at], parts[other] = parts[other], parts[at]
            case "move":
                parts.insert(other, parts.pop(at))
            case _:
                parts = [part.removeprefix("0x") for part in parts]
    return "".join(parts[: draw(st.integers(len(parts) // 2, len(parts)))])


@given(damaged())
@settings(max_examples=600)
def test_no_damage_to_a_file_brings_its_keys_into_an_error(text):
    try:
        parse(text, "setkey.conf")
    except ConfigError as error:
        message = str(error).lower()
        assert ELEVEN_DIGITS.search(message) is None
        assert not [key for key in HEX_KEYS if str(int(key, 16))[:11] in message]
        assert not [piece for piece in PIECES if piece.lower() in message]


words = st.sampled_from(
    [*SAMPLE.split(), "[", "]", "/", ";", "-P", '"', "#", "\n", "-E", "-A", "0x", "::1", "10.0.0.1-10.0.0.3", "any"]
)


@given(st.lists(words, max_size=25).map(" ".join) | st.text(max_size=60))
def test_nonsense_is_a_config_error_with_a_place_and_nothing_else(text):
    line = column = 1
    try:
        parse(text, "f")
    except ConfigError as error:
        line, column = error.line, error.column
    lines = text.split("\n")
    assert 1 <= line <= len(lines)
    assert 1 <= column <= len(lines[line - 1]) + 1
