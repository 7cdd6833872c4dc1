"""One real daemon in a namespace: what it trusts after a restart, what it keeps of its rights, what a reload may do."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from ipsecq.lab.gateway import Gateway
from ipsecq.lab.netns import Lab, wait_for

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

SETKEY = """
flush; spdflush;
add 192.0.2.1 192.0.2.2 esp 0x1001 -m tunnel -r 32 -E aes-gcm-16 0x000102030405060708090a0b0c0d0e0f10111213;
spdadd 10.1.0.1/32 10.2.0.0/16 any -P out ipsec esp/tunnel/192.0.2.1-192.0.2.2/require;
"""


@pytest.fixture
def gateway():
    with Lab() as lab:
        space = lab.namespace("gw")
        space.ip(
            "link set lo up",
            "link add v0 type veth peer name v1",
            "addr add 192.0.2.1/24 dev v0",
            "addr add 10.1.0.1/32 dev v0",
            "link set v0 up",
            "link set v1 up",
            "neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev v0",
            "route add default via 192.0.2.2",
        )
        yield Gateway(space, SETKEY, workers=1)


def send(gateway):
    """One packet for the tunnel, which nobody answers; the SA as status shows it when a worker is through with it."""

    def handled():
        return gateway.metric("ipsecq_packet_seconds_count")

    before = handled()
    gateway.space.run("ping", "-c", "1", "-W", "0.2", "-I", "10.1.0.1", "10.2.0.1", check=False)
    wait_for(lambda: handled() > before, "a worker to be through with the packet", 20)
    return gateway.status()["sas"][0]


def test_a_restored_state_directory_does_not_send_until_it_is_told_of_new_keys(gateway):
    gateway.start()
    before = send(gateway)
    assert before["sequence"] >= 1
    assert gateway.stop() == 0
    state, backup = gateway.directory / "state", gateway.directory / "backup"
    shutil.copytree(state, backup)
    gateway.start()
    sent = send(gateway)["sequence"]
    assert sent > before["sequence"]
    gateway.kill()
    shutil.rmtree(state)
    backup.rename(state)
    gateway.start()
    refused = send(gateway)
    assert refused["sequence"] == sent
    assert "ipsecq state reset 0x00001001" in refused["problem"]
    assert gateway.metric("ipsecq_sa_refused", spi="0x00001001") == 1
    assert gateway.metric("ipsecq_drops_total", reason="esp_noseq") == 1
    assert "1 SA may send" in gateway.command("state", "reset", "0x1001").stdout
    deadline = 20
    while (after := send(gateway))["sequence"] == sent and deadline:
        deadline -= 1
    assert after["sequence"] > sent
    assert after["problem"] == ""


def test_daemon_and_workers_keep_no_more_rights_than_they_use(gateway):
    gateway.start()

    def effective(pid):
        with open(f"/proc/{pid}/status") as lines:
            return [int(line.split()[1], 16) for line in lines if line.startswith(("CapEff", "CapPrm", "CapBnd"))]

    assert gateway.process is not None
    assert effective(gateway.process.pid) == [1 << 12 | 1 << 13] * 3
    [worker] = gateway.workers()
    assert effective(worker) == [1 << 12] * 3


def test_a_second_daemon_for_the_same_run_directory_is_refused(gateway):
    gateway.start()
    second = gateway.command("run", check=False)
    assert second.returncode == 1
    assert "another ipsecq serves this run directory" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert gateway.status()["workers"][0]["up"]


def test_a_reload_with_another_window_goes_on_with_the_numbers(gateway):
    gateway.start()
    before = send(gateway)
    gateway.policy.write_text(SETKEY.replace("-r 32", "-r 256"))
    gateway.command("reload")
    after = send(gateway)
    assert after["replay_window"] == 2048
    assert after["sequence"] > before["sequence"]
    assert after["packets"] == before["packets"] + 1


def test_a_reload_that_nft_refuses_leaves_everything_as_it_was(gateway):
    gateway.start()
    before = gateway.status()
    # A table that the loader wants to change has gone, and nft with it: the reload fails at its very last step.
    broken = gateway.directory / "bin"
    broken.mkdir()
    gateway.policy.write_text(SETKEY + "spdadd 10.1.0.1/32 10.3.0.0/16 any -P out ipsec esp/transport//require;\n")
    gateway.stop()
    (broken / "nft").write_text(
        '#!/bin/sh\ntest -e "$(dirname "$0")/refuse" && { echo refused >&2; exit 1; }\nexec /usr/sbin/nft "$@"\n'
    )
    (broken / "nft").chmod(0o755)
    gateway.policy.write_text(SETKEY)
    os.environ["PATH"], old = f"{broken}:{os.environ['PATH']}", os.environ["PATH"]
    try:
        gateway.start()
        gateway.policy.write_text(SETKEY + "spdadd 10.1.0.1/32 10.3.0.0/16 any -P out ipsec esp/transport//require;\n")
        (broken / "refuse").touch()
        result = gateway.command("reload", check=False)
        (broken / "refuse").unlink()
    finally:
        os.environ["PATH"] = old
    assert result.returncode == 1
    assert "refused" in result.stderr
    after = gateway.status()
    assert json.dumps(after["policies"]) == json.dumps(before["policies"])
    assert not after["reload"]["success"]
    assert send(gateway)["packets"] >= 1


def test_a_file_that_is_a_fifo_is_refused_and_the_daemon_goes_on(gateway):
    gateway.start()
    text = gateway.policy.read_text()
    gateway.policy.unlink()
    os.mkfifo(gateway.policy)
    refused = gateway.command("reload", check=False)
    assert refused.returncode == 2
    assert refused.stderr == f"ipsecq: {gateway.policy}: cannot be read: expected a regular file, found a FIFO\n"
    gateway.policy.unlink()
    gateway.policy.write_text(text)
    gateway.command("reload")
    assert gateway.stop() == 0


def test_new_keys_after_a_refused_state_file_wait_for_the_operators_word_for_all(gateway):
    gateway.start()
    gateway.stop()
    (gateway.directory / "state" / "sequences").write_bytes(b"x" * 100)
    gateway.start()
    assert "refuse to send until they are reset" in gateway.command("status").stdout
    assert "1 SA may send" in gateway.command("state", "reset", "0x1001").stdout
    more = SETKEY.splitlines()[2].replace("0x1001", "0x1002").replace("0x0001", "0x1111")
    gateway.policy.write_text(SETKEY + more + "\n")
    gateway.command("reload")
    assert [sa["spi"] for sa in gateway.status()["sas"] if sa["problem"]] == ["0x00001002"]
    assert gateway.command("state", "reset", "--all").stdout == "all: 1 SA may send\n"
    gateway.policy.write_text(SETKEY + more + "\n" + more.replace("0x1002", "0x1003").replace("0x1111", "0x2222") + "\n")
    gateway.command("reload")
    assert [sa["problem"] for sa in gateway.status()["sas"]] == ["", "", ""]
    assert gateway.status()["state"] == []


def test_replay_windows_that_are_lost_are_told(gateway):
    gateway.start()
    gateway.kill()
    (gateway.directory / "run" / "table").unlink()
    gateway.start()
    [lost] = gateway.status()["state"]
    assert "replay windows of this boot are forgotten" in lost
    assert lost in gateway.log.read_text()
    assert f"STATE LOST: {lost}" in gateway.command("status").stdout
    gateway.kill()
    gateway.start()
    assert gateway.status()["state"] == []


def test_what_commands_say_into_a_full_disk_fails_in_one_line(gateway):
    gateway.start()
    for command, status, said in (
        ("status", 1, ["ipsecq: standard output: No space left on device"]),
        ("stat", 1, ["ipsecq: standard output: No space left on device"]),
        ("setkey -D", 1, ["ipsecq: standard output: No space left on device"]),
        ("tap -n 1", 2, ["0 packets captured, 0 dropped", "ipsecq: standard output: No space left on device"]),
        ("tap -w /dev/full -n 1", 2, ["0 packets captured, 0 dropped", "ipsecq: /dev/full: No space left on device"]),
    ):
        line = f"exec {sys.executable} -m ipsecq {command} --config {gateway.config} >/dev/full"
        done = gateway.space.run("sh", "-c", line, check=False)
        assert (done.returncode, done.stderr.splitlines()) == (status, said), command


def test_a_monitor_whose_reader_has_gone_ends(gateway):
    gateway.start()
    argv = gateway.space.argv([sys.executable, "-m", "ipsecq", "monitor", "--config", str(gateway.config)])
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        process.wait(60)  # nothing else happens in this gateway
