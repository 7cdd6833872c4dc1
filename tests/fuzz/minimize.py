"""Keep the inputs that reach something: ``minimize.py TARGET KEPT NEW...``.

All inputs are run from the smallest on; one stays when it takes a step from line to line of ipsecq that none before it took.
KEPT ends up with exactly those.  Seeds that lose their place to smaller inputs go.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

MAX_OCTETS = 70_000
"""Of one target's corpus: thirteen of them stay below a megabyte."""


def steps(run: Any, data: bytes) -> set[tuple[str, int, int]]:
    """The steps (file, line, next line) that ``run(data)`` takes in ipsecq."""
    seen: set[tuple[str, int, int]] = set()
    inside = str(ROOT / "ipsecq")
    last: dict[FrameType, int] = {}

    def local(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            seen.add((frame.f_code.co_filename, last.get(frame, 0), frame.f_lineno))
            last[frame] = frame.f_lineno
        elif event == "return":
            last.pop(frame, None)
        return local

    def call(frame: FrameType, event: str, _: object) -> Any:
        return local if frame.f_code.co_filename.startswith(inside) else None

    sys.settrace(call)
    try:
        run(data)
    finally:
        sys.settrace(None)
    return seen


def main(name: str, kept: Path, *others: Path) -> None:
    """Bring ``kept`` up to date."""
    import fuzz_engine  # noqa: F401
    import fuzz_fast  # noqa: F401
    from fuzz_targets import TARGETS

    inputs = {path.read_bytes() for folder in (kept, *others) for path in folder.iterdir() if path.is_file()}
    known: set[tuple[str, int, int]] = set()
    chosen: list[bytes] = []
    size = 0
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        found = steps(TARGETS[name], data)
        if found - known and size + len(data) <= MAX_OCTETS:
            known |= found
            chosen.append(data)
            size += len(data)
    # Once more from the largest on: what the others reach together without it is not needed.
    reached = [steps(TARGETS[name], data) for data in chosen]
    for at in range(len(chosen) - 1, -1, -1):
        rest = set().union(*(each for number, each in enumerate(reached) if number != at))
        if len(chosen) > 3 and not reached[at] - rest:
            del chosen[at], reached[at]
    names = {hashlib.sha256(data).hexdigest()[:16]: data for data in chosen}
    for path in kept.iterdir():
        if path.name not in names:
            path.unlink()
    for file, data in names.items():
        (kept / file).write_bytes(data)
    print(f"{name}: {len(names)} of {len(inputs)} inputs kept, {sum(map(len, chosen))} octets, {len(known)} steps")


if __name__ == "__main__":
    main(sys.argv[1], *(Path(each) for each in sys.argv[2:]))
