"""A Debian machine with its own kernel and systemd: install, start, traffic, restart, reboot, remove."""

from __future__ import annotations

import sys
import time

import pytest

from ipsecq.lab.capture import Capture, in_clear, other_than_esp, repeated_sequence_numbers
from ipsecq.lab.interop import TCP_END
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.uml, pytest.mark.seconds(900)]

LANS = ("10.1.0.0/24", "10.2.0.0/24")
FAR = "10.2.0.2"


class Unceasing:
    """A host that goes on asking for the other side, whatever happens to its gateway."""

    def __init__(self, stage):
        self.stage = stage

    def __enter__(self):
        self.process = self.stage.host.popen("ping", "-n", "-q", "-i", "0.1", FAR)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def answered(stage, seconds=60.0):
    return wait_for(lambda: ping(stage.host, FAR, count=1, wait=2), "an answer through the tunnel", seconds, 0.5)


def test_the_package_installs_with_its_account_and_modes(stage, package):
    box = stage.box
    started = time.monotonic()
    box.run("dpkg", "-i", f"/root/{package.name}", timeout=400)
    stage.seconds["install"] = time.monotonic() - started
    modes = box.shell("stat -c '%a %U %G %n' /etc/ipsecq /etc/ipsecq/* && getent passwd ipsecq").splitlines()
    assert modes[:4] == [
        "750 root ipsecq /etc/ipsecq",
        "755 root root /etc/ipsecq/inner.d",
        "640 root ipsecq /etc/ipsecq/ipsecq.toml",
        "640 root ipsecq /etc/ipsecq/setkey.conf",
    ]
    assert modes[4].endswith(":/nonexistent:/usr/sbin/nologin")
    assert box.run("ipsecq", "version", timeout=120).out.startswith("ipsecq ")
    assert box.shell("systemctl is-enabled ipsecq ipsecq-nft", check=False).split() == ["disabled", "disabled"]


def test_enabling_starts_the_daemon_with_native_queue_rules(stage):
    stage.fresh_keys()
    box = stage.box
    started = time.monotonic()
    box.run("systemctl", "enable", "--now", "ipsecq", timeout=200)
    stage.seconds["start"] = time.monotonic() - started
    assert box.shell("systemctl is-active ipsecq").strip() == "active"
    assert box.shell("systemctl is-enabled ipsecq ipsecq-nft").split() == ["enabled", "enabled"]
    # What nft itself can list and load again is its own statement, not a target of iptables.
    rules = box.shell("nft list table inet ipsecq")
    assert "queue" in rules
    assert "XT target" not in rules
    assert "queues by nft queue" in box.shell("journalctl -b -u ipsecq --no-pager")
    assert box.shell("lsmod | grep -E '^(esp4|esp6|ah4|ah6|ipcomp|af_key) '", check=False) == "", "IPsec of the kernel's own"
    modes = box.shell("stat -c '%a %U' /var/lib/ipsecq /run/ipsecq").split()
    assert modes == ["700", "ipsecq", "755", "ipsecq"]


def test_ping_and_tcp_go_through_the_tunnel_to_the_kernels_own_ipsec(stage):
    with Capture(stage.router, "left") as wire:
        answered(stage)
        assert ping(stage.host, FAR, count=5, size=1300, wait=3) == 5
        for sender, receiver, address in (("host", "peer", FAR), ("peer", "host", "10.1.0.2")):
            assert tcp(stage, sender, receiver, address, 200_000)
        wire.settle()
        frames = wire.frames()
    assert in_clear(frames, *LANS) == []
    assert other_than_esp(frames) == []
    assert len([frame for frame in frames if frame.esp]) > 300
    stage.peer.run("ip", "-s", "xfrm", "state")


def tcp(stage, sender, receiver, address, octets):
    """Send from one side to the other; whether both have the same digest."""
    ends = {"host": (stage.host, sys.executable), "peer": (stage.peer, "/usr/bin/python3")}
    space, python = ends[receiver]
    output = stage.peer.root / "run" / "tcp" if receiver == "peer" else stage.host.lab.directory / "tcp"
    argv = ("sh", "-c", f"exec {python} {TCP_END} receive {address} 5001 >{output} 2>&1")
    pid = space.spawn(*argv) if receiver == "peer" else space.popen(*argv)
    text = (lambda: stage.peer.run("cat", str(output)).out) if receiver == "peer" else output.read_text
    sockets = (lambda: stage.peer.run("ss", "-ltn").out) if receiver == "peer" else (lambda: space.run("ss", "-ltn").stdout)
    wait_for(lambda: ":5001" in sockets(), "the listener")
    space, python = ends[sender]
    done = space.run(python, TCP_END, "send", address, "5001", str(octets), "7", timeout=60)
    sent = done.out if sender == "peer" else done.stdout
    wait_for(text, "the digest of the receiver")
    if receiver == "peer":
        stage.peer.kill(pid)
    return text() == sent and sent.startswith(f"{octets} ")


