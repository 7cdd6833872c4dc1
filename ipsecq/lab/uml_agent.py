"""The program that serves commands inside User-Mode Linux; :mod:`ipsecq.lab.uml` starts it as the last step of init.

One JSON object a line, both ways, over a serial line.  Standard library only: it runs on the host's own Python through
hostfs, and nothing else of ipsecq is imported.

Requests: ``{"op": "run", "argv": [...], "stdin": str, "timeout": s}`` -> ``{"rc", "out", "err"}``;
``{"op": "spawn", "argv": [...], "log": path}`` -> ``{"pid"}``; ``{"op": "kill", "pid"}`` -> ``{"rc"}``;
``{"op": "read", "path"}`` -> ``{"rc", "out"}``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios
from typing import Any


def serve(descriptor: int) -> None:
    """Answer requests until the line closes."""
    children: dict[int, subprocess.Popen[bytes]] = {}
    buffer = b""
    while True:
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            if not line.startswith(b"{"):
                continue  # noise of the line's first moments
            try:
                answer = handle(json.loads(line), children)
            except Exception as error:  # the host must learn of it, and the next request must be served
                answer = {"rc": 255, "out": "", "err": f"{type(error).__name__}: {error}"}
            data = json.dumps(answer).encode() + b"\n"
            while data:
                data = data[os.write(descriptor, data) :]
        more = os.read(descriptor, 65536)
        if not more:
            return
        buffer += more


def handle(request: dict[str, Any], children: dict[int, subprocess.Popen[bytes]]) -> dict[str, Any]:
    """One request's answer."""
    if request["op"] == "run":
        try:
            done = subprocess.run(
                request["argv"], input=request.get("stdin", ""), capture_output=True, text=True, errors="replace",
                timeout=request.get("timeout"), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            output = error.stdout if isinstance(error.stdout, bytes) else b""
            return {"rc": 124, "out": output.decode(errors="replace"), "err": f"no end after {error.timeout} s"}
        return {"rc": done.returncode, "out": done.stdout, "err": done.stderr}
    if request["op"] == "spawn":
        with open(request["log"], "ab") as log:
            child = subprocess.Popen(request["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        children[child.pid] = child
        return {"rc": 0, "pid": child.pid}
    if request["op"] == "read":  # files below /proc, without the price of a process
        with open(request["path"], encoding="utf-8") as file:
            return {"rc": 0, "out": file.read()}
    if request["op"] == "kill":
        child = children.pop(request["pid"])
        child.terminate()
        return {"rc": child.wait(10)}
    return {"rc": 0}


def main() -> None:
    """Open the serial line raw and serve it."""
    descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
    mode = termios.tcgetattr(descriptor)
    mode[0] = mode[1] = mode[3] = 0  # input, output, local flags: no translation, no echo, no line discipline
    mode[2] |= termios.CLOCAL | termios.CREAD
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    termios.tcsetattr(descriptor, termios.TCSANOW, mode)
    os.write(descriptor, b'{"rc": 0, "hello": true}\n')
    serve(descriptor)


if __name__ == "__main__":
    main()
