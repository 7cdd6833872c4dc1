"""A tunnel is up when every SA that its policies require is there, both ways."""

import pytest

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.table import SharedTable
from ipsecq.daemon.takeover import take_over
from ipsecq.daemon.tunnels import Tunnels
from ipsecq.numbers import SaState
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SaKey
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

OUT = "add 192.0.2.1 198.51.100.1 esp 0x1001 -m tunnel -E aes-gcm-16 0x" + "11" * 20 + ";"
IN = "add 198.51.100.1 192.0.2.1 esp 0x1002 -m tunnel -E aes-gcm-16 0x" + "22" * 20 + ";"


def policies(level="require", more=""):
    return (
        f"spdadd 10.1.0.0/16 10.2.0.0/16 any {more} -P out ipsec esp/tunnel/192.0.2.1-198.51.100.1/{level};\n"
        f"spdadd 10.2.0.0/16 10.1.0.0/16 any -P in ipsec esp/tunnel/198.51.100.1-192.0.2.1/{level};\n"
    )


@pytest.fixture
def authority(tmp_path):
    (tmp_path / "state").mkdir()
    table = SharedTable.open(tmp_path / "table", bytes(range(16)), capacity=1 << 14)
    yield Authority(table, LeaseBook.open(tmp_path / "state", table, b"m" * 32))
    table.close()


def load(authority, text):
    applied = apply(parse(text, "t"), Sad(), Spd(), now=1e9)
    take_over(authority, applied.sad, applied.spd, {})


def look(tunnels, authority):
    return tunnels.samples(authority.spd.dump())


@pytest.mark.parametrize(
    ("sas", "missing"),
    [
        (OUT + IN, ""), (OUT, "no inbound ESP SA"), (IN, "no outbound ESP SA"),
        ("", "no outbound ESP SA; no inbound ESP SA"),
    ],
    ids=["both", "out", "in", "none"],
)  # fmt: skip
def test_both_directions_are_needed(authority, sas, missing):
    load(authority, sas + policies())
    (tunnel,) = look(Tunnels(authority), authority)
    assert (tunnel.local, tunnel.peer) == ("192.0.2.1", "198.51.100.1")
    assert (tunnel.up, tunnel.missing) == (not missing, missing)
    assert tunnel.networks == (("10.1.0.0/16", "10.2.0.0/16"),)


def test_a_wish_is_not_a_requirement_and_policies_without_ends_are_no_tunnels(authority):
    load(authority, policies("use") + "spdadd 10.3.0.1 10.3.0.2 any -P out ipsec esp/transport//require;")
    (tunnel,) = look(Tunnels(authority), authority)
    assert tunnel.up


def test_an_sa_that_goes_or_may_not_send_takes_the_tunnel_down(authority):
    load(authority, OUT + IN + policies(more="-fail_open"))
    tunnels = Tunnels(authority)
    assert look(tunnels, authority)[0].fail_open
    key = SaKey(b"\xc6\x33\x64\1", 50, 0x1001)
    authority.problems[key] = "what it sent is not known"
    assert look(tunnels, authority)[0].missing == "not allowed to send: outbound ESP SA"
    authority.problems.clear()
    assert look(tunnels, authority)[0].up
    authority.set_state(authority.sad.get(*key), SaState.DYING)
    assert look(tunnels, authority)[0].up
    authority.delete_sa(key)
    assert look(tunnels, authority)[0].missing == "no outbound ESP SA"


def test_one_tunnel_for_many_networks(authority):
    load(authority, OUT + IN + policies() + policies().replace("10.2.", "10.3."))
    (tunnel,) = look(Tunnels(authority), authority)
    assert tunnel.networks == (("10.1.0.0/16", "10.2.0.0/16"), ("10.1.0.0/16", "10.3.0.0/16"))
