import errno

import pytest

from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.pfkey.constants import Dialect, MessageType
from ipsecq.pfkey.database import Usage
from ipsecq.pfkey.extensions import KeyExt, LifetimeExt, Sa, SpiRange
from ipsecq.pfkey.messages import Message, build
from ipsecq.pfkey.xextensions import Filter, NatPort, NatType, Number, Sa2
from ipsecq.sa.association import SaKey
from ipsecq.secret import Key

T = MessageType


def getspi(make, low=None, high=None, satype=3, **more):
    spirange = SpiRange(low, high) if low is not None else None
    return Message(T.GETSPI, satype, seq=4, pid=77, src=make.host(make.A), dst=make.host(make.B), spirange=spirange,
                   sa2=Sa2(2, 9), **more)  # fmt: skip


def test_add_puts_the_whole_sa_into_the_sad_and_tells_everybody_as_linux_does(bench, make):
    other = bench.open(2)
    reply = bench.one(make.add())
    assert bench.inbox[other] == [reply]
    assert (reply.type, reply.satype, reply.errno, reply.seq, reply.pid) == (T.ADD, 3, 0, 5, 77)
    assert reply.sa == Sa(0x1000, 32, 1, 5, 12)
    assert reply.key_encrypt == KeyExt(Key(bytes(16)))
    assert (reply.lifetime_hard.addtime, reply.lifetime_soft.addtime) == (3600, 1800)
    assert reply.lifetime_current == LifetimeExt(0, 0, int(bench.now), 0)
    assert reply.sa2 == Sa2(2, 9)
    sa = bench.database.sad.get(make.B, 50, 0x1000)
    assert (sa.encryption, sa.authentication, sa.mode, sa.reqid) == ("aes-cbc", "hmac-sha2-256", Mode.TUNNEL, 9)
    assert (sa.replay_window, sa.created, sa.state, sa.label) == (32, bench.now, SaState.MATURE, "pfkey:77")


def test_a_client_that_is_not_root_sees_everything_but_keys(bench, make):
    bench.open(2, privileged=False)
    bench.ask(make.add())
    seen = bench.inbox[2][0]
    assert seen.sa.spi == 0x1000
    assert seen.key_auth is seen.key_encrypt is None
    bench.ask(Message(T.DUMP), 2)
    assert bench.inbox[2][1].key_encrypt is None


@pytest.mark.parametrize(("change", "number"), [
    ({"sa": None}, errno.EINVAL),
    ({"src": None}, errno.EINVAL),
    ({"key_encrypt": None}, errno.EINVAL),
    ({"key_auth": None}, errno.EINVAL),
    ({"key_encrypt": KeyExt(Key(bytes(15)))}, errno.EINVAL),
    ({"lifetime_soft": None}, errno.EINVAL),
    ({"sa": Sa(0x1000, 32, 1, 5, 99)}, errno.ENOSYS),
    ({"sa": Sa(0x1000, 32, 1, 99, 12)}, errno.ENOSYS),
    ({"sa": Sa(0x1000, 32, 1, 255, 12)}, errno.EINVAL),
    ({"sa": Sa(0xFF, 32, 1, 5, 12)}, errno.EINVAL),
    ({"sa2": Sa2(3, 9)}, errno.EINVAL),
    ({"satype": 5}, errno.EINVAL),
    ({"satype": 0}, errno.EPROTONOSUPPORT),
    ({"natt_type": NatType(1)}, errno.EINVAL),
])  # fmt: skip
def test_an_add_that_lacks_something_is_refused_and_changes_nothing(bench, make, change, number):
    message = make.add()
    for name, value in change.items():
        setattr(message, name, value)
    reply = bench.one(message)
    assert (reply.type, reply.errno, reply.seq, reply.pid) == (T.ADD, number, 5, 77)
    assert reply.sa is None
    assert not len(bench.database.sad)


def test_families_must_agree(bench, make):
    assert bench.one(make.add(src=make.A6)).errno == errno.EINVAL
    assert bench.one(make.add(src=make.A6, dst=make.B6)).errno == 0


def test_an_spi_that_is_taken_is_eexist(bench, make):
    bench.ask(make.add())
    assert bench.one(make.add()).errno == errno.EEXIST
    assert bench.one(make.add(dst=bytes((10, 0, 0, 3)))).errno == 0


