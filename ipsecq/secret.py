"""Key material that does not print itself.

Every key in ipsecq travels as a :class:`Key`.  Its ``repr`` and ``str`` name the length only, so a key
cannot reach a log line, a metric, an exception text or a traceback of locals by accident; the few places
that need the octets (the cipher registry, ``setkey -D``, PF_KEY replies) ask for them by name.
"""

from __future__ import annotations

import hmac
import re
from typing import Final

_DIGITS: Final = re.compile(r"[0-9A-Fa-f](?:[:.,_-]?[0-9A-Fa-f]){10}")
"""More than ten hexadecimal digits, apart at most by a sign each."""
_END: Final = r"[0-9A-Fa-f]{0,4}(?:[:.][0-9A-Fa-f]{0,4}){1,8}(?:%[\w.]{1,15})?"
_ADDRESSES: Final = re.compile(rf"{_END}(?:-{_END})?", re.ASCII)
_SHORTEST: Final = 16
"""Octets of the shortest key that any algorithm takes."""


def may_be_key(word: str) -> bool:
    """Return whether a word that somebody wrote in a wrong place may be a key, so that no message may repeat it.

    True for more than ten hexadecimal digits in a row, and for whatever is as long as a key; False for what has the
    shape of an address, or of a range of them.
    """
    if _ADDRESSES.fullmatch(word):
        return False
    return len(word) >= _SHORTEST or _DIGITS.search(word) is not None


class Key:
    """Secret octets.  ``Key(b"...").octets`` is the only way to the value."""

    __slots__ = ("octets",)

    def __init__(self, octets: bytes) -> None:
        self.octets = bytes(octets)

    @property
    def bits(self) -> int:
        """Length in bits, as PF_KEY counts keys."""
        return len(self.octets) * 8

    def __len__(self) -> int:
        return len(self.octets)

    def __bool__(self) -> bool:
        return bool(self.octets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self.octets, other.octets)

    def __hash__(self) -> int:
        return hash(self.octets)

    def __repr__(self) -> str:
        return f"<Key of {self.bits} bits>"

    __str__ = __repr__


NO_KEY: Final = Key(b"")
"""Of algorithms that have none."""
