"""One fuzz target under atheris: ``one.py TARGET [libFuzzer arguments]``.  ``run.py`` starts these."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

with atheris.instrument_imports(include=["ipsecq"], enable_loader_override=False):
    import fuzz_engine  # noqa: F401
    import fuzz_fast  # noqa: F401
    from fuzz_targets import TARGETS

atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
atheris.Fuzz()
