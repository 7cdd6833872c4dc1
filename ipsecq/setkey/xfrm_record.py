"""The text that iproute2's ``ip xfrm`` prints, cut into records, lines and words (ip/ipxfrm.c of iproute2)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final


class CannotError(Exception):
    """Why a record has no counterpart."""


@dataclass(slots=True)
class Line:
    """One line with a single tab in front, and the lines behind it that belong to it."""

    words: list[str]
    parts: list[list[str]] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """One entry: the words of its first line, then its lines."""

    head: list[str]
    lines: list[Line] = field(default_factory=list)


def records(lines: Iterable[str]) -> list[Record]:
    """The records of a listing."""
    found: list[Record] = []
    for text in lines:
        words = text.split()
        if not words:
            continue
        if text[0] not in " \t":
            found.append(Record(words))
        elif not found:
            found.append(Record([], [Line(words)]))
        elif re.match(r"\t\S", text) or not found[-1].lines:
            found[-1].lines.append(Line(words))
        else:
            found[-1].lines[-1].parts.append(words)
    return found


def pairs(words: list[str], known: Iterable[str]) -> dict[str, str]:
    """``name value`` again and again; CannotError for a name that isn't known, or comes twice."""
    found: dict[str, str] = {}
    for name, value in zip(words[::2], [*words[1::2], ""], strict=False):
        if name not in known or not value or name in found:
            raise CannotError(f"'{name} {value}' has no counterpart".replace(" '", "'"))
        found[name] = value
    return found


def ends(words: list[str]) -> tuple[str, str]:
    """Source and destination of ``src A dst B``."""
    found = pairs(words, ("src", "dst"))
    if len(found) != 2:
        raise CannotError("not understood")
    return found["src"], found["dst"]


def number(text: str) -> int:
    """``5``, or ``5(0x00000005)`` as ``ip -s`` prints it; CannotError."""
    try:
        return int(text.split("(", maxsplit=1)[0], 0)
    except ValueError:
        raise CannotError(f"'{text}' is no number") from None


# What only says how things were going, or who does the work.
_PASSED_OVER: Final = ("lifetime current:", "stats:", "lastused", "anti-replay", "crypto offload parameters:")


def is_passed_over(line: Line) -> bool:
    """Does the line say nothing that a configuration could?"""
    return " ".join(line.words).startswith(_PASSED_OVER)


def lifetimes(line: Line) -> dict[str, int]:
    """``lifetime config:`` of ``ip -s``: ``hard add`` and the like, those that are set; CannotError."""
    found: dict[str, int] = {}
    for words in line.parts:
        match = re.fullmatch(
            r"(?:limit|expire (add|use)): soft (\(INF\)|\d+)\((\w+)\), hard (\(INF\)|\d+)\(\w+\)", " ".join(words)
        )
        if match is None:
            raise CannotError(f"'{' '.join(words)}' has no counterpart")
        kind, soft, unit, hard = match.groups()
        found |= {
            f"{which} {kind or unit}": int(value)
            for which, value in (("soft", soft), ("hard", hard))
            if value not in ("(INF)", "0")
        }
    return found
