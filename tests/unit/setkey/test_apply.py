"""A file is applied as a whole or not at all."""

import pytest

from ipsecq.errors import ConfigError
from ipsecq.numbers import Direction, Protocol
from ipsecq.policy.model import Policy
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SecurityAssociation
from ipsecq.sa.sad import Sad
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse

KEY = "-E aes-gcm-16 0x" + "ab" * 20
BASE = f"""add 10.0.0.1 10.0.0.2 esp 0x100 {KEY} ;
add 10.0.0.2 10.0.0.1 esp 0x101 {KEY} ;
spdadd 10.0.0.1 10.0.0.2 any -P out ipsec esp/transport//require ;
"""


def run(text: str, sad: Sad | None = None, spd: Spd | None = None, **options):
    return apply(parse(text, "f.conf"), sad or Sad(), spd or Spd(), now=1000.0, file="f.conf", **options)


def test_everything_lands_where_it_belongs_with_its_time_of_creation():
    done = run(BASE)
    assert [sa.spi for sa in done.sad] == [0x100, 0x101]
    assert {sa.created for sa in done.sad} == {1000.0}
    (policy,) = done.spd.dump()
    assert (policy.direction, policy.created, policy.id) == (Direction.OUT, 1000.0, 9)


@pytest.mark.parametrize(("text", "place", "part"), [
    (f"flush; spdflush;\nadd 10.0.0.9 10.0.0.2 esp 0x100 {KEY};\n add 1.1.1.1 10.0.0.2 esp 0x100 {KEY};", "3:2",
     "exists"),
    ("spdadd 10.0.0.1 10.0.0.2 any -P out none;", "1:1", "exists"),
    ("delete 10.0.0.1 10.0.0.2 ah 0x100;", "1:1", "no SA"),
    ("delete 10.0.0.9 10.0.0.2 esp 0x100;", "1:1", "no SA"),
    ("get 10.0.0.1 10.0.0.2 esp 0x999;", "1:1", "no SA"),
    ("spddelete 10.0.0.1 10.0.0.2 tcp -P out;", "1:1", "no policy"),
    (f"flush;\nadd 10.0.0.1 10.0.0.2 esp 255 {KEY};", "2:1", "reserved"),
    ("flush;\nadd 10.0.0.1 10.0.0.2 esp 256 -E aes-cbc 0x00 ;", "2:1", "key of 8 bits"),
    ("flush;\nadd 10.0.0.1 10.0.0.2 ah 256 -A hmac-md5 0x" + "00" * 16 + ";", "2:1", "legacy"),
])  # fmt: skip
def test_a_command_that_fails_leaves_both_databases_as_they_were(text, place, part):
    before = run(BASE)
    sad, spd = before.sad, before.spd
    was = sad.dump(), spd.dump(), sad.generation, spd.generation
    with pytest.raises(ConfigError) as caught:
        run(text, sad, spd)
    assert str(caught.value).startswith(f"f.conf:{place}: ")
    assert part in str(caught.value)
    assert (sad.dump(), spd.dump(), sad.generation, spd.generation) == was


def test_a_file_that_applies_does_not_touch_the_databases_it_started_from():
    before = run(BASE)
    after = run("flush; spdflush;", before.sad, before.spd)
    assert (len(before.sad), len(before.spd)) == (2, 1)
    assert (len(after.sad), len(after.spd)) == (0, 0)


def test_commands_that_change_and_show():
    before = run(BASE)
    after = run(
        "get 10.0.0.1 10.0.0.2 esp 0x100; dump esp; dump ah; spddump;\n"
        "spdupdate 10.0.0.1 10.0.0.2 any -P out discard; spddump; delete 10.0.0.1 10.0.0.2 esp 0x100;\n"
        "deleteall 10.0.0.2 10.0.0.1; dump; exit; flush;",
        before.sad, before.spd,
    )  # fmt: skip
    shown = [sa.spi if isinstance(sa, SecurityAssociation) else sa.action.name for sa in after.shown]
    assert shown == [0x100, 0x100, 0x101, "IPSEC", "DISCARD"]
    assert len(after.sad) == 0
    (policy,) = after.spd.dump()
    assert isinstance(policy, Policy)
    assert policy.id == before.spd.dump()[0].id


def test_flush_of_one_protocol_keeps_the_others():
    before = run(BASE + "add 10.0.0.1 10.0.0.2 ipcomp 0x300 -C deflate;")
    assert [sa.protocol for sa in run("flush esp;", before.sad, before.spd).sad] == [Protocol.IPCOMP]


def test_legacy_algorithms_need_permission():
    text = "add 10.0.0.1 10.0.0.2 ah 256 -A hmac-md5 0x" + "00" * 16 + ";"
    assert len(run(text, allow_legacy=True).sad) == 1
