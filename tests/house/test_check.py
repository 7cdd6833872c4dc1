"""The rules of the house, held by tools: style, strict types, imports that only point down."""

import ast
import re
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


def test_no_icv_is_compared_octet_by_octet():
    """``==`` on octets ends at the first difference, and the time tells an attacker how far he got."""
    guilty, secret = [], re.compile(r"(.*_)?(icv|tag|mac|digest|received|sealed)")
    for path in (path for room in ("crypto", "transforms") for path in sorted((ROOT / "ipsecq" / room).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and any(isinstance(each, ast.Eq | ast.NotEq) for each in node.ops):
                for operand in (node.left, *node.comparators):
                    # What is compared itself, or a slice of it; not its length.
                    whole = operand.value if isinstance(operand, ast.Subscript) else operand
                    name = getattr(whole, "id", getattr(whole, "attr", ""))
                    if secret.fullmatch(name):
                        guilty.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert guilty == []
