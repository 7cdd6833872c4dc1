"""The configuration file: every mistake has a place and an expectation."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from ipsecq.daemon.config import Config, load, parse
from ipsecq.daemon.content import check_reload
from ipsecq.daemon.options import SECTIONS
from ipsecq.errors import ConfigError, DaemonError

DEFAULT = Path(__file__).parents[3] / "ipsecq/daemon/ipsecq.toml"


INTERFACE = '[[interface]]\nname = "ipsec0"\nlocal = "192.0.2.1"\nremote = "192.0.2.2"\nreqid = 100\n'


def mistake(text):
    with pytest.raises(ConfigError) as caught:
        parse(text, Path("/etc/x.toml"))
    return str(caught.value)


def test_an_empty_file_is_the_default():
    assert parse("") == Config()


def test_the_default_file_says_the_defaults():
    """With every commented key uncommented it still equals the built-in defaults (policy aside)."""
    text = "".join(
        line[1:] if line.startswith("#") and " = " in line and not line.startswith("# ") else line
        for line in DEFAULT.read_text().splitlines(keepends=True)
    )
    config = parse(text)
    assert config.daemon.policy == ("setkey.conf",)
    assert (config.nftables, config.metrics, config.log) == (Config().nftables, Config().metrics, Config().log)
    assert config.daemon.workers == 0
    assert config.sysctl == {
        "net.inet.ipsec.dfbit": 0,
        "net.inet.ipsec.ecn": 0,
        "net.inet.ipsec.def_policy": 1,
    }
    for section, options in SECTIONS.items():
        for option in fields(options):
            assert f"{option.name} = " in text, f"[{section}] {option.name} is not in the default file"


@pytest.mark.parametrize(
    ("section", "option"), [(section, option) for section, table in SECTIONS.items() for option in fields(table)]
)
def test_a_reload_refuses_exactly_what_says_that_it_needs_a_restart(section, option):
    values = {bool: lambda old: not old, int: lambda old: old + 1, str: lambda old: old + "x", tuple: lambda old: (*old, 1)}
    old = Config()
    table = getattr(old, section)
    was = getattr(table, option.name)
    new = replace(old, **{section: replace(table, **{option.name: values[type(was)](was)})})
    if option.name == "workers":
        new = replace(old, daemon=replace(table, workers=old.workers + 1))
    if option.metadata["restart"]:
        with pytest.raises(DaemonError, match=rf"\[{section}\] {option.name} cannot change in a reload"):
            check_reload(old, new)
    else:
        check_reload(old, new)


def test_values_are_taken():
    text = '[daemon]\nworkers = 3\npolicy = ["a", "/b"]\n[metrics]\nlisten = "[::1]:99"\n'
    config = parse(text, Path("/etc/i/x.toml"))
    assert config.workers == 3
    assert config.policy_files == [Path("/etc/i/a"), Path("/b")]
    assert config.metrics_address == ("::1", 99)
    assert config.netfilter().workers == 3


def test_interfaces_are_taken():
    second = INTERFACE.replace("ipsec0", "ipsec1").replace("192.0.2.", "2001:db8::").replace("100", "7")
    config = parse(f"{INTERFACE}{second}mtu = 1280\n")
    first, other = config.interfaces
    assert (first.name, first.local, first.remote, first.reqid, first.mtu) == (
        "ipsec0", bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2]), 100, 1400,
    )  # fmt: skip
    assert (other.name, len(other.local), other.reqid, other.mtu) == ("ipsec1", 16, 7, 1280)
    assert config.netfilter().interfaces == ("ipsec0", "ipsec1")
    check_reload(Config(), config)  # no restart


def test_credentials_of_systemd_are_found(monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "/run/credentials/ipsecq.service")
    config = parse('[daemon]\npolicy = ["credential:keys"]\n')
    assert config.policy_files == [Path("/run/credentials/ipsecq.service/keys")]


def test_workers_default_to_the_processors():
    assert parse("").workers >= 1


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("[daemon]\n\n  wrokers = 2\n", "3:3:", "unknown key 'wrokers' in [daemon]; expected policy, workers"),
        ("[daemon]\nworkers = 'x'\n", "2:11:", 'workers: expected a number from 0 to 256, found "x"'),
        ("[daemon]\nworkers = true\n", "2:11:", "found true"),
        ("[daemon]\nworkers = 257\n", "2:11:", "0 to 256, found 257"),
        ("[daemon]\nstate_dir = ''\n", "2:13:", 'state_dir: expected a directory, found ""'),
        ("[daemon]\nrun_dir = ''\n", "2:11:", 'run_dir: expected a directory, found ""'),
        ("[daemon]\npolicy = ['a', '']\n", "2:10:", "policy: expected file names, found an empty one"),
        ("[daemon]\npolicy = ['credential:']\n", "2:10:", "policy: expected file names, found an empty one"),
        ("[daemon]\npolicy = 'x'\n", "2:10:", "expected a list of strings"),
        ("[daemon]\non_stop = 'open'\n", "2:11:", 'expected "block" or "remove"'),
        ("[daemon]\nallow_legacy = 1\n", "2:16:", "expected true or false, found 1"),
        ("daemon.workers = -1\n", "1:18:", "found -1"),
        ("[deamon]\n", "1:2:", "unknown table or key 'deamon'; expected [daemon]"),
        ("log = 3\n", "1:1:", "expected a table [log]"),
        ("[nftables]\nnatt_ports = [0]\n", "2:14:", "list of port numbers"),
        ("[nftables]\nnatt_ports = []\n", "2:14:", "natt_ports: expected a list of port numbers, at least one, found []"),
        ("[nftables]\ntable = 'a b'\n", "2:9:", "letters, digits"),
        ("[nftables]\nmark_done = 3\nmark_stolen = 4\n", "3:1:", "single bits"),
        ("[nftables]\nenc_device = 'a/b'\n", "2:14:", "device name"),
        ("[daemon]\nqueue_base = 65535\nworkers = 2\n", "2:14:", "pass 65535"),
        ("[metrics]\nlisten = 'here'\n", "2:10:", "address:port"),
        ("[metrics]\nlisten = '::1:99'\n", "2:10:", "[address]:port"),
        ('[sysctl]\n"net.inet.ipsec.dfbits" = 1\n', "2:1:", "unknown oid 'net.inet.ipsec.dfbits'"),
        ('[sysctl]\n"a\\fb" = 1\n', "", r"unknown oid 'a\x0cb'"),  # a message is one line, whatever the name
        ("[sysctl]\nnet.inet.ipsec.dfbit = 3\n", "2:24:", "Invalid argument (use 0 to 2)"),
        ('[sysctl]\n"net.inet.ipsec.dfbit" = "1"\n', "2:26:", "expected an integer"),
        ("[sysctl]\nnet.inet.ipsec = 1\n", "2:1:", "oid 'net.inet.ipsec' isn't a leaf node"),
        ("[sysctl]\nnet.key.spi_maxval = 1000\nnet.key.spi_minval = 1001\n", "3:22:",
         "net.key.spi_minval=1001, net.key.spi_maxval=1000: Invalid argument"),
        (f"{INTERFACE}reqids = 1\n", "6:1:", "unknown key 'reqids' in [[interface]]; expected name, local"),
        (INTERFACE + INTERFACE, "7:8:", "name: expected a device name (1 to 15) of its own"),
        (INTERFACE + INTERFACE.replace("ipsec0", "ipsec1"), "10:9:", "reqid: 100 is that of another interface"),
        (INTERFACE.replace("ipsec0", "a/b"), "2:8:", "device name"),
        (INTERFACE.replace("ipsec0", "enc0"), "2:8:", "of its own"),
        (INTERFACE.replace("192.0.2.1", "gw"), "3:9:", 'local: expected an IPv4 or IPv6 address, found "gw"'),
        (INTERFACE.replace("192.0.2.1", "::1"), "4:10:", "of the same family as local"),
        (INTERFACE.replace("192.0.2.1", "192.0.2.2"), "4:10:", "remote: expected another address"),
        (INTERFACE.replace("reqid = 100\n", ""), "1:3:", "[[interface]] needs reqid"),
        (INTERFACE.replace("100", "0"), "5:9:", "reqid: expected a number from 1 to"),
        (f"{INTERFACE}mtu = 575\n", "6:7:", "mtu: expected a number from 576 to 65535"),
        ("[interface]\nname = 'x'\n", "1:2:", "expected tables [[interface]]"),
        ('[daemon]\npolicy = ["a\\u0000b"]\n', "2:10:", "expected a list of strings"),
        ('[daemon]\nstate_dir = "a\\u0000\\nb"\n', "2:13:", r'expected a string, found "a\u0000\nb"'),
        (f"[daemon]\nworkers = {'9' * 5000}\n", "", "4300 digits"),
        ("[daemon]\nworkers = = 1\n", "2:11:", "Invalid value"),
        ("[daemon]\nworkers = [1,\n", "3:1:", ""),
    ],
)
def test_every_mistake_has_file_line_column_and_what_was_expected(text, place, expected):
    message = mistake(text)
    assert message.startswith(f"/etc/x.toml:{place}")
    assert expected in message
    assert "\n" not in message


def test_dotted_and_quoted_sysctl_names_are_the_same():
    assert parse("[sysctl]\nnet.inet.ipsec.dfbit = 1").sysctl == parse('[sysctl]\n"net.inet.ipsec.dfbit" = 1').sysctl


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tmp_path / "bad")
