"""Network namespaces and the processes in them, cleaned up whatever happens.

A :class:`Lab` owns every namespace, process and temporary file that it made.  Its names hold the process id, so two
runs on one machine never meet, and namespaces of a run that was killed with SIGKILL are swept by the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, TypeVar

CLONE_NEWNET: Final = 0x40000000
NETNS_DIRECTORY: Final = Path("/run/netns")
SIOCGIFMTU: Final = 0x8921
_IFREQ_MTU: Final = struct.Struct("16si20x")
_OUR_NAME: Final = re.compile(r"iq(\d+)x\d+-")

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(RuntimeError):
    """A command of the lab failed, or something that the lab waits for did not come."""


class Namespace:
    """One network namespace.  ``run`` and ``popen`` start programs in it, ``call`` runs a function in it."""

    def __init__(self, lab: Lab, role: str) -> None:
        self.lab, self.role = lab, role
        self.name = f"{lab.prefix}-{role}"

    def __repr__(self) -> str:
        return f"<Namespace {self.name}>"

    def argv(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs ``argv`` here; the process dies with the thread that started it."""
        return ["ip", "netns", "exec", self.name, "setpriv", "--pdeathsig", "TERM", *argv]

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and return the completed process; LabError with its output when ``check`` and it failed."""
        return self.lab.run(*self.argv(argv), check=check, timeout=timeout, stdin=stdin)

    def popen(
        self, *argv: str, log: Path | None = None, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start in the background; both outputs go to ``log`` (default: nowhere).  The lab ends it at the latest."""
        return self.lab.popen(*self.argv(argv), log=log, env=env, pass_fds=pass_fds)

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in a thread that has entered this namespace; sockets made there stay in it."""
        result: list[T] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                self._enter()
                result.append(function())
            except BaseException as error:  # handed on to the caller's thread
                failure.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def _enter(self) -> None:
        with (NETNS_DIRECTORY / self.name).open("rb") as handle:
            if _libc.setns(handle.fileno(), CLONE_NEWNET):
                number = ctypes.get_errno()
                raise OSError(number, f"setns({self.name}): {os.strerror(number)}")

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this namespace, for use in any thread."""
        return self.call(lambda: socket.socket(family, kind, protocol))

    def pids(self) -> list[int]:
        """Every process that lives here; all of them descend from this lab."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(word) for word in done.stdout.split() if int(word) != os.getpid()]

    def sysctl(self, name: str, value: str | int) -> None:
        """Set a sysctl of this namespace (dots or slashes; slashes where a device name holds dots)."""
        path = "/proc/sys/" + (name if "/" in name else name.replace(".", "/"))

        def write() -> None:
            Path(path).write_text(str(value))

        self.call(write)

    def nft(self, ruleset: str) -> None:
        """Load nft text as one transaction."""
        self.run("nft", "-f", "-", stdin=ruleset)

    def ip(self, *lines: str) -> str:
        """Run lines of ``ip -batch`` here, one process for all; what they print.  LabError when one fails."""
        return self.lab.run("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines)).stdout

    def has_carrier(self, device: str) -> bool:
        """Whether the kernel has noticed that a device's link is up.

        To be asked by netlink makes it look at once; left alone (or asked by sysfs) it looks once a second.
        """
        return " state UP " in self.ip(f"link show dev {device}")

    def mtu(self, device: str) -> int:
        """The MTU of a device here."""
        with self.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            answer = fcntl.ioctl(any_socket, SIOCGIFMTU, _IFREQ_MTU.pack(device.encode(), 0))
        return int(_IFREQ_MTU.unpack(answer)[1])

    def link_mtu(self, device: str, mtu: int) -> None:
        """Set the MTU of a device here."""
        self.ip(f"link set {device} mtu {mtu}")


class Lab:
    """Owner of namespaces, processes and a temporary directory; a context manager that always cleans up."""

    _count = 0

    def __init__(self) -> None:
        Lab._count += 1
        self.prefix = f"iq{os.getpid()}x{Lab._count}"
        self.namespaces: dict[str, Namespace] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self._closers: list[Callable[[], object]] = []
        self._old_sigterm: Callable[[int, FrameType | None], object] | int | None = None
        self._owner = os.getpid()
        if os.geteuid() != 0:
            raise LabError("the lab makes network namespaces: run it as root")
        sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-"))
        atexit.register(self.close)

    def __enter__(self) -> Lab:
        if threading.current_thread() is threading.main_thread():
            self._old_sigterm = signal.signal(signal.SIGTERM, _terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def namespace(self, role: str) -> Namespace:
        """Make a namespace with loopback up and sysctls as Debian (systemd) sets them."""
        space = Namespace(self, role)
        self.run("ip", "netns", "add", space.name)
        self.namespaces[role] = space
        space.ip("link set lo up")
        # /usr/lib/sysctl.d/50-default.conf of systemd: loose reverse-path filter on every device, "all" left alone.
        space.sysctl("net.ipv4.conf.default.rp_filter", 2)
        space.sysctl("net.ipv4.conf.lo.rp_filter", 2)
        space.sysctl("net.ipv6.conf.default.accept_dad", 0)
        space.sysctl("net.ipv6.conf.default.accept_ra", 0)
        space.sysctl("net.ipv6.conf.default.router_solicitations", 0)
        space.sysctl("net.ipv4.ping_group_range", "0 0")
        return space

    def link(self, one: Namespace, device_one: str, two: Namespace, device_two: str, mtu: int = 1500) -> None:
        """Join two namespaces with a veth pair (offloads as the kernel sets them), up at both ends."""
        one.ip(
            f"link add {device_one} mtu {mtu} type veth peer name {device_two} netns {two.name} mtu {mtu}",
            f"link set {device_one} up",
        )
        two.ip(f"link set {device_two} up")
        # Until the kernel has noticed the carrier, what is sent is lost, and IPv6 asks for a neighbour once a second.
        for space, device in ((one, device_one), (two, device_two)):
            wait_for(partial(space.has_carrier, device), f"the carrier of {device}")

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in the namespace of this process."""
        try:
            done = subprocess.run(
                argv, input=stdin, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            output = _text(error.stdout) + _text(error.stderr)
            raise LabError(f"{' '.join(argv)}: no end after {timeout} s\n{output}") from None
        if check and done.returncode:
            raise LabError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def popen(
        self, *argv: str, log: Path | None = None, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a process that the lab ends at the latest."""
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=target, stderr=subprocess.STDOUT, pass_fds=pass_fds,
                env={**os.environ, **env} if env else None,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def on_close(self, function: Callable[[], object]) -> None:
        """Call ``function`` before processes are ended and namespaces removed; last registered first."""
        self._closers.append(function)

    def close(self) -> None:
        """End every process of this lab, remove its namespaces and files.  Safe to call twice.

        A second Ctrl-C does not break it off half-way.
        """
        if os.getpid() != self._owner:
            return  # a forked child's atexit: the parent cleans up
        mine = threading.current_thread() is threading.main_thread()
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if mine else None
        try:
            self._clean_up()
        finally:
            if interrupt is not None:
                signal.signal(signal.SIGINT, interrupt)
        if self._old_sigterm is not None and mine:
            signal.signal(signal.SIGTERM, self._old_sigterm)
            self._old_sigterm = None

    def _clean_up(self) -> None:
        while self._closers:
            with contextlib.suppress(Exception):
                self._closers.pop()()
        for process in self.processes:  # all of them at once: what they wait for at their end adds up otherwise
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            _bury(process, 15.0)
        self.processes.clear()
        for space in self.namespaces.values():
            for pid in space.pids():  # what a killed daemon left behind
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space.name], capture_output=True, check=False)
        self.namespaces.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
        atexit.unregister(self.close)


def stop(process: subprocess.Popen[bytes], patience: float = 5.0) -> int:
    """SIGTERM, then SIGKILL after ``patience`` seconds, to this one process; its exit status."""
    if process.poll() is None:
        process.terminate()
    return _bury(process, patience)


def _bury(process: subprocess.Popen[bytes], patience: float) -> int:
    """Wait for the end of a process that has been told to end, SIGKILL after ``patience`` seconds; its exit status."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode


def wait_for(condition: Callable[[], T], what: str, timeout: float = 10.0, every: float = 0.02) -> T:
    """Poll until ``condition`` returns something true, and return that; LabError naming ``what`` otherwise."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout} s for {what}")
        time.sleep(every)


def sweep() -> None:
    """Remove namespaces and files of runs whose process is gone (it was killed and could not clean up)."""

    def orphans(directory: Path) -> list[Path]:
        matches = [(path, _OUR_NAME.match(path.name)) for path in directory.iterdir()] if directory.is_dir() else []
        return [path for path, match in matches if match and not Path(f"/proc/{match[1]}").exists()]

    for path in orphans(NETNS_DIRECTORY):
        subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)
    for path in orphans(Path(tempfile.gettempdir())):
        shutil.rmtree(path, ignore_errors=True)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that every `with` on the way out cleans up


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
