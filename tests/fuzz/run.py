"""``make fuzz``: all targets of the helpers ``fuzz_targets`` and ``fuzz_engine``, two at a time, guided by coverage.

    run.py [--seconds N] [--jobs N] [--keep] [TARGET...]

The seconds are shared out among the targets.  Each starts from its kept corpus (``tests/fuzz/corpus``) and from what earlier
runs found (``build/fuzz``).  A finding is written to ``build/fuzz/findings``, shown with its traceback, and makes
the exit status 1.  ``--keep`` brings the kept corpus up to date with the inputs that reach something new.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

MAX_LENGTH = {"reassembly": 300, "setkey": 1000, "policy_string": 200, "config": 1500, "pfkey": 800}
WORDS = {
    "setkey": "add spdadd spdupdate spddelete spddump spdflush delete deleteall get flush dump exit esp ah ipcomp esp-udp "
    "-m tunnel transport any -r -u -f -lh -ls -bh -bs -uh -us -ah -as -esn -tfc -natt -oai -oar -rebind -fail_open -E -A "
    "-C -P -4 -6 -n in out ipsec none discard esp/tunnel/1.1.1.1-2.2.2.2/require ah/transport//use prio ::/0 0.0.0.0/0 0x "
    "1.1.1.1 ::1 icmp6 tcp udp aes-gcm-16 aes-cbc hmac-sha1 deflate null ; 3des-cbc hmac-md5",
    "policy_string": "in out ipsec none discard entrust bypass prio priority low high def esp ah ipcomp / tunnel transport "
    "any require use default unique: - 1.1.1.1 ::1 [500]",
    "config": "[daemon] [nftables] [metrics] [log] [sysctl] policy workers queue_base state_dir = true false \"\" [] "
    "net.inet.ipsec.dfbit \"credential:a\" '''",
}


@dataclass
class Outcome:
    """What came of one target."""

    name: str
    inputs: int
    per_second: int
    new: int
    finding: str


def fuzz(name: str, seconds: int) -> Outcome:
    """Run one target for so long, or until it breaks."""
    grown, findings = BUILD / "corpus" / name, BUILD / "findings"
    for folder in (grown, findings):
        folder.mkdir(parents=True, exist_ok=True)
    argv = [
        sys.executable, str(HERE / "one.py"), name, f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=20",
        f"-max_len={MAX_LENGTH.get(name, 3000)}", f"-artifact_prefix={findings}/{name}-", "-rss_limit_mb=1024",
    ]  # fmt: skip
    if name in WORDS:
        words = BUILD / f"{name}.dict"
        escaped = (word.replace("\\", "\\\\").replace('"', '\\"') for word in WORDS[name].split())
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        argv.append(f"-dict={words}")
    before = len(list(grown.iterdir()))
    done = subprocess.run(
        [*argv, str(grown), str(HERE / "corpus" / name)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", check=False, cwd=BUILD, preexec_fn=lambda: os.nice(10),
    )  # fmt: skip
    inputs = re.search(r"number_of_executed_units:\s*(\d+)", done.stdout)
    rate = re.search(r"average_exec_per_sec:\s*(\d+)", done.stdout)
    finding = ""
    if done.returncode:
        start = done.stdout.find("=== Uncaught Python exception")
        finding = done.stdout[start if start >= 0 else -3000 :][:6000]
    return Outcome(
        name, int(inputs[1]) if inputs else 0, int(rate[1]) if rate else 0, len(list(grown.iterdir())) - before, finding
    )


def keep(name: str) -> str:
    """Minimize the kept corpus of one target."""
    argv = [sys.executable, str(HERE / "minimize.py"), name, str(HERE / "corpus" / name), str(BUILD / "corpus" / name)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, preexec_fn=lambda: os.nice(10))
    return done.stdout.strip() if not done.returncode else f"{name}: not minimized: {done.stderr.strip()[-600:]}"


def main() -> int:
    """The command."""
    import fuzz_engine  # noqa: F401
    import fuzz_fast  # noqa: F401
    from fuzz_targets import TARGETS

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=600, help="for all targets together (default: 600)")
    options.add_argument("--jobs", type=int, default=2, help="targets at a time (default: 2)")
    options.add_argument("--keep", action="store_true", help="bring tests/fuzz/corpus up to date")
    options.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of: {' '.join(TARGETS)}")
    chosen = options.parse_args()
    names = chosen.targets or list(TARGETS)
    unknown = set(names) - set(TARGETS)
    if unknown:
        options.error(f"no such target: {' '.join(sorted(unknown))}; there are {' '.join(TARGETS)}")
    each = max(1, chosen.seconds * min(chosen.jobs, len(names)) // len(names))
    print(f"{len(names)} targets, {each} seconds each, {chosen.jobs} at a time", flush=True)
    started, total, findings = time.monotonic(), 0, 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for outcome in pool.map(lambda name: fuzz(name, each), names):
            total += outcome.inputs
            state = "FINDING" if outcome.finding else "clean"
            counts = f"{outcome.inputs:9} inputs {outcome.per_second:6}/s {outcome.new:5} new"
            print(f"{outcome.name:20} {counts}  {state}", flush=True)
            if outcome.finding:
                findings += 1
                print(outcome.finding, flush=True)
        if chosen.keep:
            for line in pool.map(keep, names):
                print(line, flush=True)
    print(f"{total} inputs in {time.monotonic() - started:.0f} s, {findings} findings")
    if findings:
        print(f"the inputs are in {BUILD / 'findings'}; put each into tests/fuzz/corpus/TARGET when it is mended")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
