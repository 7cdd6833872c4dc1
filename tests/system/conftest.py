"""One network for all tests here: a real machine with the package, the Linux kernel's own IPsec as its peer.

    host 10.1.0.2 ── lan [machine in QEMU] wan 192.0.2.1 ── router ── 198.51.100.1 [User-Mode Linux] 10.2.0.2

The tests are one story, told in the order of the file: each takes the machine as the one before left it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import image
import machine

from ipsecq.lab import uml
from ipsecq.lab.netns import Lab, LabError, Namespace
from ipsecq.lab.topology import forward

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    why = image.missing() or uml.missing()
    for item in items:
        if Path(__file__).parent in Path(item.path).parents and why:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def package():
    """The Debian package, built from this checkout; or the one that PACKAGE in the environment names."""
    if given := os.environ.get("PACKAGE"):
        return Path(given)
    done = subprocess.run([ROOT / ".ci/deb", "build"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / done.stdout.split()[-1]


@dataclass
class Stage:
    """Everything that plays."""

    host: Namespace
    router: Namespace
    box: machine.Machine
    peer: uml.UmlPeer
    seconds: dict[str, float] = field(default_factory=dict)
    keys: tuple[str, str] = ("", "")

    def fresh_keys(self):
        """New keys at both ends: what the machine reads, and what the peer's kernel holds."""
        self.keys = secrets.token_hex(20), secrets.token_hex(20)
        ends = (("192.0.2.1", "198.51.100.1", "0x1001"), ("198.51.100.1", "192.0.2.1", "0x1002"))
        peer = ["xfrm state flush", "xfrm policy flush"]
        lines = ["flush;", "spdflush;"]
        for (src, dst, spi), key in zip(ends, self.keys, strict=True):
            lines.append(f"add {src} {dst} esp {spi} -m tunnel -r 32 -E aes-gcm-16 0x{key};")
            peer.append(
                f"xfrm state add src {src} dst {dst} proto esp spi {spi} reqid 1 mode tunnel replay-window 128 "
                f"aead rfc4106(gcm(aes)) 0x{key} 128"
            )
        near, far = "10.1.0.0/24", "10.2.0.0/24"
        lines += [
            f"spdadd {near} {far} any -P out ipsec esp/tunnel/192.0.2.1-198.51.100.1/require;",
            f"spdadd {far} {near} any -P in ipsec esp/tunnel/198.51.100.1-192.0.2.1/require;",
        ]
        out, back = "src 198.51.100.1 dst 192.0.2.1", "src 192.0.2.1 dst 198.51.100.1"
        peer.append(f"xfrm policy add src {far} dst {near} dir out tmpl {out} proto esp reqid 1 mode tunnel")
        peer += [
            f"xfrm policy add src {near} dst {far} dir {way} tmpl {back} proto esp reqid 1 mode tunnel"
            for way in ("in", "fwd")
        ]
        self.peer.ip(*peer)
        self.box.write("/etc/ipsecq/setkey.conf", "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def stage(package):
    with Lab() as lab:
        host, router = lab.namespace("hosta"), lab.namespace("router")
        forward(router)
        wan, lan = machine.open_tap(router, "left"), machine.open_tap(host, "eth0")
        router.run("ip", "tuntap", "add", "dev", "right", "mode", "tap")
        router.run("ip", "link", "set", "right", "up")
        router.run("ip", "addr", "add", "192.0.2.254/24", "dev", "left")
        router.run("ip", "addr", "add", "198.51.100.254/24", "dev", "right")
        host.run("ip", "addr", "add", "10.1.0.2/24", "dev", "eth0")
        host.run("ip", "route", "add", "default", "via", "10.1.0.1")
        peer = uml.UmlPeer(router, "right")
        peer.ip(
            "link add lan0 type dummy",
            "link set lan0 up",
            "addr add 198.51.100.1/24 dev eth0",
            "addr add 10.2.0.2/24 dev lan0",
            "route add default via 198.51.100.254",
            "route add 10.1.0.0/24 via 198.51.100.254 src 10.2.0.2",
        )
        box = machine.Machine(router, image.build(), wan, lan, package)
        yield Stage(host, router, box, peer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The daemon's journal beside a failure."""
    report = yield
    if report.failed and call.when == "call" and (stage := item.funcargs.get("stage")) is not None:
        with contextlib.suppress(LabError, OSError, KeyError):
            journal = stage.box.shell("journalctl -b -u ipsecq -u ipsecq-nft --no-pager | tail -40")
            report.sections.append(("journal", journal))
    return report
