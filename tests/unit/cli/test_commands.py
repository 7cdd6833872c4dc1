"""The command line: one line for a mistake, its exit status, no traceback, no key; and what needs no daemon works."""

import json
import os
import subprocess
import sys

import pytest

from ipsecq.lab.netns import Lab
from ipsecq.sysctl import VARIABLES

KEY = "5ec7e7" * 6 + "5ec7"
POLICY = f"""flush; spdflush;
add 192.0.2.1 198.51.100.1 esp 0x1001 -m tunnel -r 32 -E aes-gcm-16 0x{KEY};
add 198.51.100.1 192.0.2.1 esp 0x1002 -m tunnel -r 32 -E aes-gcm-16 0x{KEY};
spdadd 10.1.0.0/16 10.2.0.0/16 any -P out ipsec esp/tunnel/192.0.2.1-198.51.100.1/require;
spdadd 10.2.0.0/16 10.1.0.0/16 any -P in ipsec esp/tunnel/198.51.100.1-192.0.2.1/require;
"""


@pytest.fixture
def config(tmp_path):
    """A configuration, and the policy file beside it."""
    (tmp_path / "setkey.conf").write_text(POLICY)
    path = tmp_path / "ipsecq.toml"
    path.write_text(
        f'[daemon]\npolicy = ["setkey.conf"]\nworkers = 2\nstate_dir = "{tmp_path}/state"\nrun_dir = "{tmp_path}/run"\n'
    )
    return path


def ipsecq(*argv):
    return subprocess.run([sys.executable, "-m", "ipsecq", *argv], capture_output=True, text=True, check=False, timeout=60)


def fails_in_one_line(done, status):
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("ipsecq: ")
    assert KEY not in line
    return line.removeprefix("ipsecq: ")


# -- output that cannot be written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("argv", [["version"], ["nft"], ["sysctl", "-a", "-d"], ["--help"]], ids=" ".join)
def test_a_full_disk_behind_the_output_is_one_line(config, argv, unbuffered):
    more = ["--config", str(config)] if argv[0] in ("nft", "sysctl") else []
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ipsecq", *argv, *more], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            timeout=60, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "ipsecq: standard output: No space left on device\n")


def test_a_reader_that_has_gone_is_no_fault(config):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ipsecq", "version"], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_interval_is_a_number(config, value):
    done = ipsecq("top", "--once", "--config", str(config), f"--interval={value}")
    assert done.returncode == 2
    assert "--interval" in done.stderr


# -- mistakes in files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "nft", "status", "doctor"])
def test_a_mistake_in_the_configuration_is_one_line_with_its_place(config, command):
    config.write_text('[daemon]\nworkers = "many"\n')
    line = fails_in_one_line(ipsecq(command, "--config", str(config)), 2)
    assert line == f'{config}:2:11: workers: expected a number from 0 to 256, found "many"'


@pytest.mark.parametrize(
    ("sentence", "column"),
    [
        ("add 192.0.2.1 198.51.100.1 esp 0x1003 -E aes-gcm-16 0x" + KEY[:10] + ";", 1),
        ("spdadd 10.0.0.0/8 nonsense any -P out none;", 19),
        ("add 192.0.2.1 198.51.100.1 esp 0x1001 -E aes-gcm-16 0x" + KEY + ";", 1),
    ],
    ids=["key-length", "address", "twice"],
)
def test_a_mistake_in_a_policy_file_is_one_line_with_its_place_and_starts_nothing(config, tmp_path, sentence, column):
    path = tmp_path / "setkey.conf"
    path.write_text(POLICY + sentence + "\n")
    line = fails_in_one_line(ipsecq("run", "--config", str(config)), 2)
    place, _, message = line.partition(": ")
    assert place.rsplit(":", 1)[0] == f"{path}:6"
    assert int(place.rsplit(":", 1)[1]) >= column
    assert message
    assert KEY[:10] not in line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "state").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    missing = tmp_path / "none.toml"
    assert fails_in_one_line(ipsecq("run", "--config", str(missing)), 2) == (
        f"{missing}: cannot be read: No such file or directory"
    )


def unreadable(path, kind):
    """A path that cannot be read as a file."""
    match kind:
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "below a file":
            path.write_text("")
            path = path / "file"
    return path


