"""Order numbers for the members of a sequence that stay what they are while others come, go and move."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final

GAP: Final = 1 << 64
"""Between neighbours at the end, so that 64 times something finds room between the same two."""


class NoRoom(Exception):  # noqa: N818 - a signal to the caller
    """Two neighbours have no number between them."""


def numbers(sequence: Iterable[int], known: Mapping[int, int]) -> dict[int, int]:
    """Numbers for those of ``sequence`` that have none in ``known``; together they rise.  NoRoom."""
    found: dict[int, int] = {}
    last, run = 0, list[int]()
    for member in sequence:
        number = known.get(member)
        if number is None:
            run.append(member)
            continue
        if run:
            step = (number - last) // (len(run) + 1)
            if not step:
                raise NoRoom
            found.update((each, last + step * place) for place, each in enumerate(run, 1))
            run.clear()
        last = number
    found.update((each, last + GAP * place) for place, each in enumerate(run, 1))
    return found


def out_of_order(known: Mapping[int, int]) -> list[int]:
    """The fewest members without which the numbers of the others rise in the order of the mapping; O(n log n).

    What stays is a longest rising subsequence, by patience sorting.
    """
    members, values = list(known), list(known.values())
    if all(before < after for before, after in pairwise(values)):
        return []
    ends: list[int] = []  # smallest last values of rising subsequences, by their lengths
    at: list[int] = []  # and where these are
    before: list[int] = []
    for index, value in enumerate(values):
        length = bisect_left(ends, value)
        before.append(at[length - 1] if length else -1)
        ends[length : length + 1] = [value]
        at[length : length + 1] = [index]
    stays: set[int] = set()
    index = at[-1]
    while index >= 0:
        stays.add(index)
        index = before[index]
    return [member for index, member in enumerate(members) if index not in stays]
