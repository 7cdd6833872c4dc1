from ipsecq.netfilter.compile import compile_ruleset
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.netfilter.socketmaps import SocketPlan
from ipsecq.policy.setpolicy import parse
from ipsecq.policy.sockets import SocketPolicy, rule_of
from ipsecq.sysctl import Sysctl

SETTINGS = NetfilterSettings()
ONE, TWO = 0x80000000, 0x40000000


def pair(mark, inbound=None, outbound=None, *, privileged=True):
    rules = [rule_of(parse(text), privileged=privileged) if text else None for text in (inbound, outbound)]
    return {mark: SocketPolicy(mark, *rules)}


def update(plan, *pairs, sysctl=None):
    return plan.update({mark: each for some in pairs for mark, each in some.items()}, sysctl or Sysctl())


REQUIRE = pair(ONE, "in ipsec esp/transport//require", "out ipsec esp/transport//require")


def test_without_sockets_no_packet_pays_for_a_look_up():
    text = compile_ruleset([], SETTINGS, Sysctl())
    assert "socket mark & 0xfcff0000" not in text
    assert "mark & 0xfcff0000" not in text


def test_a_change_costs_commands_for_what_changed_only_and_its_end_takes_all_away():
    plan = SocketPlan(SETTINGS)
    first = update(plan, REQUIRE)
    assert any("add element inet ipsecq sockets_out_ipv4 { 0x80000000 : goto out_worker_spread }" in line for line in first)
    assert update(plan, REQUIRE) == []
    second = update(plan, REQUIRE, pair(TWO, None, "out discard"))
    assert sorted(second) == [
        f"add element inet ipsecq sockets_out_{family} {{ 0x40000000 : goto out_discard }}" for family in ("ipv4", "ipv6")
    ]
    last = update(plan)
    assert sum(line.startswith("delete element") for line in last) == 7
    assert {line.split()[4] for line in last if line.startswith("flush chain")} == {
        "sockets_in", "sockets_out", "sockets_opening",
    }  # fmt: skip


def test_the_verdicts_are_those_of_the_levels():
    plan = SocketPlan(SETTINGS)
    lines = update(plan, pair(ONE, "in ipsec esp/transport//default", "out ipsec esp/transport//default"))
    assert "add element inet ipsecq sockets_in_ipv4 { 0x80000000 : accept }" in lines
    knobs = Sysctl({"net.inet.ipsec.esp_trans_deflev": 2})
    lines = update(plan, pair(ONE, "in ipsec esp/transport//default", "out ipsec esp/transport//default"), sysctl=knobs)
    assert "add element inet ipsecq sockets_in_ipv4 { 0x80000000 : goto in_clear }" in lines
    assert not any("ipv6" in line and "element" in line for line in lines)


def test_without_privilege_the_spd_comes_first():
    lines = update(SocketPlan(SETTINGS), pair(ONE, "in discard", "out ipsec esp/transport//use", privileged=False))
    elements = [line.split()[4] for line in lines if line.startswith("add element")]
    assert elements
    assert all("_late" in name for name in elements)
    text = compile_ruleset([], SETTINGS, Sysctl())
    for side in ("in", "out"):
        chain = text[text.index(f"hook {'prerouting' if side == 'in' else 'postrouting'} "):]
        order = [chain.index(f"jump {name}") for name in (
            f"sockets_{side}\n", f"policy_{side}_ipv4", f"sockets_{side}_late\n", f"default_{side}\n"
        )]  # fmt: skip
        assert order == sorted(order)


def test_listeners_on_any_address_are_not_asked_about_packets_that_only_pass_through():
    text = compile_ruleset([], SETTINGS, Sysctl(), sockets=REQUIRE)
    lines = [line for line in text.splitlines() if "socket mark" in line]
    assert len(lines) >= 3
    assert all("fib daddr type local socket mark" in line for line in lines)
