import json

import pytest

from ipsecq.daemon import socketstore
from ipsecq.policy.setpolicy import parse
from ipsecq.policy.sockets import SocketPolicy, rule_of

BOOT, MASK = b"\1" * 16, 0xFCFF0000


def pairs():
    return [
        SocketPolicy(
            0x80000000, rule_of(parse("in ipsec esp/transport//unique:5"), privileged=True),
            rule_of(parse("out ipsec esp/tunnel/192.0.2.1-192.0.2.2/require"), privileged=False), 1,
        ),
        SocketPolicy(0x40000000, None, rule_of(parse("out bypass"), privileged=True), 9),
    ]  # fmt: skip


def test_the_next_daemon_finds_the_same_policies_under_the_same_marks(tmp_path):
    socketstore.save(tmp_path, BOOT, pairs())
    assert socketstore.load(tmp_path, BOOT, MASK) == pairs()
    assert (tmp_path / socketstore.NAME).stat().st_mode & 0o777 == 0o600


def test_another_boot_or_no_file_is_a_fresh_start(tmp_path):
    assert socketstore.load(tmp_path, BOOT, MASK) == []
    socketstore.save(tmp_path, BOOT, pairs())
    assert socketstore.load(tmp_path, b"\2" * 16, MASK) == []


@pytest.mark.parametrize("spoil", [
    lambda text: text[:-5],
    lambda text: "[]",
    lambda text: text.replace("esp/tunnel", "gre/tunnel"),
    lambda text: json.dumps({"boot": BOOT.hex(), "policies": [{}]}),
])  # fmt: skip
def test_a_spoilt_file_is_said_and_left_out(tmp_path, spoil, caplog):
    socketstore.save(tmp_path, BOOT, pairs())
    file = tmp_path / socketstore.NAME
    file.write_text(spoil(file.read_text()))
    assert socketstore.load(tmp_path, BOOT, MASK) == []
    assert "cannot be read" in caplog.text


def test_marks_outside_of_the_field_are_not_taken_over(tmp_path, caplog):
    socketstore.save(tmp_path, BOOT, pairs())
    assert socketstore.load(tmp_path, BOOT, 0x00FF0000) == []
    assert "mark_sockets was changed" in caplog.text
