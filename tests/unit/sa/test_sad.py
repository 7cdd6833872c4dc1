"""The SAD: look-ups of both directions against a naive list, and the errors that key management is told."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecq.errors import SadError
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.sa.association import SaKey, SecurityAssociation
from ipsecq.sa.sad import Sad

A, B, C = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), bytes([10, 0, 0, 3])


def sa(spi=0x1000, *, protocol=Protocol.ESP, src=A, dst=B, **more) -> SecurityAssociation:
    return SecurityAssociation(protocol, spi, src, dst, **more)


def naive_outbound(order, protocol, mode, src, dst, reqid, oldest):
    fits = [x for x in order if x.protocol == protocol and x.src == src and x.dst == dst
            and (not reqid or x.reqid == reqid) and (not mode or not x.mode or x.mode == mode)
            and x.state in (SaState.MATURE, SaState.DYING)]
    if oldest:
        return fits[0] if fits else None
    for state in (SaState.MATURE, SaState.DYING):
        for x in reversed(fits):
            if x.state == state:
                return x
    return None


def naive_sharers(order, protocol, mode, src, dst, reqid):
    fits = [x for x in order if x.protocol == protocol and x.src == src and x.dst == dst
            and (not reqid or x.reqid == reqid) and (not mode or not x.mode or x.mode == mode)]
    return [x for x in fits if x.state == SaState.MATURE] or [x for x in fits if x.state == SaState.DYING]


operations = st.lists(
    st.tuples(
        st.sampled_from(["add", "delete", "state", "update", "flush"]),
        st.integers(0x100, 0x10A), st.sampled_from([A, C]), st.sampled_from(list(Mode)),
        st.sampled_from([0, 7, 8]), st.sampled_from(list(SaState)),
    ), max_size=40,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(operations)
def test_every_lookup_agrees_with_a_naive_list(steps):
    sad, order = Sad(), []  # order: usable SAs in the order in which they became usable
    everything = {}

    def drop(key):
        order[:] = [x for x in order if x.key != key]

    usable = (SaState.MATURE, SaState.DYING)
    for what, spi, src, mode, reqid, state in steps:
        new = sa(spi, src=src, mode=mode, reqid=reqid, state=state)
        old = everything.get(new.key)
        before = sad.generation
        if what == "add":
            if old is not None:
                with pytest.raises(SadError):
                    sad.add(new)
                continue
            sad.add(new)
            everything[new.key] = new
            if state in usable:
                order.append(new)
        elif old is None:
            continue
        elif what == "delete":
            sad.delete(new.dst, new.protocol, spi)
            del everything[new.key]
            drop(new.key)
        elif what == "state":
            was = old.state in usable
            sad.set_state(old, state)
            if state in usable and not was:
                order.append(old)
            elif was and state not in usable:
                drop(old.key)
        elif what == "update":
            same = (old.src, old.reqid) == (new.src, new.reqid) and old.state in usable and state in usable
            sad.update(new)
            everything[new.key] = new
            if same:
                order[:] = [new if x.key == new.key else x for x in order]
            else:
                drop(new.key)
                if state in usable:
                    order.append(new)
        else:
            sad.flush(Protocol.ESP)
            everything.clear()
            order.clear()
        assert sad.generation > before or what in ("flush",)
        assert {x.key: x for x in sad.dump()} == everything
        for key, x in everything.items():
            assert sad.inbound(key) is (x if x.state in usable else None)
        for end in (A, C):
            for policy_mode in Mode:
                for wanted in (0, 7, 8):
                    for oldest in (True, False):
                        arguments = (Protocol.ESP, policy_mode, end, B, wanted)
                        assert sad.outbound(*arguments, oldest=oldest) is naive_outbound(order, *arguments, oldest)
                    assert sad.sharers(*arguments) == naive_sharers(order, *arguments)


def test_preferred_oldsa_chooses_between_the_old_and_the_new():
    sad = Sad([sa(0x100), sa(0x101)])
    assert sad.outbound(Protocol.ESP, Mode.TUNNEL, A, B).spi == 0x100
    assert sad.outbound(Protocol.ESP, Mode.TUNNEL, A, B, oldest=False).spi == 0x101
    sad.set_state(sad.get(B, Protocol.ESP, 0x101), SaState.DYING)
    assert sad.outbound(Protocol.ESP, Mode.TUNNEL, A, B, oldest=False).spi == 0x100


@pytest.mark.parametrize("state", [SaState.MATURE, SaState.DYING])
def test_the_oldest_64_share_at_most(state):
    sad = Sad([sa(0x100 + n, state=state) for n in range(70)])
    assert [x.spi for x in sad.sharers(Protocol.ESP, Mode.ANY, A, B)] == list(range(0x100, 0x100 + 64))


def test_a_larval_sa_becomes_usable_by_update_and_then_counts_as_the_newest():
    sad = Sad([sa(0x100, state=SaState.LARVAL), sa(0x101)])
    assert sad.inbound((B, 50, 0x100)) is None
    sad.update(sa(0x100))
    assert sad.inbound((B, 50, 0x100)).spi == 0x100
    assert sad.outbound(Protocol.ESP, Mode.ANY, A, B).spi == 0x101
    assert sad.outbound(Protocol.ESP, Mode.ANY, A, B, oldest=False).spi == 0x100


def test_unique_takes_its_own_reqid_only_and_reqid_0_takes_any():
    sad = Sad([sa(0x100, reqid=5)])
    assert sad.outbound(Protocol.ESP, Mode.ANY, A, B, 5).spi == 0x100
    assert sad.outbound(Protocol.ESP, Mode.ANY, A, B, 6) is None
    assert sad.outbound(Protocol.ESP, Mode.ANY, A, B, 0).spi == 0x100


def test_a_well_known_cpi_finds_the_sa_with_that_algorithm():
    compressed = sa(0x1234, protocol=Protocol.IPCOMP, compression="deflate")
    sad = Sad([compressed])
    assert sad.inbound((B, 108, 0x1234)) is compressed
    assert sad.inbound((B, 108, 2)) is compressed
    assert sad.inbound((B, 108, 3)) is None
    assert sad.inbound((A, 108, 2)) is None
    assert sad.inbound((B, 50, 2)) is None
    sad.delete(B, 108, 0x1234)
    assert sad.inbound((B, 108, 2)) is None


def test_errors_are_those_of_rfc_2367():
    sad = Sad([sa(0x100)])
    for number, call in (
        (errno.EEXIST, lambda: sad.add(sa(0x100, src=C))),
        (errno.ESRCH, lambda: sad.update(sa(0x200))),
        (errno.ESRCH, lambda: sad.delete(B, 50, 0x200)),
        (errno.ESRCH, lambda: sad.delete(B, 50, 0x100, src=C)),
    ):
        with pytest.raises(SadError) as caught:
            call()
        assert caught.value.errno == number
    assert len(sad) == 1


def test_deleteall_and_flush_take_what_they_name():
    sad = Sad([sa(0x100), sa(0x101), sa(0x102, src=C), sa(0x103, protocol=Protocol.AH)])
    sad.add(sa(0x104, state=SaState.LARVAL))
    assert [x.spi for x in sad.delete_all(A, B, Protocol.ESP)] == [0x100, 0x101]
    assert [x.spi for x in sad.dump()] == [0x102, 0x103, 0x104]
    assert [x.spi for x in sad.flush(Protocol.AH)] == [0x103]
    assert [x.spi for x in sad.flush()] == [0x102, 0x104]
    assert sad.outbound(Protocol.ESP, Mode.ANY, C, B) is None


def test_larval_sas_die_after_their_lifetime():
    sad = Sad([sa(0x100, state=SaState.LARVAL, created=100.0), sa(0x101, created=100.0)])
    assert sad.expired_larval(129.9, 30) == []
    assert [x.spi for x in sad.expired_larval(130.0, 30)] == [0x100]
    assert SaKey(B, 50, 0x101) in sad


def test_a_copy_and_its_original_do_not_disturb_each_other():
    sad = Sad([sa(0x100, reqid=3)])
    other = sad.copy()
    other.delete(B, 50, 0x100)
    other.add(sa(0x101))
    assert [x.spi for x in sad] == [0x100]
    assert sad.outbound(Protocol.ESP, Mode.ANY, A, B, 3).spi == 0x100
    assert other.outbound(Protocol.ESP, Mode.ANY, A, B).spi == 0x101