def test_getspi_makes_a_larval_sa_that_an_update_matures(bench, make):
    reply = bench.one(getspi(make))
    assert (reply.type, reply.satype, reply.seq, reply.pid) == (T.GETSPI, 3, 4, 77)
    assert 0x100 <= reply.sa.spi <= 0x0FFFFFFF
    assert (reply.sa.state, reply.key_auth, reply.sa2.reqid) == (SaState.LARVAL, None, 9)
    key = SaKey(make.B, 50, reply.sa.spi)
    assert bench.database.find_sa(key).state is SaState.LARVAL
    assert bench.one(make.add(reply.sa.spi)).errno == errno.EEXIST
    assert bench.one(make.add(reply.sa.spi, T.UPDATE)).errno == 0
    assert bench.database.find_sa(key).state is SaState.MATURE
    bench.now += 100
    bench.deliver(bench.server.tick())
    assert bench.database.find_sa(key) is not None


def test_a_larval_sa_that_nobody_updates_dies_after_half_a_minute_with_a_hard_expire(bench, make):
    bench.ask(Message(T.REGISTER, 3))
    spi = bench.one(getspi(make)).sa.spi
    bench.now += 29
    assert bench.server.tick() == []
    bench.now += 2
    bench.deliver(bench.server.tick())
    expire = bench.inbox[1][-1]
    assert (expire.type, expire.sa.spi, expire.sa.state) == (T.EXPIRE, spi, SaState.DEAD)
    assert not len(bench.database.sad)
    assert bench.one(make.add(spi, T.UPDATE)).errno == errno.ESRCH


def test_getspi_gives_every_spi_of_a_range_once_and_then_enoent_as_linux(bench, make):
    spis = {bench.one(getspi(make, 0x400, 0x40F)).sa.spi for _ in range(16)}
    assert spis == set(range(0x400, 0x410))
    assert bench.one(getspi(make, 0x400, 0x40F)).errno == errno.ENOENT
    assert bench.one(getspi(make, 0x400, 0x40F, satype=2)).errno == 0
    bench.open(2, Dialect.FREEBSD)
    assert bench.one(getspi(make, 0x400, 0x40F), 2).errno == errno.EEXIST


@pytest.mark.parametrize(
    ("low", "high", "satype"), [(0x500, 0x400, 3), (0x100, 0x10000, 9), (0x100, 0x200, 0), (1, 0xFF, 3)]
)
def test_getspi_refuses_a_range_that_makes_no_sense(bench, make, low, high, satype):
    assert bench.one(getspi(make, low, high, satype)).errno == errno.EINVAL


def test_a_cpi_has_sixteen_bits_without_being_asked(bench, make):
    assert 0x100 <= bench.one(getspi(make, satype=9)).sa.spi <= 0xEFFF


def test_update_of_an_sa_in_use_changes_lifetimes_and_refuses_other_keys(bench, make):
    bench.ask(make.add())
    created = bench.now
    bench.now += 10
    reply = bench.one(make.add(kind=T.UPDATE, lifetime_hard=LifetimeExt(1, 2, 3, 4)))
    assert (reply.errno, reply.lifetime_hard) == (0, LifetimeExt(1, 2, 3, 4))
    assert reply.lifetime_current.addtime == int(created)
    refused = bench.one(make.add(kind=T.UPDATE, key_encrypt=KeyExt(Key(bytes(15) + b"x"))))
    assert refused.errno == errno.EINVAL
    assert bench.database.sad.get(make.B, 50, 0x1000).encryption_key == Key(bytes(16))
    assert bench.one(make.add(0x2000, T.UPDATE)).errno == errno.ESRCH


def test_get_answers_the_sender_alone_with_what_the_sa_has_used(bench, make):
    bench.ask(make.add())
    bench.open(2)
    bench.database.usages[SaKey(make.B, 50, 0x1000)] = Usage(3, 4000, 1_700_000_001, 3)
    reply = bench.one(make.named(T.GET))
    assert reply.lifetime_current == LifetimeExt(3, 4000, int(bench.now), 1_700_000_001)
    assert (reply.seq, reply.key_auth.key.bits, reply.sa2.sequence) == (6, 256, 3)
    assert bench.inbox[2] == []
    assert bench.one(make.named(T.GET, 0x1001)).errno == errno.ESRCH
    assert bench.one(make.named(T.GET, satype=0)).errno == errno.ESRCH


