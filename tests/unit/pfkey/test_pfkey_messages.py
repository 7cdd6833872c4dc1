import contextlib
import errno
import struct
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.pfkey import messages
from ipsecq.pfkey.constants import Dialect, Ext, MessageType
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import (
    Address,
    Algorithm,
    Combination,
    Identity,
    KeyExt,
    LifetimeExt,
    Proposal,
    Sa,
    Sensitivity,
    SpiRange,
    Supported,
)
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.policyext import PolicyExt, Request
from ipsecq.pfkey.xextensions import Filter, KmAddress, NatFragment, NatPort, NatType, Number, Sa2, SecurityContext
from ipsecq.secret import Key

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
v4 = st.binary(min_size=4, max_size=4)
v6 = st.binary(min_size=16, max_size=16)
either = v4 | v6
lifetimes = st.builds(LifetimeExt, u32, u64, u64, u64)
addresses = either.flatmap(lambda a: st.builds(Address, st.just(a), st.integers(0, len(a) * 8), u8, u16))
keys = st.builds(KeyExt, st.builds(Key, st.binary(max_size=64)))
names = st.binary(max_size=20).filter(lambda name: b"\0" not in name)
pairs = st.one_of(st.tuples(v4, v4), st.tuples(v6, v6))
ends = st.none() | pairs
requests = st.builds(
    lambda p, m, lv, r, e: Request(p, m, lv, r, *(e or (None, None))), u16, u8, u8, u16, ends
)
combinations = st.builds(Combination, u8, u8, u16, u16, u16, u16, u16, lifetimes, lifetimes)
words = st.integers(0, 3).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))

EXTENSIONS = {
    "sa": st.builds(Sa, u32, u8, u8, u8, u8, u32),
    "lifetime_hard": lifetimes, "lifetime_soft": lifetimes, "lifetime_current": lifetimes,
    "src": addresses, "dst": addresses, "proxy": addresses, "natt_oa": addresses,
    "key_auth": keys, "key_encrypt": keys,
    "identity_src": st.builds(Identity, u16, u64, names), "identity_dst": st.builds(Identity, u16, u64, names),
    "sensitivity": st.builds(Sensitivity, u32, u8, u8, words, words),
    "proposal": st.builds(Proposal, u8, st.lists(combinations, max_size=3)),
    "supported_auth": st.builds(Supported, st.lists(st.builds(Algorithm, u8, u8, u16, u16), max_size=4)),
    "supported_encrypt": st.builds(Supported, st.lists(st.builds(Algorithm, u8, u8, u16, u16), max_size=4)),
    "spirange": st.builds(SpiRange, u32, u32),
    "kmprivate": st.builds(Number, u32),
    "policy": st.builds(PolicyExt, u16, u8, u32, u32, st.lists(requests, max_size=5)),
    "sa2": st.builds(Sa2, u8, u32, u32),
    "natt_type": st.builds(NatType, u8), "natt_sport": st.builds(NatPort, u16), "natt_dport": st.builds(NatPort, u16),
}  # fmt: skip
LINUX = {
    "sec_ctx": st.builds(SecurityContext, u8, u8, st.binary(max_size=30)),
    "kmaddress": pairs.flatmap(lambda pair: st.builds(KmAddress, *map(st.just, pair), u32)),
    "filter": st.builds(Filter, v6, v6, u16, st.integers(0, 128), st.integers(0, 128)),
}
FREEBSD = {
    "natt_oar": addresses, "natt_frag": st.builds(NatFragment, u16), "sa_replay": st.builds(Number, u32),
    "new_src": addresses, "new_dst": addresses,
}  # fmt: skip


def any_message(dialect):
    own = LINUX if dialect is Dialect.LINUX else FREEBSD
    return st.fixed_dictionaries(
        {"type": st.integers(1, 22), "satype": u8, "errno": u8, "seq": u32, "pid": u32}, optional=EXTENSIONS | own
    ).map(lambda parts: Message(**parts))


@pytest.mark.parametrize("dialect", list(Dialect))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_is_built_is_parsed_back_whole(dialect, data):
    message = data.draw(any_message(dialect))
    octets = messages.build(message, dialect)
    assert len(octets) % 8 == 0
    assert messages.parse(octets, dialect) == message


def test_the_round_trip_covers_every_extension_of_the_message():
    extensions = {field.name for field in fields(Message)[6:]}
    assert extensions == set(EXTENSIONS) | set(LINUX) | set(FREEBSD)


