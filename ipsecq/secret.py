"""Key material that does not print itself.

Every key in ipsecq travels as a :class:`Key`.  Its ``repr`` and ``str`` name the length only, so a key
cannot reach a log line, a metric, an exception text or a traceback of locals by accident; the few places
that need the octets (the cipher registry, ``setkey -D``, PF_KEY replies) ask for them by name.
"""

from __future__ import annotations

import hmac
from typing import Final


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
