"""A whole machine in QEMU without hardware virtualisation: Debian's kernel and systemd, tap devices, an agent on hvc0."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import time
from pathlib import Path

from image import LAN_MAC, WAN_MAC, Image

from ipsecq.lab.agent import Agent
from ipsecq.lab.netns import LabError, Namespace, wait_for

BOOT_SECONDS = 180.0
_TUNSETIFF, _IFF = 0x400454CA, 0x0002 | 0x1000 | 0x4000  # TAP, NO_PI, VNET_HDR


def open_tap(space: Namespace, name: str) -> int:
    """A tap device in a namespace, up; the descriptor of its near end."""

    def make() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF))
        return descriptor

    descriptor = space.call(make)
    space.run("ip", "link", "set", name, "up")
    return descriptor


class Machine(Agent):
    """One machine with a disk of its own; ``parcel`` is a file that it finds as ``/root/NAME``."""

    def __init__(self, space: Namespace, image: Image, wan: int, lan: int, parcel: Path) -> None:
        self.space = space
        self.directory = space.lab.directory / "machine"
        self.directory.mkdir()
        self.console = self.directory / "console"
        self.spawn_log = "/run/spawned"
        self._buffer = b""
        disk, second = self.directory / "disk", self.directory / "parcel"
        space.lab.run("cp", "--sparse=always", str(image.disk), str(disk))
        shutil.copy(parcel, second)
        with second.open("ab") as file:
            file.write(bytes(-file.tell() % 512))
        line = self.directory / "line"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(line))
            listener.listen(1)
            self.process = space.popen(
                "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "768", "-smp", "2",
                "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append",
                "console=ttyS0 quiet root=/dev/vda rw net.ifnames=0 panic=-1 reboot=t mitigations=off random.trust_cpu=on",
                "-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{self.console}",
                "-chardev", f"socket,id=line,path={line}", "-device", "virtio-serial-pci",
                "-device", "virtconsole,chardev=line",
                "-drive", f"id=disk,file={disk},format=raw,if=none,cache=unsafe", "-device", "virtio-blk-pci,drive=disk",
                "-drive", f"id=parcel,file={second},format=raw,if=none,readonly=on",
                "-device", "virtio-blk-pci,drive=parcel",
                "-netdev", f"tap,id=wan,fd={wan}", "-device", f"virtio-net-pci,netdev=wan,mac={WAN_MAC}",
                "-netdev", f"tap,id=lan,fd={lan}", "-device", f"virtio-net-pci,netdev=lan,mac={LAN_MAC}",
                log=self.directory / "qemu", pass_fds=[wan, lan],
            )  # fmt: skip
            os.close(wan)
            os.close(lan)
            listener.settimeout(10)
            try:
                self._line = listener.accept()[0]
            except TimeoutError:
                raise LabError(f"QEMU did not start: {(self.directory / 'qemu').read_text()}") from None
        self.boot_seconds = self.await_boot()
        size = parcel.stat().st_size
        self.run(
            "python3", "-c",
            "import glob, os, sys\n"
            "size = int(sys.argv[1])\n"
            "disk = next(d for d in ('/dev/vda', '/dev/vdb') if 0 <= os.lseek(os.open(d, 0), 0, 2) - size < 512)\n"
            "open(sys.argv[2], 'wb').write(open(disk, 'rb').read(size))",
            str(size), f"/root/{parcel.name}", timeout=60,
        )  # fmt: skip

    def await_boot(self) -> float:
        """Wait for the agent's first words; the seconds that it took."""
        started = time.monotonic()
        while "hello" not in self._receive(BOOT_SECONDS):
            pass
        return time.monotonic() - started

    def reboot(self) -> float:
        """systemctl reboot, and wait for the agent of the next boot."""
        self._line.sendall(b'{"op": "run", "argv": ["systemctl", "reboot"]}\n')  # its answer may or may not come
        return self.await_boot()

    def shell(self, script: str, *, check: bool = True, timeout: float = 60.0) -> str:
        """A shell script's standard output."""
        return self.run("sh", "-c", script, check=check, timeout=timeout).out

    def write(self, path: str, text: str) -> None:
        """Put text into a file of the machine, which keeps its owner and mode if it is there."""
        self.run("sh", "-c", f"cat > {path}", stdin=text)

    def wait_active(self, unit: str, seconds: float = 90.0) -> None:
        """Wait until a unit is active; LabError with its journal otherwise."""
        try:
            wait_for(lambda: self.run("systemctl", "is-active", "-q", unit, check=False).rc == 0, unit, seconds, 0.5)
        except LabError as error:
            raise LabError(f"{error}\n{self.shell(f'journalctl -b -u {unit} --no-pager | tail -40')}") from None