KINDS = {"missing": "No such file or directory", "directory": "Is a directory", "loop": "Too many levels of symbolic links",
         "below a file": "Not a directory"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "command",
    [
        ["setkey", "-f", "FILE"],
        ["nft", "--config", "CONFIG"],
        ["pcap", "decrypt", "-c", "SETKEY", "FILE", "-"],
    ],
    ids=["setkey", "policy", "pcap"],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name_and_the_reason(config, tmp_path, command, kind):
    path = unreadable(tmp_path / "file", kind)
    config.write_text(f'[daemon]\npolicy = ["{path}"]\n')
    names = {"FILE": str(path), "CONFIG": str(config), "SETKEY": str(tmp_path / "setkey.conf")}
    line = fails_in_one_line(ipsecq(*(names.get(word, word) for word in command)), 2)
    assert line == f"{path}: cannot be read: {KINDS[kind]}"


@pytest.mark.parametrize("kind", ["loop", "below a file"])
def test_doctor_examines_the_machine_alone_only_where_there_is_no_configuration(tmp_path, kind):
    path = unreadable(tmp_path / "file", kind)
    assert fails_in_one_line(ipsecq("doctor", "--config", str(path)), 2) == f"{path}: cannot be read: {KINDS[kind]}"


def test_octets_that_are_no_text_are_a_mistake_in_one_line(tmp_path):
    path = tmp_path / "sentences"
    for octets, column in ((b"\xff\xfe", 1), (b"flush;\0", 7), (b'flush; "\xff', 8)):
        path.write_bytes(octets)
        assert fails_in_one_line(ipsecq("setkey", "-n", "-f", str(path)), 2).startswith(f"{path}:1:{column}: expected ")


# -- without a daemon ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["status"], ["stat"], ["reload"], ["sysctl", "net.inet.ipsec.dfbit"]])
def test_without_a_daemon_commands_say_where_they_looked(config, tmp_path, command):
    line = fails_in_one_line(ipsecq(*command, "--config", str(config)), 1)
    assert f"{tmp_path}/run/control" in line
    assert "is ipsecq running" in line


def test_sysctl_describes_every_variable_without_a_daemon(config):
    done = ipsecq("sysctl", "-a", "-d", "--config", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    described = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(described) == list(VARIABLES)
    assert all(described.values())


def test_an_unknown_oid_is_an_error_in_sysctls_words(config):
    line = fails_in_one_line(ipsecq("sysctl", "-d", "net.inet.ipsec.nonsense", "--config", str(config)), 1)
    assert "unknown oid 'net.inet.ipsec.nonsense'" in line


def test_help_names_every_command():
    done = ipsecq("--help")
    assert done.returncode == 0
    for command in ("run", "status", "stat", "reload", "sysctl", "nft", "doctor", "exec", "version"):
        assert command in done.stdout


# -- what this machine can do ----------------------------------------------------------------------------------------


@pytest.fixture
def space():
    with Lab() as lab:
        yield lab.namespace("cli")


@pytest.mark.root
def test_nft_prints_a_ruleset_that_nft_accepts(config, space):
    done = ipsecq("nft", "--config", str(config))
    assert (done.returncode, done.stderr) == (0, "")
    assert KEY not in done.stdout
    assert "10.1.0.0" in done.stdout
    # The queue statement is the one thing that not every kernel has.
    text = "".join(line for line in done.stdout.splitlines(keepends=True) if " queue " not in line)
    space.run("nft", "-c", "-f", "-", stdin=text)
    assert "ipsecq" not in space.run("nft", "list", "tables").stdout
    space.run("nft", "-f", "-", stdin=text)
    assert "table inet ipsecq" in space.run("nft", "list", "tables").stdout
    queues = [line.split()[-1] for line in done.stdout.splitlines() if " queue " in line]
    assert {"18768", "18769", "18768-18775"} <= set(queues)


@pytest.mark.root
def test_doctor_examines_this_machine_and_its_exit_status_says_whether_to_mend(config, space):
    done = space.run(sys.executable, "-m", "ipsecq", "doctor", "--json", "--config", str(config), check=False)
    findings = json.loads(done.stdout)
    assert {finding["grade"] for finding in findings} <= {"ok", "warn", "fail"}
    assert done.returncode == any(finding["grade"] == "fail" for finding in findings)
    subjects = {finding["subject"] for finding in findings}
    assert {"queue", "forwarding", "rp_filter", "tun"} <= subjects
    assert all(finding["mend"] for finding in findings if finding["grade"] != "ok")
    assert "ipsecq" not in space.run("nft", "list", "tables").stdout
