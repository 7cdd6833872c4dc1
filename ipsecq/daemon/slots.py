"""Which slots of the shared table the authority's SAs have, and the right of each to take sequence numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ipsecq.crypto import registry
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.ledger import PairLedger
from ipsecq.daemon.table import SharedTable, fingerprint
from ipsecq.numbers import Protocol, SaState
from ipsecq.sa.association import SecurityAssociation


class Slots:
    """One SA, one slot: two would be two sources of sequence numbers and two windows."""

    def __init__(self, table: SharedTable, book: LeaseBook, ledger: PairLedger) -> None:
        self._table = table
        self._book = book
        self._ledger = ledger
        self._uses: dict[int, int] = {}
        """Slot → how many SAs have it, those included that some worker may still know."""

    def must_wait(self, sa: SecurityAssociation) -> bool:
        """True while workers may use a slot of this SA that has another size."""
        return sa.state is not SaState.LARVAL and not self._table.fits(fingerprint(sa), sa.replay_window)

    def enroll(self, sa: SecurityAssociation, passing: bool, old_slot: int = -1) -> str:
        """Slot (perhaps the ``old_slot``, which it has already) and reservation; a larval SA needs none.

        Returns why the SA refuses to send, if it does.
        """
        if sa.state is SaState.LARVAL:
            return ""
        slot = self._table.allocate(fingerprint(sa), sa.replay_window)
        try:
            problem = self._reserve(sa, slot, passing)
        except BaseException:
            if slot not in self._uses:
                self._table.retire(slot, counts=True)
            raise
        sa.slot = slot
        if slot != old_slot:
            self._uses[slot] = self._uses.get(slot, 0) + 1
        self._ledger.join(slot, sa.src, sa.dst)
        return problem

    def _reserve(self, sa: SecurityAssociation, slot: int, passing: bool) -> str:
        """The right to take sequence numbers, or the reason why not."""
        if sa.protocol is Protocol.IPCOMP:
            return ""
        # AES-GMAC has a counter for its IV as an authentication algorithm, too.
        counter_iv = sa.authentication == "aes-gmac" or (
            sa.encryption is not None and registry.encryption(sa.encryption).iv_is_counter
        )
        problem = self._book.enroll(slot, counter_iv=counter_iv, passing=passing)
        return problem and (self._book.refusal(slot, sa.spi) or problem)

    def release(self, slots: Iterable[int], kept: Collection[bytes]) -> None:
        """No worker knows the SAs any more that had these; ``kept``: fingerprints of those that move to another slot.

        The caller holds the ledger's lock.
        """
        for slot in slots:
            self._uses[slot] -= 1
            if not self._uses[slot]:
                del self._uses[slot]
                moves = self._table.fingerprint_of(slot) in kept
                self._ledger.leave(slot, moves=moves)
                self._table.retire(slot, counts=moves)
