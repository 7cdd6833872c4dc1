"""Stops one process of a test run after the other for a while: what a busy machine does to tests in a hurry.

``make test PYTEST="--stalls 1 tests/gateway"``; the number is the seed.  What it stopped, and when, goes to
``build/stalls.log``.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

SECONDS = 2.0
"""How long a process stands still: less than the five seconds after which a worker counts as stuck."""
PAUSE = 0.3, 3.0
"""Seconds between two of them."""
ITSELF = 0.15
"""How often it is pytest's own turn."""


def processes():
    """Pid → (parent, state, command line)."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (place / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found[int(place.name)] = int(parent), state, command
    return found


def below(root, table):
    """Descendants of ``root`` that wait or run, but for this process and those that somebody traces (UML's own)."""
    found, waiting = [], [root]
    while waiting:
        parent = waiting.pop()
        children = [pid for pid, each in table.items() if each[0] == parent and pid != os.getpid()]
        found += [pid for pid in children if table[pid][1] in "RS"]
        waiting += children
    return [pid for pid in found if not traced(pid)]


def traced(pid):
    """A signal to it is its tracer's."""
    with contextlib.suppress(OSError):
        return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
    return True


def main(root, seed, log):
    """Until pytest has ended; what is stopped goes on whatever becomes of us."""
    dice = random.Random(seed)
    while root in (table := processes()):
        victims = below(root, table)
        victim = root if dice.random() < ITSELF or not victims else dice.choice(victims)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP)
            try:
                print(f"{time.strftime('%H:%M:%S')} {victim} {table[victim][2]}", file=log, flush=True)
                time.sleep(SECONDS)
            finally:
                os.kill(victim, signal.SIGCONT)
        time.sleep(dice.uniform(*PAUSE))


if __name__ == "__main__":
    Path(sys.argv[3]).parent.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with open(sys.argv[3], "w") as file:
        main(int(sys.argv[1]), int(sys.argv[2]), file)
