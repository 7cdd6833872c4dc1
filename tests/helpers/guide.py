"""The command blocks of README and guide, and a network of namespaces to run them in as the text says.

A block begins with ```` ```sh gw1 gw2 ```` (commands, as root on each of these) or ```` ```conf gw1 /path ```` (a file).
Words behind the machines: ``norun=why`` cannot run here; ``does=start`` then has the daemon started as the unit would;
``fails`` expects an exit status that is not 0; ``makes=KEY`` prints what the text calls KEY1, KEY2, ….
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ipsecq.lab.netns import Lab, LabError, Namespace, wait_for
from ipsecq.lab.topology import build

MACHINES = {"host1": "hosta", "gw1": "gw1", "router": "router", "gw2": "gw2", "host2": "hostb"}
KEYS = 4
"""As many keys of a kind as the text uses in one section."""
_FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MOUNTS = ("/etc/ipsecq", "/var/lib/ipsecq", "/run/ipsecq")


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    machines: tuple[str, ...]
    path: str
    attributes: dict[str, str]
    text: str
    line: int


@dataclass(frozen=True)
class Section:
    """What stands under one heading of the second level."""

    title: str
    text: str
    blocks: list[Block] = field(default_factory=list)


def sections(path: Path) -> list[Section]:
    """The sections of a page, in order."""
    text = path.read_text()
    places = [match.start() for match in re.finditer(r"^## ", text, re.MULTILINE)]
    found = []
    for start, end in zip(places, [*places[1:], len(text)], strict=True):
        body = text[start:end]
        line = text.count("\n", 0, start) + 1
        blocks = [
            _block(match[1].strip(), match[2], line + body.count("\n", 0, match.start()))
            for match in _FENCE.finditer(body)
        ]
        found.append(Section(body.splitlines()[0].removeprefix("## "), body, blocks))
    return found


def _block(info: str, text: str, line: int) -> Block:
    language, *words = info.split() or [""]
    machines = tuple(word for word in words if word in MACHINES)
    attributes = {word.split("=")[0]: word.partition("=")[2] for word in words if "=" in word or word == "fails"}
    rest = [word for word in words if word not in MACHINES and word not in attributes and "=" not in word]
    assert language in ("sh", "conf"), f"line {line}: a block without a meaning: {info!r}"
    assert machines or "norun" in attributes, f"line {line}: on which machine? {info!r}"
    assert set(attributes) <= {"norun", "does", "makes", "fails"}, f"line {line}: {info!r}"
    assert len(rest) == (language == "conf"), f"line {line}: {info!r}"
    return Block(language, machines, rest[0] if rest else "", attributes, text, line)


class Theatre:
    """The guide's network: two hosts, two gateways with directories of their own, a router."""

    def __init__(self, lab: Lab, scratch: Path) -> None:
        self.network = build(lab, router=True)
        self.spaces: dict[str, Namespace] = {name: lab.namespaces[role] for name, role in MACHINES.items()}
        self.scratch = scratch
        self.made: dict[str, list[str]] = {}
        self.started: set[str] = set()
        for name in ("gw1", "gw2"):
            for mount in _MOUNTS:
                (scratch / name / mount[1:]).mkdir(parents=True)
            shutil.copy(Path(__file__).parents[2] / "ipsecq/daemon/ipsecq.toml", scratch / name / "etc/ipsecq")

    def play(self, block: Block) -> None:
        """Do what a block says; AssertionError when it does not come out as the text promises."""
        if block.attributes.get("does") == "start":
            self._start(*block.machines)
        if "norun" in block.attributes:
            return
        for name in block.machines:
            if block.language == "conf":
                self._write(name, block)
                continue
            done = self.spaces[name].run(*self._argv(name, ["sh", "-e", "-c", self._filled(block.text)]), check=False)
            failed = done.returncode != 0
            said = f"{block.text}\n{done.stdout}{done.stderr}\n{self._log(name)}"
            assert failed == ("fails" in block.attributes), f"line {block.line} on {name}: exit {done.returncode}\n{said}"
            if word := block.attributes.get("makes"):
                again = (self.network.lab.run("sh", "-c", block.text).stdout for _ in range(KEYS - 1))
                self.made[word] = [done.stdout, *again]

    def _filled(self, text: str) -> str:
        """KEY1 and the like replaced, as the text tells its reader to do."""
        return re.sub(r"\b0x([A-Z]+)([1-9])\b", lambda match: "0x" + self.made[match[1]][int(match[2]) - 1], text)

    def _write(self, name: str, block: Block) -> None:
        assert block.path.startswith("/etc/ipsecq/")
        file = self.scratch / name / block.path[1:]
        file.write_text(self._filled(block.text))
        file.chmod(0o640)

    def _argv(self, name: str, argv: list[str]) -> list[str]:
        """``argv`` with the machine's own directories mounted over the real ones, and our ipsecq in PATH."""
        path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}"
        if not (self.scratch / name).exists():
            return ["env", path, *argv]
        mounts = "".join(f"mount --bind '{self.scratch / name}{mount}' {mount}; " for mount in _MOUNTS)
        return ["unshare", "-m", "env", path, "sh", "-e", "-c", mounts + 'exec "$@"', "sh", *argv]

    def _start(self, *names: str) -> None:
        """Start the daemons of these machines, all at once, and wait until they serve."""
        fresh = {}
        for name in names:
            if name not in self.started:
                self.started.add(name)
                argv = self._argv(name, ["ipsecq", "run"])
                fresh[name] = self.spaces[name].popen(*argv, log=self.scratch / name / "log")
        for name, process in fresh.items():
            try:
                wait_for(
                    lambda name=name, process=process: process.poll() is not None or "serving:" in self._log(name),
                    "the daemon", 30,
                )  # fmt: skip
            except LabError as error:
                raise AssertionError(f"{name}: {error}\n{self._log(name)}") from None
            assert process.poll() is None, f"{name}: {self._log(name)}"

    def _log(self, name: str) -> str:
        log = self.scratch / name / "log"
        return log.read_text() if log.exists() else ""


class MountPoints:
    """The directories that real machines have; made for the time of the tests where there are none."""

    def __enter__(self) -> MountPoints:
        self.made = [Path(mount) for mount in _MOUNTS if not Path(mount).exists()]
        for mount in self.made:
            mount.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        for mount in self.made:
            mount.rmdir()