def test_delete_tells_everybody_and_a_second_one_is_esrch(bench, make):
    bench.ask(make.add())
    bench.open(2)
    assert bench.one(make.named(T.DELETE)).type == T.DELETE
    assert [each.type for each in bench.inbox[2]] == [T.DELETE]
    assert bench.one(make.named(T.DELETE)).errno == errno.ESRCH


def test_delete_without_an_spi_is_einval_on_linux_and_deletes_all_between_two_hosts_on_freebsd(bench, make):
    for spi in (0x1000, 0x1001):
        bench.ask(make.add(spi))
    bench.ask(make.add(0x1002, dst=bytes((10, 0, 0, 3))))
    message = make.named(T.DELETE)
    message.sa = None
    assert bench.one(message).errno == errno.EINVAL
    bench.open(2, Dialect.FREEBSD)
    assert bench.one(message, 2).errno == 0
    assert [sa.spi for sa in bench.database.sad] == [0x1002]


def test_flush_answers_the_sender_and_then_tells_everybody_once_when_something_went(bench, make):
    bench.ask(make.add())
    bench.open(2)
    assert [each.type for each in bench.ask(Message(T.FLUSH, 2))] == [T.FLUSH]
    assert bench.inbox[2] == []
    assert [each.type for each in bench.ask(Message(T.FLUSH))] == [T.FLUSH, T.FLUSH]
    assert [each.type for each in bench.inbox[2]] == [T.FLUSH]
    assert not len(bench.database.sad)


def test_a_dump_counts_down_to_zero_over_a_snapshot(bench, make):
    for spi in range(0x1000, 0x1014):
        bench.ask(make.add(spi))
    bench.open(2)
    assert bench.server.handle(2, build(Message(T.DUMP, seq=3, pid=12))) == []
    bench.deliver((2, octets) for octets in bench.server.more(2, 5))
    bench.ask(Message(T.FLUSH))  # another client goes on meanwhile
    bench.ask(make.add(0x5000))
    while rest := bench.server.more(2, 5):
        bench.deliver((2, octets) for octets in rest)
    records = [each for each in bench.inbox[2] if each.type == T.DUMP]
    assert [each.seq for each in records] == list(range(19, -1, -1))
    assert [each.sa.spi for each in records] == list(range(0x1000, 0x1014))
    assert {each.pid for each in records} == {12}


def test_an_empty_dump_is_enoent_and_a_second_one_at_once_ebusy(bench, make):
    assert bench.one(Message(T.DUMP)).errno == errno.ENOENT
    bench.ask(make.add())
    assert bench.one(Message(T.DUMP, 2)).errno == errno.ENOENT
    assert bench.server.handle(1, build(Message(T.DUMP))) == []
    bench.deliver(bench.server.handle(1, build(Message(T.DUMP))))
    assert bench.inbox[1][-1].errno == errno.EBUSY
    assert len(bench.server.more(1, 1)) == 1
    assert bench.one(Message(T.DUMP)).errno == 0


def test_a_dump_keeps_to_its_filter(bench, make):
    for last in range(4):
        bench.ask(make.add(dst=bytes((10, 0, last, 1))))
    message = Message(T.DUMP, filter=Filter(bytes(16), bytes((10, 0, 2, 0)).ljust(16, b"\0"), 2, 0, 23))
    assert [each.dst.address[2] for each in bench.ask(message)] == [2, 3]
    message.filter.family = 10
    assert bench.one(message).errno == errno.ENOENT


def test_expire_goes_to_those_who_registered_with_the_limit_that_was_reached_and_no_keys(bench, make):
    bench.ask(make.add())
    bench.open(2)
    bench.ask(Message(T.REGISTER, 2), 2)
    bench.ask(Message(T.REGISTER, 3))
    sa = bench.database.sad.get(make.B, 50, 0x1000)
    bench.deliver(bench.server.expire(sa, hard=False))
    bench.deliver(bench.server.expire(sa, hard=True))
    soft, hard = bench.inbox[1][-2:]
    assert (soft.type, soft.sa.state, soft.lifetime_soft.addtime, soft.lifetime_hard) == (T.EXPIRE, 2, 1800, None)
    assert (hard.type, hard.sa.state, hard.lifetime_hard.addtime, hard.lifetime_soft) == (T.EXPIRE, 3, 3600, None)
    assert soft.key_encrypt is hard.key_auth is None
    assert T.EXPIRE not in [each.type for each in bench.inbox[2]]
    assert sa.state is SaState.MATURE


