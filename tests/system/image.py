"""The disk of the test machine: Debian's own packages, kernel and systemd; made once, kept in build/system.

``mmdebstrap`` makes the root file system, the stock cloud kernel is unpacked beside it, and a small initramfs finds the
disk.  What the tests change, they change in a copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "build" / "system"
AGENT = ROOT / "ipsecq/lab/uml_agent.py"
MIRROR = os.environ.get("MIRROR", "http://deb.debian.org/debian")
PACKAGES = (
    "systemd", "systemd-sysv", "udev", "kmod", "nftables", "iproute2", "iputils-ping", "python3", "libnetfilter-queue1",
    "procps",
)  # fmt: skip
DISK_MB = 1200
WAN_MAC, LAN_MAC = "02:00:00:00:01:01", "02:00:00:00:01:02"

_FILES = {
    "etc/hostname": "gw1\n",
    "etc/hosts": "127.0.0.1 localhost gw1\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/fstab": "/dev/vda / ext4 defaults,noatime 0 0\n",
    "etc/sysctl.d/gateway.conf": "net.ipv4.ip_forward = 1\nnet.ipv6.conf.all.disable_ipv6 = 1\n",
    "etc/systemd/network/10-wan.link": f"[Match]\nMACAddress={WAN_MAC}\n[Link]\nName=wan\n",
    "etc/systemd/network/10-lan.link": f"[Match]\nMACAddress={LAN_MAC}\n[Link]\nName=lan\n",
    "etc/systemd/network/20-wan.network": (
        "[Match]\nName=wan\n[Network]\nAddress=192.0.2.1/24\nGateway=192.0.2.254\nLinkLocalAddressing=no\n"
    ),
    "etc/systemd/network/20-lan.network": "[Match]\nName=lan\n[Network]\nAddress=10.1.0.1/24\nLinkLocalAddressing=no\n",
    # An operator's own rules, loaded by Debian's nftables.service, which begins with a flush.
    "etc/nftables.conf": (
        "flush ruleset\n"
        "table inet operator {\n"
        "  chain forward {\n"
        "    type filter hook forward priority 0; policy drop;\n"
        "    ct state established,related accept\n"
        '    iifname "lan" accept\n'
        '    iifname "enc0" accept\n'
        "  }\n"
        "}\n"
    ),
    "etc/systemd/system/agent.service": (
        "[Unit]\nAfter=multi-user.target\n[Service]\nExecStart=/usr/bin/python3 -I /agent.py /dev/hvc0\n"
        "[Install]\nWantedBy=multi-user.target\n"
    ),
}
_MASKED = (
    "serial-getty@ttyS0.service", "serial-getty@hvc0.service", "getty@tty1.service", "apt-daily.timer",
    "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer",
    "systemd-networkd-wait-online.service",
)  # fmt: skip
_ENABLED = {
    "multi-user.target.wants/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
    "multi-user.target.wants/agent.service": "/etc/systemd/system/agent.service",
    "sysinit.target.wants/nftables.service": "/lib/systemd/system/nftables.service",
}
_INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
    /bin/busybox insmod /$module.ko
done
for i in 1 2 3 4 5 6 7 8 9 10; do [ -b /dev/vda ] && break; /bin/busybox sleep 0.2; done
/bin/busybox mount -t ext4 /dev/vda /new
/bin/busybox umount /dev
exec /bin/busybox switch_root /new /sbin/init
"""


@dataclass(frozen=True)
class Image:
    """What a machine boots from; ``disk`` is never written to."""

    kernel: Path
    initrd: Path
    disk: Path
    version: str


def missing() -> str:
    """Why no machine can be made here, or an empty string."""
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("mmdebstrap",) * 2, ("mke2fs", "e2fsprogs")):
        if shutil.which(program) is None:
            return f"Debian package {package} is not installed"
    return "" if os.geteuid() == 0 else "needs root"


def build() -> Image:
    """The image, made when it is not there or its recipe (this file, the agent) has changed: about a minute."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + AGENT.read_bytes()).hexdigest()[:16]
    home = DIRECTORY / recipe
    if not (home / "disk.ext4").exists():
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        home.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            _make(home, Path(scratch))
    version = (home / "version").read_text()
    return Image(home / "vmlinuz", home / "initrd", home / "disk.ext4", version)


def _make(home: Path, scratch: Path) -> None:
    root = scratch / "root"
    _run(
        "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "locale", "man")),
        f"--include={','.join(PACKAGES)}", "bookworm", str(root), MIRROR,
    )  # fmt: skip
    depends = _run("apt-cache", "depends", "linux-image-cloud-amd64")
    kernel = next(word for word in depends.split() if word.startswith("linux-image-") and word != "linux-image-cloud-amd64")
    version = kernel.removeprefix("linux-image-")
    _run("apt-get", "-qq", "download", kernel, "busybox-static", cwd=scratch)
    for package in scratch.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(scratch / "extra"))
    shutil.copytree(scratch / "extra/lib/modules", root / "lib/modules", symlinks=True)
    _run("depmod", "-b", str(root), version)
    shutil.copy(scratch / f"extra/boot/vmlinuz-{version}", home / "vmlinuz")
    _initrd(scratch, version, home / "initrd")
    for name, text in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(AGENT, root / "agent.py")
    units = root / "etc/systemd/system"
    for unit in _MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    for link, target in _ENABLED.items():
        (units / link).parent.mkdir(exist_ok=True)
        (units / link).unlink(missing_ok=True)
        (units / link).symlink_to(target)
    disk = home / "disk.new"
    _run("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), str(disk), f"{DISK_MB}M")
    (home / "version").write_text(version)
    disk.rename(home / "disk.ext4")


def _initrd(scratch: Path, version: str, target: Path) -> None:
    tree = scratch / "initrd"
    (tree / "bin").mkdir(parents=True)
    shutil.copy(scratch / "extra/bin/busybox", tree / "bin/busybox")
    for path in (scratch / "extra/lib/modules" / version / "kernel/drivers").glob("*/virtio*.ko"):
        shutil.copy(path, tree / path.name)
    (tree / "init").write_text(_INIT)
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with target.open("wb") as archive:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=archive, check=True)


def _run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
