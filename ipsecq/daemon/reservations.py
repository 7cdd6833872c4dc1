"""Sequence numbers ahead of the workers: what was lost of them, more of them in time, and the exact ones at the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Final

from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.log import LOGGER
from ipsecq.daemon.table import SharedTable
from ipsecq.errors import StateError
from ipsecq.sa.association import SecurityAssociation

log: Final = logging.getLogger(f"{LOGGER}.reservations")


class Reservations:
    """The supervisor's side of the state that outlives a daemon: the shared table, and the file of its reservations."""

    def __init__(self, table: SharedTable, book: LeaseBook) -> None:
        self._table = table
        self._book = book
        self._last_problem = ""

    def notices(self) -> list[str]:
        """What was lost of the state that outlives a daemon."""
        found = [self._table.problem]
        if self._book.problem:
            found.append(f"{self._book.problem}: hand-made keys of counter modes refuse to send until they are reset")
        return list(filter(None, found))

    def top_up(self, sas: Iterable[SecurityAssociation]) -> None:
        """Reserve ahead for these SAs, with one wait for the disk: after a start it is all of them."""
        with self._problems(), self._book.batch():
            for sa in sas:
                if sa.slot >= 0:
                    with self._problems():  # one that fails leaves the others alone
                        self._book.top_up(sa.slot)

    @contextlib.contextmanager
    def _problems(self) -> Iterator[None]:
        """Say what the state file refuses, once."""
        try:
            yield
        except (StateError, OSError) as error:
            if str(error) != self._last_problem:
                log.error("state: %s", error)
                self._last_problem = str(error)

    def settle(self, sas: Iterable[SecurityAssociation]) -> None:
        """No worker lives: write the exact next sequence numbers."""
        with contextlib.suppress(StateError), self._book.batch():
            for sa in sas:
                if sa.slot >= 0:
                    with contextlib.suppress(StateError):
                        self._book.settle(sa.slot)
