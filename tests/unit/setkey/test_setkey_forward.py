"""Direction *fwd* in sentences of setkey(8): files that were written for Linux load as they are."""

import pytest

from ipsecq.errors import ConfigError
from ipsecq.numbers import Action, Direction
from ipsecq.policy.spd import Spd
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

NETS = "10.2.0.0/24 10.1.0.0/24 any -P"
RULE = "ipsec esp/tunnel/192.0.2.2-192.0.2.1"


def spd(text):
    return [
        (policy.direction, policy.action) for policy in apply(parse(text, "f.conf"), Sad(), Spd(), now=1.0).spd.dump()
    ]


@pytest.mark.parametrize("order", [("in", "fwd"), ("fwd", "in")])
def test_in_and_fwd_with_one_selector_are_one_policy_in_whatever_order_they_come(order):
    text = "".join(f"spdadd {NETS} {direction} {RULE}/require;\n" for direction in order)
    assert spd(f"spdflush;\n{text}") == [(Direction.IN, Action.IPSEC)]
    assert spd(text + "".join(f"spddelete {NETS} {direction};\n" for direction in order)) == []


@pytest.mark.parametrize("before", [
    "", f"spdadd {NETS} in none; spdflush;", f"spdadd {NETS} in none; spddelete {NETS} in;",
    "spdadd 10.2.0.0/24 10.1.0.0/25 any -P in none; spddelete 10.2.0.0/24 10.1.0.0/25 any -P in;",
])  # fmt: skip
def test_fwd_alone_stands_for_in_as_it_does_for_pf_key_clients(before):
    assert spd(f"{before} spdadd {NETS} fwd {RULE}/require;") == [(Direction.IN, Action.IPSEC)]
    assert spd(f"{before} spdadd {NETS} fwd {RULE}/require; spddelete {NETS} fwd;") == []


@pytest.mark.parametrize(("inbound", "forward", "fits"), [
    (f"{RULE}/unique:7", f"{RULE}/unique:7", True),
    (f"{RULE}/unique:7", f"{RULE}/require", True),
    (f"{RULE}/require", f"{RULE}/use", True),
    (f"{RULE}/use", f"{RULE}/require", False),
    (f"{RULE}/require", f"{RULE}/unique:7", False),
    (f"{RULE}/default", f"{RULE}/require", False),
    (f"{RULE}/require", f"{RULE}/default", False),
    ("none", f"{RULE}/require", False),
    ("none", "discard", False),
    (f"{RULE}/require", "none", False),
    (f"{RULE}/require", "ipsec esp/tunnel/192.0.2.3-192.0.2.1/require", False),
    (f"{RULE}/require", f"{RULE}/require ah/transport//require", False),
])  # fmt: skip
def test_a_fwd_policy_that_asks_for_more_than_its_in_policy_is_refused_with_its_place(inbound, forward, fits):
    text = f"spdadd {NETS} in {inbound};\nspdadd {NETS} fwd {forward};"
    if fits:
        assert len(spd(text)) == 1
        return
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.conf")
    assert str(caught.value).startswith("f.conf:2:1: ")
    assert "say the same in both" in str(caught.value)


def test_a_gre_key_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"f.conf:1:28: selectors have no GRE keys") as caught:
        parse("spdadd 0.0.0.0 0.0.0.0 gre 1234 -P out ipsec esp/transport//require ;", "f.conf")
    assert "only icmp" not in str(caught.value)
