import errno
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.errors import SpdError
from ipsecq.numbers import Action, Direction
from ipsecq.policy.model import Policy, Selector
from ipsecq.policy.setpolicy import parse
from ipsecq.policy.sockets import (
    FIRST_ID,
    MarkField,
    SocketPolicy,
    check_change,
    gone,
    rule_of,
    wants_reqid,
    with_reqids,
)
from ipsecq.policy.spd import Spd

IN, OUT = Direction.IN, Direction.OUT
MARK = 0x80000000
A, B = b"\xc0\0\2\1", b"\xc0\0\2\2"
FLOW = (A, B, 17, 1000, 2000, False)


def rule(text, *, privileged=True):
    return rule_of(parse(text), privileged=privileged)


def spd_policy(action, direction=OUT):
    return Policy(direction, Selector(bytes(4), b"\xff" * 4, bytes(4), b"\xff" * 4), action, id=7)


def spd(outbound, *policies):
    made = Spd(policies)
    made.put_socket(SocketPolicy(MARK, None, outbound))
    return made


@given(st.integers(1, 0xFFFFFFFF), st.data())
def test_numbers_and_marks_are_one_to_one_and_stay_inside_of_the_field(mask, data):
    field = MarkField(mask)
    numbers = data.draw(st.sets(st.integers(1, field.largest), min_size=1, max_size=20))
    marks = {field.mark(number) for number in numbers}
    assert len(marks) == len(numbers)
    assert all(mark and not mark & ~mask for mark in marks)


def test_small_numbers_use_the_highest_bits_only():
    field = MarkField(0xFCFF0000)
    assert field.largest == (1 << 14) - 1
    assert all(not field.mark(number) & 0x00FF0000 for number in range(1, 64))
    assert field.mark(64) == 0x00800000


def test_entrust_is_no_rule():
    assert rule("out entrust") is None
    assert rule("in entrust", privileged=False) is None


@pytest.mark.parametrize("text", ["out entrust", "out discard", "out ipsec esp/transport//unique:14"])
@pytest.mark.parametrize("present", ["out ipsec esp/transport//unique:13", "out bypass"])
def test_what_was_set_with_privilege_is_changed_with_privilege_only(present, text):
    assert check_change(rule(present), rule(text), privileged=True)
    assert check_change(rule("out discard", privileged=False), rule(text, privileged=False), privileged=False) is (
        text != "out discard"
    )
    with pytest.raises(SpdError) as caught:
        check_change(rule(present), rule(text, privileged=False), privileged=False)
    assert caught.value.errno == errno.EACCES


def test_asking_again_for_the_very_same_policy_changes_nothing_whoever_asks():
    text = "out ipsec esp/transport//unique:13"
    assert not check_change(rule(text), rule(text, privileged=False), privileged=False)
    assert not check_change(rule(text), rule(text), privileged=True)
    assert check_change(rule(text, privileged=False), rule(text), privileged=True)  # it goes before the SPD now


@pytest.mark.parametrize("action", ["bypass", "none"])
def test_what_leaves_the_system_s_policies_needs_privilege(action):
    assert rule(f"out {action}").spec.action is Action[action.upper()]
    with pytest.raises(SpdError) as caught:
        rule(f"out {action}", privileged=False)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("text", ["out ipsec esp/transport//require", "in discard"])
def test_what_only_adds_protection_needs_none(text):
    assert rule(text, privileged=False).text == text


def test_a_policy_without_an_action_or_with_too_many_transforms_is_einval():
    for text in ("out", "out ipsec" + " esp/transport//use" * 5):
        with pytest.raises(SpdError) as caught:
            rule(text)
        assert caught.value.errno == errno.EINVAL


def test_a_privileged_socket_s_policy_goes_before_the_spd():
    for action in (Action.DISCARD, Action.NONE):
        found = spd(rule("out ipsec esp/transport//require"), spd_policy(action)).lookup_socket(MARK, OUT, *FLOW)
        assert found.action is Action.IPSEC
    assert spd(rule("out bypass"), spd_policy(Action.DISCARD)).lookup_socket(MARK, OUT, *FLOW).action is Action.BYPASS


def test_without_privilege_it_counts_only_where_the_spd_has_no_policy():
    mine = rule("out ipsec esp/transport//use", privileged=False)
    assert spd(mine, spd_policy(Action.DISCARD)).lookup_socket(MARK, OUT, *FLOW).id == 7
    assert spd(mine).lookup_socket(MARK, OUT, *FLOW).action is Action.IPSEC


def test_entrust_and_marks_of_others_leave_it_to_the_spd():
    made = spd(None, spd_policy(Action.DISCARD), spd_policy(Action.NONE, IN))
    assert made.lookup_socket(MARK, OUT, *FLOW).action is Action.DISCARD
    assert made.lookup_socket(MARK, IN, *FLOW).action is Action.NONE
    assert made.lookup_socket(0x40000000, OUT, *FLOW).action is Action.DISCARD


def test_packets_of_a_mark_that_is_gone_are_dropped_until_it_is_forgotten():
    made = spd(rule("out bypass"))
    made.put_socket(gone(MARK, 1))
    assert made.lookup_socket(MARK, OUT, *FLOW).action is Action.DISCARD
    before = made.generation
    made.drop_socket(MARK)
    assert made.lookup_socket(MARK, OUT, *FLOW) is None
    assert made.generation > before


def test_a_packet_of_the_other_family_than_the_ends_is_never_sent_unprotected():
    pair = SocketPolicy(MARK, None, rule("out ipsec esp/transport/2001:db8::1-2001:db8::2/require"))
    assert pair.policy(OUT, 6).action is Action.IPSEC
    assert pair.policy(OUT, 4).action is Action.DISCARD
    tunnel = SocketPolicy(MARK, None, rule("out ipsec esp/tunnel/2001:db8::1-2001:db8::2/require"))
    assert tunnel.policy(OUT, 4).action is Action.IPSEC


def test_the_ids_of_all_pairs_differ_and_are_none_of_the_spd_s():
    both = rule("in bypass"), rule("out none")
    ids = [policy.id for number in (1, 2, 3) for policy in SocketPolicy(MARK, *both, number).policies()]
    assert len(ids) == len(set(ids)) == 12
    assert min(ids) >= FIRST_ID


def test_unique_without_a_number_gets_one_for_each_transform():
    spec = parse("out ipsec esp/transport//unique ah/transport//unique:5 ipcomp/transport//use")
    assert wants_reqid(spec)
    numbered = with_reqids(spec, 100)
    assert [transform.reqid for transform in numbered.transforms] == [100, 5, 0]
    assert not wants_reqid(numbered)


def test_a_pair_survives_the_way_to_the_workers():
    pair = SocketPolicy(MARK, rule("in ipsec esp/transport//require"), rule("out discard"), 9)
    back = pickle.loads(pickle.dumps(pair, protocol=5))
    assert back == pair
    assert [policy.id for policy in back.policies()] == [policy.id for policy in pair.policies()]
