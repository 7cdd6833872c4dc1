"""Commands in a machine that this process cannot reach otherwise: JSON lines to the agent in it, over a serial line.

The other end is :mod:`ipsecq.lab.uml_agent`, in User-Mode Linux and in any other virtual machine.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipsecq.lab.netns import LabError


@dataclass(frozen=True)
class Result:
    """What a command in the machine gave back."""

    rc: int
    out: str
    err: str


class Agent:
    """The near end of the line.  Raises LabError with the console's last lines when no answer comes."""

    console: Path
    """What the machine prints while it boots."""
    spawn_log: str
    """A file in the machine that takes the output of spawned programs."""
    _line: socket.socket
    _buffer: bytes = b""

    def run(self, *argv: str, check: bool = True, timeout: float = 30.0, stdin: str = "") -> Result:
        """Run a program in the machine; LabError with its output when ``check`` and it failed."""
        answer = self._ask({"op": "run", "argv": argv, "stdin": stdin, "timeout": timeout}, timeout + 10)
        result = Result(answer["rc"], answer["out"], answer["err"])
        if check and result.rc:
            raise LabError(f"in the machine: {' '.join(argv)}: exit {result.rc}\n{result.out}{result.err}")
        return result

    def spawn(self, *argv: str) -> int:
        """Start a program in the machine's background; its pid there.  :meth:`kill` ends it."""
        answer = self._ask({"op": "spawn", "argv": argv, "log": self.spawn_log}, 10)
        if answer["rc"]:
            raise LabError(f"in the machine: {' '.join(argv)}: {answer['err']}")
        return int(answer["pid"])

    def kill(self, pid: int) -> int:
        """End a spawned program; its exit status."""
        return int(self._ask({"op": "kill", "pid": pid}, 15)["rc"])

    def read(self, path: str) -> str:
        """The text of a file in the machine, such as ``/proc/net/xfrm_stat``."""
        answer = self._ask({"op": "read", "path": path}, 10)
        if answer["rc"]:
            raise LabError(f"in the machine: {path}: {answer['err']}")
        return str(answer["out"])

    def _ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        self._line.settimeout(patience)
        self._line.sendall(json.dumps(request).encode() + b"\n")
        return self._receive(patience)

    def _receive(self, patience: float) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        while True:
            while b"\n" in self._buffer:
                line, self._buffer = self._buffer.split(b"\n", 1)
                if line.startswith(b"{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
            self._line.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                more = self._line.recv(65536)
            except TimeoutError:
                more = b""
            if not more:
                tail = self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""
                raise LabError(f"the machine gave no answer within {patience} s; its console:\n{tail}")
            self._buffer += more
