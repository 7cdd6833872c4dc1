"""Every input that fuzzing has kept, once more: what was found stays mended."""

from __future__ import annotations

from pathlib import Path

import fuzz_engine  # noqa: F401
import fuzz_fast  # noqa: F401
import pytest
from fuzz_targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_kept_inputs_break_no_rule(name):
    inputs = sorted((CORPUS / name).iterdir())
    assert len(inputs) >= 2, f"the corpus of {name} is gone"
    for path in inputs:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{name}: {path.name} breaks a rule") from error


def test_the_corpus_is_small_and_has_no_strays():
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 1_000_000