def test_systemd_finds_little_exposed(stage):
    for unit in ("ipsecq", "ipsecq-nft"):
        line = stage.box.shell(f"systemd-analyze security --no-pager {unit} | grep Overall", timeout=120)
        assert float(line.split(":")[1].split()[0]) <= 2.0, line


def test_a_restart_leaks_nothing_and_the_tunnel_is_back(stage):
    with Capture(stage.router, "left") as wire, Unceasing(stage):
        stage.box.run("systemctl", "restart", "ipsecq", timeout=200)
        answered(stage)
        wire.settle()
        frames = wire.frames()
    assert in_clear(frames, *LANS) == []
    assert repeated_sequence_numbers(frames) == []


def test_a_killed_daemon_leaks_nothing_and_comes_back_by_itself(stage):
    with Capture(stage.router, "left") as wire, Unceasing(stage):
        pid = stage.box.shell("systemctl show -p MainPID --value ipsecq").strip()
        stage.box.run("kill", "-9", pid)
        wait_for(lambda: pid not in stage.box.shell("systemctl show -p MainPID --value ipsecq").split(), "a new daemon", 60)
        stage.box.wait_active("ipsecq")
        answered(stage)
        wire.settle()
        frames = wire.frames()
    assert in_clear(frames, *LANS) == []
    assert repeated_sequence_numbers(frames) == []


def test_a_reboot_leaks_nothing_and_the_tunnel_comes_back_by_itself(stage):
    with Capture(stage.router, "left") as wire, Unceasing(stage):
        stage.seconds["reboot"] = stage.box.reboot()
        answered(stage, 120)
        wire.settle()
        frames = wire.frames()
    assert in_clear(frames, *LANS) == []
    assert repeated_sequence_numbers(frames) == []
    box = stage.box
    assert box.shell("systemctl is-active ipsecq").strip() == "active"
    assert box.shell("systemctl --failed --no-legend").strip() == ""
    stamps = [
        int(box.shell(f"systemctl show -p {when}TimestampMonotonic --value {unit}"))
        for unit, when in (("ipsecq", "ActiveEnter"), ("nftables", "InactiveExit"), ("systemd-networkd", "InactiveExit"))
    ]
    assert stamps == sorted(stamps), "the daemon, then the operator's rules, then the network"
    assert "table inet operator" in box.shell("nft list ruleset"), "the operator's own rules are untouched"


def test_a_mistake_in_the_files_blocks_after_a_reboot_instead_of_letting_pass(stage):
    box = stage.box
    good = box.shell("cat /etc/ipsecq/setkey.conf")
    box.write("/etc/ipsecq/setkey.conf", good + "spdadd nonsense;\n")
    with Capture(stage.router, "left") as wire, Unceasing(stage):
        box.reboot()
        wait_for(lambda: box.run("systemctl", "is-failed", "-q", "ipsecq", check=False).rc == 0, "the refusal", 60, 0.5)
        assert ping(stage.host, FAR, count=3, wait=2) == 0
        wire.settle()
        assert in_clear(wire.frames(), *LANS) == []
    assert box.shell("systemctl is-active ipsecq-nft").strip() == "active"
    assert "setkey.conf:" in box.shell("journalctl -b -u ipsecq --no-pager")
    box.write("/etc/ipsecq/setkey.conf", good)
    box.run("systemctl", "start", "ipsecq", timeout=200)
    answered(stage)


def test_removing_leaves_configuration_and_state_and_purging_nothing(stage):
    box = stage.box
    box.run("dpkg", "-r", "ipsecq", timeout=200)
    left = box.shell("find / -xdev -iname '*ipsecq*' -not -path '/proc/*' -not -path '/root/*' -not -path '/var/lib/dpkg/*'")
    assert sorted(left.split()) == ["/etc/ipsecq", "/etc/ipsecq/ipsecq.toml", "/var/lib/ipsecq"]
    assert "setkey.conf" in box.shell("ls /etc/ipsecq")
    box.run("dpkg", "-P", "ipsecq", timeout=60)
    left = box.shell("find /etc /var/lib /run /usr /lib -xdev -iname '*ipsecq*' -not -path '/var/lib/dpkg/*'")
    assert left == ""
    print("seconds:", {"boot": round(box.boot_seconds), **{name: round(value) for name, value in stage.seconds.items()}})
