"""The knobs of ipsec(4)."""

from typing import Literal

import pytest

from ipsecq.errors import SysctlError
from ipsecq.sysctl import VARIABLES, FamilyKnobs, Sysctl, describe, matching

MANUAL = {
    **dict.fromkeys((
        "net.inet.ipsec.filtertunnel", "net.inet6.ipsec6.filtertunnel", "net.inet.ipsec.ah_offsetmask",
        "net.inet.ipsec.dfbit", "net.inet.ipsec.ecn", "net.inet6.ipsec6.ecn", "net.inet.ipsec.debug",
        "net.inet6.ipsec6.debug", "net.inet.ipsec.natt_cksum_policy", "net.inet.ipsec.check_policy_history",
    ), 0),
    **dict.fromkeys((
        "net.inet.ipsec.esp_trans_deflev", "net.inet.ipsec.esp_net_deflev", "net.inet.ipsec.ah_trans_deflev",
        "net.inet.ipsec.ah_net_deflev", "net.inet6.ipsec6.esp_trans_deflev", "net.inet6.ipsec6.esp_net_deflev",
        "net.inet6.ipsec6.ah_trans_deflev", "net.inet6.ipsec6.ah_net_deflev", "net.inet.ipsec.def_policy",
        "net.inet6.ipsec6.def_policy", "net.inet.esp.esp_enable", "net.inet.ah.ah_enable",
        "net.inet.ipcomp.ipcomp_enable", "net.inet.ipsec.ah_cleartos", "net.key.preferred_oldsa",
    ), 1),
    "net.key.larval_lifetime": 30, "net.key.blockacq_count": 10, "net.key.blockacq_lifetime": 20,
    "net.inet.ipsec.min_pmtu": 576,
}  # fmt: skip


@pytest.mark.parametrize(("name", "default"), MANUAL.items())
def test_every_variable_of_the_manual_is_there_with_its_default(name, default):
    assert Sysctl().get(name) == default
    assert describe(name)
    assert "\n" not in describe(name)


def test_the_packet_path_sees_what_was_set():
    sysctl = Sysctl({"net.inet.ipsec.dfbit": "2"})
    assert sysctl.v4.dfbit == 2
    sysctl.set("net.inet6.ipsec6.ecn", -1)
    assert (sysctl.v4.ecn, sysctl.v6.ecn) == (0, -1)
    sysctl.set("net.key.preferred_oldsa", 0)
    assert sysctl.key.preferred_oldsa == 0
    sysctl.set("net.enc.in.ipsec_bpf_mask", 2)
    assert sysctl.enc.in_bpf_mask == 2


@pytest.mark.parametrize("name", ["net.inet.ipsec.check_policy_history", "net.inet.esp.esp_enable"])
def test_what_the_manual_has_once_holds_for_both_families(name):
    sysctl = Sysctl()
    new = 1 - sysctl.get(name)
    assert sysctl.set(name, new) == 1 - new
    attribute = VARIABLES[name].attribute
    assert getattr(sysctl.v4, attribute) == getattr(sysctl.v6, attribute) == new


def test_the_families_are_apart_where_the_manual_has_two():
    sysctl = Sysctl()
    sysctl.set("net.inet.ipsec.def_policy", 0)
    assert (sysctl.v4.def_policy, sysctl.v6.def_policy) == (0, 1)


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_each_family_object_is_complete(family: Literal["v4", "v6"]):
    knobs = getattr(Sysctl(), family)
    assert all(isinstance(getattr(knobs, slot), int) for slot in FamilyKnobs.__slots__)
    with pytest.raises(AttributeError):
        knobs.dfbits = 1


@pytest.mark.parametrize(("name", "value", "message"), [
    ("net.inet.ipsec.nonsense", 1, "unknown oid 'net.inet.ipsec.nonsense'"),
    ("net.inet.ipsec.def_policy", 2, "Invalid argument"),
    ("net.inet.ipsec.def_policy", -1, "Invalid argument"),
    ("net.inet.ipsec.ah_offsetmask", "0x10000", "Invalid argument"),
    ("net.inet.ipsec.dfbit", "two", "invalid integer 'two'"),
    ("net.inet.ipsec.dfbit", "", "invalid integer ''"),
    ("net.inet.ipsec.dfbit", "\u0661", "invalid integer"),
    ("net.inet.ipsec.dfbit", "1_0", "invalid integer '1_0'"),
    ("net.inet.ipsec.dfbit", "--1", "invalid integer '--1'"),
    ("net.inet.ipsec.dfbit", "+-1", "invalid integer"),
    ("net.inet.ipsec.dfbit", "0x", "invalid integer '0x'"),
    ("net.inet.ipsec.dfbit", "0x-1", "invalid integer"),
    ("net.inet.ipsec.dfbit", "08", "invalid integer '08'"),
    ("net.inet.ipsec.dfbit", "0o1", "invalid integer"),
    ("net.inet.ipsec.dfbit", "1 1", "invalid integer"),
    ("net.inet.ipsec.dfbit", "9" * 5000, "invalid integer"),
    ("net.inet.ipsec", 1, "oid 'net.inet.ipsec' isn't a leaf node"),
    ("net", 1, "oid 'net' isn't a leaf node"),
    ("net.ine", 1, "unknown oid 'net.ine'"),
])  # fmt: skip
def test_errors_are_worded_as_sysctl_words_them_and_change_nothing(name, value, message):
    sysctl = Sysctl()
    before = sysctl.all(), sysctl.generation
    with pytest.raises(SysctlError, match=message):
        sysctl.set(name, value)
    assert (sysctl.all(), sysctl.generation) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [("0x1fff", 0x1FFF), ("0X1F", 0x1F), ("8191", 8191), ("010", 8), (" 7 ", 7), ("+7", 7), ("-0", 0), ("00", 0)],
)
def test_numbers_are_read_in_the_bases_of_sysctl(text, value):
    sysctl = Sysctl()
    sysctl.set("net.inet.ipsec.ah_offsetmask", text)
    assert sysctl.get("net.inet.ipsec.ah_offsetmask") == value


def test_a_negative_number_has_one_sign():
    sysctl = Sysctl()
    sysctl.set("net.inet.ipsec.ecn", "-1")
    assert sysctl.get("net.inet.ipsec.ecn") == -1


def test_a_range_of_spis_is_checked_as_a_whole_in_either_order():
    low, high = "net.key.spi_minval", "net.key.spi_maxval"
    for names in ((low, high), (high, low)):
        sysctl = Sysctl()
        for name in names:
            sysctl.set(name, {low: "0x20000000", high: "0x20000007"}[name])
        sysctl.check(names)
    sysctl.set(high, 0x1000)
    with pytest.raises(SysctlError, match=rf"{low}=536870912, {high}=4096: Invalid argument"):
        sysctl.check([high])
    sysctl.check(["net.inet.ipsec.ecn"])  # no business of others


def test_a_change_moves_the_generation():
    sysctl = Sysctl()
    sysctl.set("net.inet.ipsec.ecn", 1)
    assert sysctl.generation == 1


def test_an_inner_node_names_all_below_it():
    assert matching("net.inet.esp") == ["net.inet.esp.esp_enable"]
    assert "net.inet6.ipsec6.ecn" in matching("net")
    with pytest.raises(SysctlError, match=r"unknown oid 'net\.ine'"):
        matching("net.ine")
