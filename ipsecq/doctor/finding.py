"""What a doctor says: one thing that was looked at, how bad it is, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How bad."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(slots=True, frozen=True)
class Finding:
    """One thing that was looked at.  ``mend`` is a command or an advice; empty when all is well."""

    grade: Grade
    subject: str
    message: str
    mend: str = ""
