"""The Linux kernel's own IPsec as a peer: a User-Mode Linux on a tap device, booted once, commanded many times.

Debian's ``user-mode-linux`` brings the kernel, the host's file system (hostfs) brings every program.  The guest writes
only below its temporary directory.  Commands travel as JSON lines over a serial line that is one end of a socket
pair, so nothing in the guest's network has to work for the peer to be controlled.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from ipsecq.lab.agent import Agent
from ipsecq.lab.netns import LabError, Namespace

KERNEL: Final = "/usr/bin/linux.uml"
MODULES_DIRECTORY: Final = Path("/usr/lib/uml/modules")
MODULES: Final = (
    "esp4", "esp6", "ah4", "ah6", "ipcomp", "ipcomp6", "xfrm_user", "af_key", "tunnel4", "tunnel6", "xfrm4_tunnel",
    "xfrm6_tunnel", "aes_generic", "udp_tunnel", "ip6_udp_tunnel", "dummy",
)  # fmt: skip
BOOT_SECONDS: Final = 30.0

_INIT: Final = """#!/bin/sh
# PID 1 of the peer: file systems, modules, then the agent.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs {root}/run
mount -t tmpfs tmpfs /run
mknod {root}/run/agent c 4 65
echo {root}/modprobe > /proc/sys/kernel/modprobe
modprobe -d {root} -a {modules}
ip link set lo up
ip link set vec0 name eth0 address {mac} 2>/dev/null || ip link set vec0 name eth0
ip link set eth0 up
echo 1 > /proc/sys/net/ipv4/ip_forward
for f in /proc/sys/net/ipv6/conf/*/accept_dad; do echo 0 > $f; done
echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
{python} -I {agent} {root}/run/agent
echo o > /proc/sysrq-trigger
sleep 5
"""


def missing() -> str:
    """Why User-Mode Linux cannot run here, or an empty string."""
    if not Path(KERNEL).exists() or not MODULES_DIRECTORY.is_dir():
        return "Debian package user-mode-linux is not installed"
    if shutil.which("depmod") is None:
        return "Debian package kmod is not installed"
    return "" if os.geteuid() == 0 else "needs root"


class UmlPeer(Agent):
    """One booted kernel.  It owns the far end of ``tap`` in ``space``; its own device is called ``eth0``.

    Raises LabError with the console's last lines when it doesn't come up or a checked command fails.
    """

    def __init__(self, space: Namespace, tap: str, *, memory: str = "256M", mac: str = "02:00:00:00:00:02") -> None:
        self.space, self.tap = space, tap
        self.root = space.lab.directory / f"uml-{tap}"
        self.console = self.root / "console"
        self.spawn_log = str(self.root / "run" / "spawned")
        self._files = 0
        self._process: subprocess.Popen[bytes] | None = None
        if why := missing():
            raise LabError(f"no User-Mode Linux: {why}")
        version = self._prepare(mac)
        ours, theirs = socket.socketpair()
        self._line = ours
        space.lab.on_close(self.close)
        descriptor = theirs.fileno()
        try:
            self._process = space.popen(
                KERNEL, "rootfstype=hostfs", "root=/dev/root", "rootflags=/", "rw", f"mem={memory}", "quiet",
                f"uml_dir={self.root}/run-host/", f"vec0:transport=tap,ifname={tap},depth=128,gro=0",
                f"init={self.root}/init", "con=null", "con0=null,fd:1", "ssl=null", f"ssl1=fd:{descriptor}",
                log=self.console, pass_fds=[descriptor], env={"TMPDIR": "/dev/shm"},  # noqa: S108 - the guest's memory is a file there
            )  # fmt: skip
        finally:
            theirs.close()
        started = time.monotonic()
        try:
            self._receive(BOOT_SECONDS)
        except LabError:
            self.close()
            raise
        self.version, self.boot_seconds = version, time.monotonic() - started

    def _prepare(self, mac: str) -> str:
        versions = sorted(path.name for path in MODULES_DIRECTORY.iterdir())
        version = versions[-1]
        for name in ("run", "run-host", "lib/modules"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        shutil.copytree(MODULES_DIRECTORY / version, self.root / "lib/modules" / version, symlinks=True)
        self.space.lab.run("depmod", "-b", str(self.root), version)
        agent = Path(__file__).with_name("uml_agent.py")
        python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
        text = _INIT.format(root=self.root, modules=" ".join(MODULES), agent=agent, python=python, mac=mac)
        for name, content in (("init", text), ("modprobe", f'#!/bin/sh\nexec /sbin/modprobe -d {self.root} "$@"\n')):
            (self.root / name).write_text(content)
            (self.root / name).chmod(0o755)
        return version

    def __enter__(self) -> UmlPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ip(self, *lines: str) -> None:
        """Run many ``ip`` command lines (without the word ``ip``) in one go; LabError at the first that fails."""
        self.run("ip", "-batch", self.file("\n".join(lines) + "\n"), timeout=60)

    def ip_force(self, *lines: str) -> dict[int, str]:
        """The same, but all lines are tried; the reasons of those that failed, by their place."""
        done = self.run("ip", "-force", "-batch", self.file("\n".join(lines) + "\n"), check=False, timeout=60)
        failed: dict[int, str] = {}
        said: list[str] = []
        for line in done.err.splitlines():
            if match := re.match(r"Command failed .*:(\d+)$", line):
                failed[int(match[1]) - 1] = " ".join(said) or "refused"
                said = []
            else:
                said.append(line)
        return failed

    def file(self, text: str) -> str:
        """A new file with this text that the peer can read: the serial line loses what is long.

        Each has a name of its own, since the peer's page cache does not see a change.
        """
        self._files += 1
        path = self.root / f"file{self._files}"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def flush(self) -> None:
        """Forget all states and policies."""
        self.ip("xfrm state flush", "xfrm policy flush")

    def close(self) -> None:
        """Switch the kernel off; end the process if it does not go by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_RDWR)  # the agent reads an end of file and init switches off
            self._line.close()
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