def test_natt_goes_both_ways_and_a_new_mapping_names_old_and_new(bench, make):
    natt = {"natt_type": NatType(2), "natt_sport": NatPort(4500), "natt_dport": NatPort(1024)}
    reply = bench.one(make.add(**natt, natt_oa=make.host(make.A)))
    assert (reply.natt_type.type, reply.natt_sport.port, reply.natt_dport.port) == (2, 4500, 1024)
    sa = bench.database.sad.get(make.B, 50, 0x1000)
    assert sa.natt.original_src == make.A
    bench.ask(Message(T.REGISTER, 3))
    bench.deliver(bench.server.new_mapping(sa, bytes((192, 0, 2, 1)), 2000))
    seen = bench.inbox[1][-1]
    assert (seen.type, seen.sa.spi, seen.seq) == (T.X_NAT_T_NEW_MAPPING, 0x1000, 5)
    assert (seen.src.address, seen.natt_sport.port) == (make.A, 4500)
    assert (seen.dst.address, seen.natt_dport.port) == (bytes((192, 0, 2, 1)), 2000)


def test_dialects_have_their_own_numbers_and_units(bench, make):
    bench.open(2, Dialect.FREEBSD)
    chacha = make.add(sa=Sa(0x1000, 4, 1, 0, 15), key_auth=None, key_encrypt=KeyExt(Key(bytes(36))))
    reply = bench.one(chacha, 2)
    assert (reply.sa.encrypt, reply.sa.replay, reply.sa_replay) == (15, 4, Number(32))
    sa = bench.database.sad.get(make.B, 50, 0x1000)
    assert (sa.encryption, sa.replay_window) == ("chacha20-poly1305", 32)
    seen = bench.inbox[1][-1]
    assert (seen.sa.replay, seen.sa_replay) == (32, None)
    assert seen.sa.encrypt not in (0, 15)
    large = make.add(0x1001, sa_replay=Number(4096))
    assert bench.one(large, 2).sa_replay == Number(4096)
    assert bench.database.sad.get(make.B, 50, 0x1001).replay_window == 4096


def test_ah_and_ipcomp_sas_need_what_they_need(bench, make):
    ah = make.add(sa=Sa(0x1000, 32, 1, 5, 0), key_encrypt=None)
    ah.satype = 2
    assert bench.one(ah).satype == 2
    ipcomp = make.add(sa=Sa(0x1000, 0, 1, 0, 2), key_encrypt=None, key_auth=None)
    ipcomp.satype = 9
    reply = bench.one(ipcomp)
    assert (reply.satype, reply.sa.encrypt) == (9, 2)
    assert bench.database.sad.get(make.B, Protocol.IPCOMP, 0x1000).compression == "deflate"
    ipcomp.sa = Sa(0x20000, 0, 1, 0, 2)
    assert bench.one(ipcomp).errno == errno.EINVAL


@pytest.mark.parametrize("seconds", [5, 90])
def test_a_larval_sa_lives_as_long_as_larval_lifetime_says(bench, make, seconds):
    bench.sysctl.set("net.key.larval_lifetime", seconds)
    bench.one(getspi(make))
    bench.now += seconds - 1
    bench.server.tick()
    assert len(bench.database.sad) == 1
    bench.now += 1
    bench.server.tick()
    assert not len(bench.database.sad)


def test_getspi_without_a_range_keeps_to_spi_minval_and_spi_maxval(bench, make):
    bench.sysctl.set("net.key.spi_minval", 0x5000)
    bench.sysctl.set("net.key.spi_maxval", 0x5007)
    assert {bench.one(getspi(make)).sa.spi for _ in range(8)} == set(range(0x5000, 0x5008))
    assert bench.one(getspi(make)).errno == errno.ENOENT
    assert bench.one(getspi(make, 0x100, 0x1FF)).errno == 0
