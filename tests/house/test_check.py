"""The rules of the house, held by tools: style, strict types, imports that only point down."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize(
    "argv",
    [
        ["ruff", "check", "--quiet", "--output-format=concise", "."],
        ["mypy", "--no-error-summary"],
        ["lint-imports", "--no-logo"],
    ],
    ids=lambda argv: argv[0],
)
def test_the_code_is_clean_under(argv):
    done = subprocess.run([BIN / argv[0], *argv[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
