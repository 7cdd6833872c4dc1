"""The systemd units: accepted without a word, exposed no more than promised, and still what the daemon needs."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[3] / "systemd" / "ipsecq.service"
BLOCK = UNIT.with_name("ipsecq-nft.service")
CI = UNIT.parents[1] / ".ci"

needs_analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


class Values(dict):
    """Keys of a unit may come several times: all values, in order."""

    def __setitem__(self, key, value):
        if isinstance(value, list) and key in self:
            self[key].extend(value)
        else:
            super().__setitem__(key, value)


@pytest.fixture(scope="module")
def unit():
    return read(UNIT)


@pytest.fixture(scope="module")
def block():
    return read(BLOCK)


def read(path):
    parser = configparser.ConfigParser(
        strict=False, dict_type=Values, interpolation=None, delimiters=("=",), empty_lines_in_values=False
    )
    parser.optionxform = str
    parser.read(path)
    return {name: {key: value.split("\n") for key, value in parser[name].items()} for name in parser.sections()}


def analyze(tmp_path, *argv, unit="ipsecq.service"):
    """systemd-analyze over a unit with a program in ExecStart= that is there on this machine, too."""
    for each in UNIT.parent.glob("*.service"):
        (tmp_path / each.name).write_text(each.read_text().replace("/usr/local/bin/ipsecq", sys.executable))
    return subprocess.run(["systemd-analyze", *argv, str(tmp_path / unit)], capture_output=True, text=True, check=False)


@needs_analyze
@pytest.mark.parametrize("name", sorted(each.name for each in UNIT.parent.glob("*.service")))
def test_verify_has_nothing_to_say(tmp_path, name):
    done = analyze(tmp_path, "verify", "--man=no", unit=name)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_analyze
@pytest.mark.parametrize("unit", [UNIT, BLOCK], ids=lambda unit: unit.name)
def test_exposure_is_2_0_at_most(tmp_path, unit):
    done = analyze(tmp_path, "security", "--no-pager", "--offline=true", "--threshold=20", unit=unit.name)
    assert done.returncode == 0, done.stdout


def test_the_daemon_has_two_capabilities_and_no_way_to_more(unit):
    service = unit["Service"]
    assert service["CapabilityBoundingSet"] == ["CAP_NET_ADMIN CAP_NET_RAW"]
    assert service["AmbientCapabilities"] == ["CAP_NET_ADMIN CAP_NET_RAW"]
    assert service["NoNewPrivileges"] == ["yes"]
    assert service["User"] == ["ipsecq"]


def test_keys_do_not_reach_a_disk(unit):
    assert (unit["Service"]["LimitCORE"], unit["Service"]["LimitMEMLOCK"]) == (["0"], ["infinity"])


def test_replay_windows_live_until_the_next_boot(unit):
    assert unit["Service"]["RuntimeDirectoryPreserve"] == ["yes"]


def test_a_stop_goes_to_the_supervisor_alone(unit):
    """Workers that get SIGTERM too are gone before the rules block."""
    assert unit["Service"]["KillMode"] == ["mixed"]


def test_the_daemon_comes_before_the_network_and_outlives_those_who_flush(unit):
    """Debian's nftables.service flushes at start and at stop; at both its owner tables must be there."""
    before = " ".join(unit["Unit"]["Before"]).split()
    assert {"network-pre.target", "nftables.service"} <= set(before)
    assert unit["Unit"]["DefaultDependencies"] == ["no"]


def test_what_policies_protect_is_blocked_before_any_network_when_the_daemon_fails(unit, block):
    assert "network-pre.target" in " ".join(block["Unit"]["Before"])
    assert {"ipsecq.service", "nftables.service"} <= set(" ".join(block["Unit"]["After"]).split())
    assert block["Unit"]["DefaultDependencies"] == ["no"]
    assert "ipsecq-nft.service" in " ".join(unit["Unit"]["Wants"])
    assert unit["Install"]["Also"] == ["ipsecq-nft.service"], "enabling one enables both"


def test_the_blocking_rules_never_replace_those_of_a_running_daemon(block):
    assert block["Unit"]["ConditionPathExists"] == ["!/run/ipsecq/control"]
    assert block["Service"]["RemainAfterExit"] == ["yes"]
    assert "ExecStop" not in block["Service"], "they stay"
    assert block["Service"]["CapabilityBoundingSet"] == ["CAP_NET_ADMIN"]


def test_every_family_of_sockets_that_the_daemon_opens_is_allowed(unit):
    rooms = ("daemon", "datapath", "netfilter", "metrics")
    text = "".join(path.read_text() for room in rooms for path in (CI.parent / "ipsecq" / room).rglob("*.py"))
    opened = set(re.findall(r"socket\.(AF_[A-Z0-9]+)", text)) - {"AF_UNSPEC"}
    assert "AF_NETLINK" in opened
    assert opened <= set(unit["Service"]["RestrictAddressFamilies"][0].split())


def test_a_mistake_in_a_file_is_not_tried_again(unit):
    assert unit["Service"]["Restart"] == ["on-failure"]
    assert unit["Service"]["RestartPreventExitStatus"] == ["2"]


def test_paths_are_those_of_make_install(unit):
    makefile = (UNIT.parents[1] / "Makefile").read_text()
    for default in ("PREFIX  ?= /opt/ipsecq", "ETC     ?= /etc/ipsecq", "BIN     ?= /usr/local/bin"):
        assert default in makefile
    assert unit["Service"]["ExecStart"] == ["/usr/local/bin/ipsecq run --config /etc/ipsecq/ipsecq.toml"]
    assert "/opt/ipsecq" in unit["Unit"]["RequiresMountsFor"][0]
    assert "useradd --system --gid ipsecq" in (CI / "account").read_text()


def test_the_distributions_own_iked_never_runs_beside_ours():
    text = UNIT.with_name("ipsecq-iked.service").read_text()
    assert "Conflicts=openiked.service\n" in text
    assert "Requires=ipsecq.service\nPartOf=ipsecq.service\nAfter=ipsecq.service" in text
