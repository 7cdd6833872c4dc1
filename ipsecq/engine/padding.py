"""TFC padding (RFC 4303 section 2.7): what an SA wants, and what there is room for.

:class:`ipsecq.engine.bundle.PaddedBundle` knows the room, the SA's own step fills it.
"""

from __future__ import annotations


class Padding:
    """TFC padding of one outbound SA."""

    __slots__ = ("fill", "wanted")

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        """Octets up to which the SA wants payloads filled."""
        self.fill = 0
        """Up to which the next one is: as far as its bundle and the path MTU have room."""
