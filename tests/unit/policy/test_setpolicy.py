"""Policy strings of ipsec_set_policy(3)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecq.errors import PolicySyntaxError
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy import setpolicy
from ipsecq.policy.model import Transform
from ipsecq.policy.setpolicy import PolicySpec, parse

A, B = bytes([192, 168, 0, 1]), bytes([192, 168, 1, 2])
A6, B6 = bytes.fromhex("20010db8" + "0" * 23 + "1"), bytes.fromhex("20010db8" + "0" * 23 + "2")


def rule(text: str) -> Transform:
    return parse(f"out ipsec {text}").transforms[0]


def test_the_examples_of_the_manual():
    assert parse("in discard") == PolicySpec(Direction.IN, Action.DISCARD)
    assert parse("out ipsec esp/transport//require") == PolicySpec(
        Direction.OUT, Action.IPSEC, 0, (Transform(Protocol.ESP, Mode.TRANSPORT, level=Level.REQUIRE),)
    )
    assert parse("in ipsec ah/transport//require") == PolicySpec(
        Direction.IN, Action.IPSEC, 0, (Transform(Protocol.AH, Mode.TRANSPORT, level=Level.REQUIRE),)
    )
    assert parse("out ipsec esp/transport/10.1.1.1-10.1.1.2/use").transforms[0].src == bytes([10, 1, 1, 1])
    assert parse("in bypass").action is Action.BYPASS
    assert parse("out entrust").action is Action.ENTRUST
    assert parse("out") == PolicySpec(Direction.OUT)


@pytest.mark.parametrize(("text", "expected"), [
    ("esp/tunnel/192.168.0.1-192.168.1.2/require", Transform(Protocol.ESP, Mode.TUNNEL, A, B, Level.REQUIRE)),
    ("esp/tunnel/192.168.0.1-192.168.1.2/", Transform(Protocol.ESP, Mode.TUNNEL, A, B)),
    ("esp/tunnel/192.168.0.1-192.168.1.2", Transform(Protocol.ESP, Mode.TUNNEL, A, B)),
    ("esp/tunnel/2001:db8::1-2001:db8::2/use", Transform(Protocol.ESP, Mode.TUNNEL, A6, B6, Level.USE)),
    ("esp/transport", Transform(Protocol.ESP, Mode.TRANSPORT)),
    ("ipcomp/transport/", Transform(Protocol.IPCOMP, Mode.TRANSPORT)),
    ("ah/transport//default", Transform(Protocol.AH, Mode.TRANSPORT)),
    ("ah/transport//unique", Transform(Protocol.AH, Mode.TRANSPORT, level=Level.UNIQUE)),
    ("ah/transport//unique:7", Transform(Protocol.AH, Mode.TRANSPORT, level=Level.UNIQUE, reqid=7)),
    ("ah/transport//unique#16385", Transform(Protocol.AH, Mode.TRANSPORT, level=Level.UNIQUE, reqid=16385)),
    ("ah/transport//require:9", Transform(Protocol.AH, Mode.TRANSPORT, level=Level.REQUIRE, reqid=9)),
    ("ah/transport/me-any/use", Transform(Protocol.AH, Mode.TRANSPORT, level=Level.USE)),
    ("esp / tunnel\n/ 192.168.0.1[4500] - 192.168.1.2[any] /\trequire",
     Transform(Protocol.ESP, Mode.TUNNEL, A, B, Level.REQUIRE)),
])  # fmt: skip
def test_every_way_to_write_a_rule(text, expected):
    assert rule(text) == expected


def test_rules_follow_one_another_whatever_they_leave_out():
    spec = parse("out ipsec esp/tunnel/192.168.0.1-192.168.1.2/ ah/transport esp/transport/ ipcomp/transport//use")
    assert [(each.protocol, each.level) for each in spec.transforms] == [
        (Protocol.ESP, Level.DEFAULT), (Protocol.AH, Level.DEFAULT), (Protocol.ESP, Level.DEFAULT),
        (Protocol.IPCOMP, Level.USE),
    ]  # fmt: skip


def test_more_urgent_priorities_are_lower_numbers():
    texts = ["prio high + 5", "prio high", "prio high - 5", "prio def + 1", "priority 1", "", "prio -1", "prio low + 1",
             "prio low", "prio low - 1073741823"]  # fmt: skip
    values = [parse(f"out {text} none").priority for text in texts]
    assert values == sorted(values)
    assert values[3] == values[4] == -1
    assert values[5] == 0
    assert setpolicy.priority_to_wire(values[3]) == 0x7FFFFFFF
    assert setpolicy.priority_to_wire(0) == 0


@given(st.integers(-0x7FFFFFFF, 0x7FFFFFFF))
def test_priorities_survive_the_text_and_the_wire(priority):
    spec = PolicySpec(Direction.OUT, Action.NONE, priority)
    assert parse(setpolicy.format(spec)) == spec
    assert setpolicy.priority_from_wire(setpolicy.priority_to_wire(priority)) == priority


@pytest.mark.parametrize(("text", "column", "part"), [
    ("", 1, "direction"),
    ("sideways none", 1, "direction"),
    ("fwd none", 1, "direction"),
    ("out nothing", 5, "action"),
    ("out ipsec", 10, "a rule"),
    ("out none esp/transport", 10, "nothing after none"),
    ("out ipsec foo/transport", 11, "protocol"),
    ("out ipsec esp", 14, "'/'"),
    ("out ipsec esp/foo//use", 15, "mode"),
    ("out ipsec esp/tunnel//require", 15, "needs its ends"),
    ("out ipsec esp/tunnel/gw.example-10.0.0.1/use", 22, "names are not resolved"),
    ("out ipsec esp/tunnel/10.0.0.1/use", 30, "'-'"),
    ("out ipsec esp/tunnel/10.0.0.1-::1/use", 31, "one family"),
    ("out ipsec esp/tunnel/fe80::1%eth0-fe80::2/use", 22, "zone"),
    ("out ipsec esp/transport//sometimes", 26, "level"),
    ("out ipsec esp/transport//unique:0", 26, "ID"),
    ("out ipsec esp/transport/any-me/use", 25, "me-any"),
    ("out prio high + 1073741824 none", 17, "offset"),
    ("out prio medium none", 10, "low, def, high"),
])  # fmt: skip
def test_errors_name_the_column_and_what_was_expected(text, column, part):
    with pytest.raises(PolicySyntaxError) as caught:
        parse(text)
    assert part in str(caught.value)
    assert caught.value.column == column


transforms = st.builds(
    lambda protocol, mode, ends, level, reqid: Transform(
        protocol, mode, *(ends or ((A, B) if mode is Mode.TUNNEL else (None, None))), level, reqid
    ),
    st.sampled_from(Protocol), st.sampled_from(Mode),
    st.none() | st.tuples(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4))
    | st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
    st.sampled_from(Level), st.integers(0, 0xFFFFFFFF),
)  # fmt: skip


@given(st.sampled_from(Direction), st.integers(-0x7FFFFFFF, 0x7FFFFFFF), st.lists(transforms, min_size=1, max_size=4),
       st.sampled_from([" ", "\n\t"]))  # fmt: skip
def test_what_is_printed_parses_to_the_same(direction, priority, rules, delimiter):
    spec = PolicySpec(direction, Action.IPSEC, priority, tuple(rules))
    assert parse(setpolicy.format(spec, delimiter)) == spec


@given(st.text(alphabet="inouaespchtrl/-:#[] 0123.\n", max_size=60) | st.text(max_size=30))
def test_nonsense_is_a_syntax_error_and_nothing_else(text):
    column = 1
    try:
        parse(text)
    except PolicySyntaxError as error:
        column = error.column
    assert 1 <= column <= len(text) + 1