@pytest.mark.parametrize("dialect", list(Dialect))
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_octets_raise_anything_but_a_pfkey_error(dialect, data):
    octets = bytearray(messages.build(data.draw(any_message(dialect)), dialect))
    for _ in range(data.draw(st.integers(0, 6))):
        octets[data.draw(st.integers(0, len(octets) - 1))] = data.draw(u8)
    del octets[data.draw(st.integers(max(0, len(octets) - 20), len(octets))) :]
    if len(octets) >= 6 and data.draw(st.booleans()):  # keep the outer length honest, so that extensions are reached
        octets[4:6] = struct.pack("=H", len(octets) // 8)
    with contextlib.suppress(PfkeyError):
        messages.parse(bytes(octets), dialect)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_octets_raise_nothing_but_a_pfkey_error(octets):
    for dialect in Dialect:
        with pytest.raises(PfkeyError):
            messages.parse(b"\x01" + octets, dialect)


def refused(octets, dialect=Dialect.LINUX):
    with pytest.raises(PfkeyError) as caught:
        messages.parse(octets, dialect)
    return caught.value.errno


def header(kind=MessageType.DUMP, words=2, version=2, reserved=0):
    return struct.pack("=BBBBHHII", version, kind, 0, 0, words, reserved, 7, 8)


@pytest.mark.parametrize(("octets", "number"), [
    (b"", errno.EMSGSIZE),
    (header()[:15], errno.EMSGSIZE),
    (header(words=3), errno.EMSGSIZE),
    (header(words=1), errno.EMSGSIZE),
    (header() + b"\0", errno.EMSGSIZE),
    (header(version=1), errno.EINVAL),
    (header(kind=0), errno.EINVAL),
    (header(kind=25), errno.EINVAL),
    (header(reserved=1), errno.EINVAL),
])  # fmt: skip
def test_a_bad_base_header_is_refused_with_the_errno_of_linux(octets, number):
    assert refused(octets) == number


def with_extension(body, number=Ext.SA, words=None):
    octets = struct.pack("=HH", (len(body) + 4) // 8 if words is None else words, number) + body
    return header(words=(16 + len(octets)) // 8) + octets


@pytest.mark.parametrize("octets", [
    with_extension(bytes(4), words=0),
    with_extension(bytes(4), words=2),
    with_extension(bytes(4), number=0),
    with_extension(bytes(4)),
    with_extension(bytes(20), number=Ext.LIFETIME_HARD),
    with_extension(bytes(12), number=Ext.ADDRESS_SRC),
    with_extension(bytes((0, 33, 0, 0, 2, 0)) + bytes(14), number=Ext.ADDRESS_SRC),
    with_extension(bytes((0, 32, 0, 0, 2, 0)) + bytes(22), number=Ext.ADDRESS_SRC),
    with_extension(bytes((0, 32, 0, 0, 1, 0)) + bytes(14), number=Ext.ADDRESS_SRC),
    with_extension(bytes((0, 129, 0, 0, 10, 0)) + bytes(30), number=Ext.ADDRESS_DST),
    with_extension(struct.pack("=HH", 128, 0) + bytes(8), number=Ext.KEY_AUTH),
    with_extension(struct.pack("=HH", 60, 0) + bytes(8), number=Ext.KEY_AUTH),
], ids=range(12))  # fmt: skip
def test_a_bad_extension_is_einval(octets):
    assert refused(octets) == errno.EINVAL


def test_an_extension_that_is_there_twice_is_einval():
    one = messages.build(Message(MessageType.ADD, sa2=Sa2()))[16:]
    octets = header(words=2 + 2 * len(one) // 8) + one + one
    assert refused(octets) == errno.EINVAL


def test_an_unknown_extension_is_passed_over_on_linux_and_refused_on_freebsd():
    octets = with_extension(bytes(4), number=200)
    assert messages.parse(octets).type == MessageType.DUMP
    assert refused(octets, Dialect.FREEBSD) == errno.EINVAL


def test_layouts_are_those_of_linux_pfkeyv2_h(tmp_path):
    """The C compiler, given the system's header, lays out the same octets."""
    import shutil
    import subprocess

    if not shutil.which("gcc"):
        pytest.skip("needs gcc and the kernel's headers")
    source = tmp_path / "layout.c"
    source.write_text(r"""
#include <stdio.h>
#include <string.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <linux/pfkeyv2.h>
static void add(const void *p, size_t n) { fwrite(p, 1, n, stdout); }
int main(void) {
    struct { struct sadb_msg m; struct sadb_sa sa; struct sadb_lifetime h; struct sadb_address s;
             struct sockaddr_in sin;
             struct sadb_address d; struct sockaddr_in6 sin6; char pad[4];
             struct sadb_key k; char key[16]; struct sadb_spirange r; struct sadb_x_policy p;
             struct sadb_x_ipsecrequest q; struct sockaddr_in a, b; struct sadb_x_sa2 sa2; struct sadb_x_nat_t_type t;
             struct sadb_x_nat_t_port np; } __attribute__((packed)) x;
    memset(&x, 0, sizeof x);
    x.m.sadb_msg_version = 2; x.m.sadb_msg_type = SADB_ADD; x.m.sadb_msg_satype = SADB_SATYPE_ESP;
    x.m.sadb_msg_len = sizeof x / 8; x.m.sadb_msg_seq = 7; x.m.sadb_msg_pid = 8;
#define EXT(f, type) x.f##_len = n, x.f##_exttype = type
    int n;
    n = 2; EXT(sa.sadb_sa, SADB_EXT_SA); x.sa.sadb_sa_spi = htonl(0x12345678); x.sa.sadb_sa_replay = 32;
    x.sa.sadb_sa_state = 1; x.sa.sadb_sa_auth = 5; x.sa.sadb_sa_encrypt = 12; x.sa.sadb_sa_flags = SADB_SAFLAGS_NOECN;
    n = 4; EXT(h.sadb_lifetime, SADB_EXT_LIFETIME_HARD); x.h.sadb_lifetime_allocations = 1; x.h.sadb_lifetime_bytes = 2;
    x.h.sadb_lifetime_addtime = 3; x.h.sadb_lifetime_usetime = 4;
    n = 3; EXT(s.sadb_address, SADB_EXT_ADDRESS_SRC); x.s.sadb_address_proto = 6; x.s.sadb_address_prefixlen = 32;
    x.sin.sin_family = AF_INET; x.sin.sin_port = htons(80); x.sin.sin_addr.s_addr = htonl(0x0a000001);
    n = 5; EXT(d.sadb_address, SADB_EXT_ADDRESS_DST); x.d.sadb_address_prefixlen = 128;
    x.sin6.sin6_family = AF_INET6; x.sin6.sin6_port = htons(81); x.sin6.sin6_addr.s6_addr[15] = 9;
    n = 3; EXT(k.sadb_key, SADB_EXT_KEY_ENCRYPT); x.k.sadb_key_bits = 128; memcpy(x.key, "0123456789abcdef", 16);
    n = 2; EXT(r.sadb_spirange, SADB_EXT_SPIRANGE); x.r.sadb_spirange_min = 256; x.r.sadb_spirange_max = 300;
    n = 8; EXT(p.sadb_x_policy, SADB_X_EXT_POLICY); x.p.sadb_x_policy_type = 2; x.p.sadb_x_policy_dir = 2;
    x.p.sadb_x_policy_id = 5; x.p.sadb_x_policy_priority = 6;
    x.q.sadb_x_ipsecrequest_len = 48; x.q.sadb_x_ipsecrequest_proto = 50; x.q.sadb_x_ipsecrequest_mode = 2;
    x.q.sadb_x_ipsecrequest_level = 3; x.q.sadb_x_ipsecrequest_reqid = 11;
    x.a.sin_family = x.b.sin_family = AF_INET; x.a.sin_addr.s_addr = htonl(1); x.b.sin_addr.s_addr = htonl(2);
    n = 2; EXT(sa2.sadb_x_sa2, SADB_X_EXT_SA2); x.sa2.sadb_x_sa2_mode = 2; x.sa2.sadb_x_sa2_sequence = 3;
    x.sa2.sadb_x_sa2_reqid = 4;
    n = 1; EXT(t.sadb_x_nat_t_type, SADB_X_EXT_NAT_T_TYPE); x.t.sadb_x_nat_t_type_type = 2;
    n = 1; EXT(np.sadb_x_nat_t_port, SADB_X_EXT_NAT_T_SPORT); x.np.sadb_x_nat_t_port_port = htons(4500);
    add(&x, sizeof x);
    return 0;
}
""")
    subprocess.run(["gcc", "-o", tmp_path / "layout", source], check=True)
    octets = subprocess.run([tmp_path / "layout"], check=True, capture_output=True).stdout
    message = Message(
        MessageType.ADD, 3, seq=7, pid=8,
        sa=Sa(0x12345678, 32, 1, 5, 12, 0x80000000),
        lifetime_hard=LifetimeExt(1, 2, 3, 4),
        src=Address(bytes((10, 0, 0, 1)), 32, 6, 80),
        dst=Address(bytes(15) + b"\x09", 128, 0, 81),
        key_encrypt=KeyExt(Key(b"0123456789abcdef")),
        spirange=SpiRange(256, 300),
        policy=PolicyExt(2, 2, 5, 6, [Request(50, 2, 3, 11, bytes((0, 0, 0, 1)), bytes((0, 0, 0, 2)))]),
        sa2=Sa2(2, 4, 3), natt_type=NatType(2), natt_sport=NatPort(4500),
    )  # fmt: skip
    assert messages.build(message) == octets
    assert messages.parse(octets) == message


def test_a_socket_option_is_the_policy_extension_alone():
    policy = PolicyExt(2, 2, 0, 0, [Request(50, 1, 2)])
    assert PolicyExt.from_option(policy.to_option()) == policy
    for wrong in (b"", policy.to_option()[:16], b"\xff" * 16):
        with pytest.raises(PfkeyError):
            PolicyExt.from_option(wrong)
