"""``ipsecq explain`` as people and programs see it: offline, 80 columns, the rule that the kernel really has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from ipsecq.cli.explain import explain
from ipsecq.daemon import content
from ipsecq.netfilter.compile import compile_ruleset

app = typer.Typer()
app.command()(explain)

KEY = "000102030405060708090a0b0c0d0e0f10111213"
SETKEY = f"""
add 192.0.2.1 192.0.2.2 esp 0x1001 -m tunnel -E aes-gcm-16 0x{KEY};
add 192.0.2.2 192.0.2.1 esp 0x2001 -m tunnel -E aes-gcm-16 0x{KEY};
spdadd 10.1.0.0/24 10.2.0.9 any -P out discard;
spdadd 10.1.0.0/24 10.2.0.0/24[22] tcp -P out none;
spdadd 10.1.0.0/24 10.2.0.0/24 any -P out ipsec esp/tunnel/192.0.2.1-192.0.2.2/require;
spdadd 10.2.0.0/24 10.1.0.0/24 any -P in ipsec esp/tunnel/192.0.2.2-192.0.2.1/default;
spdadd 10.1.0.0/24 10.3.0.0/24 any -P out ipsec ah/tunnel/192.0.2.1-192.0.2.3/require;
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "ipsecq.toml"
    path.write_text('[daemon]\npolicy = ["setkey.conf"]\nworkers = 2\n[sysctl]\nnet.inet.ipsec.dfbit = 2\n')
    policy = tmp_path / "setkey.conf"
    policy.write_text(SETKEY)
    policy.chmod(0o600)
    return path


def run(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--config", str(config)])


def data(config: Path, *arguments: str) -> dict[str, object]:
    result = run(config, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_protected_packet_policy_sas_layout_mtu_kernel_rule_and_knobs(config: Path) -> None:
    answer = data(config, "10.1.0.7", "10.2.0.7", "udp", "1000", "53")
    assert answer["verdict"] == "protected"
    assert [each["reason"] for each in answer["skipped"]] == ["destination address", "protocol is 6"]
    assert [(each["spi"], each["level"]) for each in answer["transforms"]] == [(0x1001, "require")]
    assert answer["layout"] == [
        "IPv4 192.0.2.1 > 192.0.2.2", "ESP 0x1001", "IPv4 10.1.0.7 > 10.2.0.7", "payload",
    ]  # fmt: skip
    assert (answer["mtu"], answer["path_mtu"]) == (1446, 1500)
    assert {"name": "net.inet.ipsec.dfbit", "value": 2,
            "meaning": "outer DF copied from the inner header"} in answer["sysctl"]  # fmt: skip


def test_the_kernel_rule_is_in_the_ruleset_that_would_be_loaded(config: Path) -> None:
    files = content.read(config)
    ruleset = compile_ruleset(files.spd.dump(), files.config.netfilter(), files.sysctl)
    for arguments in (("10.1.0.7", "10.2.0.7"), ("10.2.0.7", "10.1.0.7", "--in"), ("10.1.0.7", "10.2.0.9"),
                      ("10.1.0.7", "10.2.0.7", "tcp", "1", "22")):  # fmt: skip
        hook, chain, place, verdict = data(config, *arguments)["kernel"]
        assert f"chain {hook} {{" in ruleset
        assert f"jump {chain}" in ruleset
        held = ruleset.partition(f" {place} {{\n")[2].partition("}")[0]
        assert verdict in held


def test_text_fits_80_columns_and_says_the_same(config: Path) -> None:
    for arguments in (("10.1.0.7", "10.2.0.7", "udp", "1000", "53"), ("10.2.0.7", "10.1.0.7", "--in"),
                      ("10.1.0.7", "10.3.0.7"), ("fd00::1", "fd00::2", "icmp6", "8", "0")):  # fmt: skip
        result = run(config, *arguments)
        assert result.exit_code == 0, result.output
        assert max(map(len, result.output.splitlines())) <= 80 or str(config.parent) in result.output
        assert data(config, *arguments)["fate"] in " ".join(result.output.split())


def test_a_missing_sa_and_a_disabled_protocol_are_visible(config: Path) -> None:
    assert data(config, "10.1.0.7", "10.3.0.7")["verdict"] == "held"
    config.write_text(config.read_text() + "net.inet.esp.esp_enable = 0\n")
    answer = data(config, "10.1.0.7", "10.2.0.7")
    assert answer["fate"] == "dropped: net.inet.esp.esp_enable is 0"
    assert "esp_enable=0" in run(config, "10.1.0.7", "10.2.0.7").output


def test_no_key_is_ever_printed(config: Path) -> None:
    for arguments in (("10.1.0.7", "10.2.0.7"), ("10.1.0.7", "10.2.0.7", "--json")):
        assert KEY not in run(config, *arguments).output


@pytest.mark.parametrize("arguments", [("10.1.0.7", "fd00::1"), ("host", "10.2.0.7"), ("10.1.0.7", "10.2.0.7", "nonsense")])
def test_arguments_that_mean_nothing_are_refused(config: Path, arguments: tuple[str, ...]) -> None:
    assert run(config, *arguments).exit_code == 2


def test_neighbour_discovery_is_said_to_pass_before_any_policy(config: Path) -> None:
    assert "neighbour discovery" in data(config, "fd00::1", "fd00::2", "icmp6", "135", "0")["kernel"][0]


@pytest.mark.parametrize("numbers", [("icmp", "300"), ("icmp", "8", "256"), ("1", "256")], ids=" ".join)
def test_types_and_codes_of_icmp_end_at_255(config: Path, numbers: tuple[str, ...]) -> None:
    result = run(config, "10.1.0.7", "10.2.0.7", *numbers)
    assert result.exit_code == 2
    assert "expected a type and a code from 0 to 255" in " ".join(result.output.replace("│", "").split())
    assert run(config, "10.1.0.7", "10.2.0.7", "icmp", "255", "255").exit_code == 0
