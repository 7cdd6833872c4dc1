"""Without the compiled modules everything passes the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

UNIT = Path(__file__).resolve().parents[1]
THE_SAME = ("crypto", "packet/test_packet_segments.py", "engine/test_engine_runs.py", "engine/test_engine_sequence.py")


def test_plain_python_passes_the_tests_of_what_is_compiled():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(str(UNIT / name) for name in THE_SAME)],
        env={**os.environ, "IPSECQ_PURE": "1"}, cwd=UNIT.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_the_switch_leaves_them_out():
    program = "from ipsecq import compiled, fastpath; print(compiled.aead, fastpath.active, fastpath.missing)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "IPSECQ_PURE": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None False IPSECQ_PURE is set"
