"""SAD, SPD and knobs as the supervisor holds them: the originals, of which workers have copies.

Every change goes through here: it is checked, gets its slot and its sequence reservation, changes the original, and is
queued as operations for the workers (:mod:`ipsecq.daemon.replica`).  The owner of the event loop takes the queue with
:meth:`Authority.take` and sends it; nothing here waits or does I/O but the reservation's write to the state file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.ledger import PairLedger
from ipsecq.daemon.messages import Operation
from ipsecq.daemon.slots import Slots
from ipsecq.daemon.table import SharedTable, fingerprint
from ipsecq.errors import IpsecqError
from ipsecq.numbers import SaState
from ipsecq.policy.model import Policy
from ipsecq.policy.sockets import FIRST_ID, SocketPolicy
from ipsecq.policy.spd import Spd
from ipsecq.sa import lifetime
from ipsecq.sa.association import SaKey, SecurityAssociation, Slot
from ipsecq.sa.sad import Sad
from ipsecq.sysctl import Sysctl

_STATE: Final = int(Slot.STATE)
SWEEP: Final = 4096
"""SAs that one look at lifetimes and reservations takes in: a hundred thousand take seconds, not the event loop."""


@dataclass(slots=True)
class Batch:
    """Operations to send, and what is due when all workers have acknowledged them (:meth:`Authority.done`)."""

    operations: list[Operation] = field(default_factory=list)
    retiring: list[int] = field(default_factory=list)
    """Slots of SAs that have gone, or move."""
    moving: list[tuple[SecurityAssociation, bool]] = field(default_factory=list)
    """(SA, passing): its window has another size, so it gets a slot when no worker uses the old one."""

    def __bool__(self) -> bool:
        return bool(self.operations or self.retiring or self.moving)


class Authority:
    """The originals.  ``sad``, ``spd`` and ``sysctl`` may be read by anybody and are changed by this object alone."""

    def __init__(
        self, table: SharedTable, book: LeaseBook, *, rekey_grace: float = 0.0, peer_limit: int = 1000
    ) -> None:
        """``rekey_grace``: seconds that :meth:`retire_sa` lets a replaced SA go on receiving.

        ``peer_limit``: pairs of addresses whose totals are kept one by one.
        """
        self.sad = Sad()
        self.spd = Spd()
        self.sysctl = Sysctl()
        self.book = book
        self.problems: dict[SaKey, str] = {}
        """SAs that refuse to send, and why."""
        self.ledger = PairLedger(table.words, peer_limit)
        self.observer: Callable[[str, SecurityAssociation | Policy], None] = lambda what, item: None
        """Hears of every change: its name as an event, and the SA or policy."""
        self._table = table
        self._slots = Slots(table, book, self.ledger)
        self._batch = Batch()
        self._marks = 0
        """Points in the stream of operations at which a new worker's whole state was taken."""
        self._sweep: list[SecurityAssociation] = []
        self._rekey_grace = rekey_grace
        self._leaving: dict[SaKey, tuple[float, SecurityAssociation]] = {}
        """Deleted, but still receiving, and until when: no longer in ``sad``, still in the workers' SADs."""

    @property
    def changed(self) -> bool:
        """Is there anything that :meth:`take` has not given out yet?"""
        return bool(self._batch)

    @property
    def _operations(self) -> list[Operation]:
        return self._batch.operations

    # -- for the workers ---------------------------------------------------------------------------------------------

    def take(self) -> Batch:
        """What has changed since the last call."""
        batch, self._batch = self._batch, Batch()
        return batch

    def done(self, batch: Batch) -> None:
        """All workers have acknowledged the batch: no worker knows the slots of its deleted SAs any more.

        An SA that changes its slot gets the new one now, in operations for the next batch.
        """
        wanted = [(sa, passing) for sa, passing in batch.moving if self.sad.inbound(sa.key) is sa]
        kept = {fingerprint(sa) for sa, _ in wanted}
        with self.ledger.lock:
            self._slots.release(batch.retiring, kept)
            for at, (sa, passing) in enumerate(wanted):
                try:
                    self._give(sa, passing)
                except IpsecqError:
                    self._batch.moving += wanted[at:]
                    raise

    def undone(self, batch: Batch) -> None:
        """Not all workers have acknowledged it.  New workers get the whole state; what is due stays due."""
        self._batch.retiring = batch.retiring + self._batch.retiring
        self._batch.moving = batch.moving + self._batch.moving

    def whole_state(self) -> Iterable[Operation]:
        """Operations that bring an empty replica to now.

        What has collected for the next batch is in them: the replica passes over it, up to the mark that is set here.
        Told once more how all came about, it would have policies and SAs of equal rank in another order.
        """
        mark = 0
        if self._operations:
            self._marks += 1
            mark = self._marks
            self._operations.append(("mark", mark))
        for name, value in self.sysctl.all().items():
            yield ("sysctl", name, value)
        for sa in self.sad.in_order():
            if sa.slot >= 0:
                yield ("sa_put", sa)
            elif sa.state is SaState.LARVAL:
                yield ("sa_larval", *sa.key)
        for key, (_, sa) in self._leaving.items():
            yield ("sa_put", sa)
            yield ("sa_withdraw", *key)
        yield ("spd_replace", self.spd.dump())
        for policy in self.spd.sockets.values():
            yield ("socket_put", policy)
        if mark:
            yield ("until_mark", mark)

    # -- SAs ---------------------------------------------------------------------------------------------------------

    def add_sa(self, sa: SecurityAssociation, *, passing: bool = False) -> SecurityAssociation:
        """Add ``sa`` (``passing``: its keys were just negotiated, so never used).  SadError EEXIST, DaemonError."""
        self.sad.add(sa)
        leaving = self._leaving.pop(sa.key, None)
        if leaving is not None:
            # Its SPI has a new owner: workers must not go on with a slot that is free.
            self._gone(leaving[1])
        try:
            # A larval SA keeps its SPI from others; workers keep what its peer sends too early.
            if sa.state is not SaState.LARVAL:
                self._give(sa, passing)
            else:
                self._operations.append(("sa_larval", *sa.key))
        except BaseException:
            self.sad.delete(sa.dst, sa.protocol, sa.spi)
            raise
        self.observer("sa_added", sa)
        return sa

    def _give(self, sa: SecurityAssociation, passing: bool) -> None:
        """A slot for an SA that is new to workers, now or as soon as it can be."""
        if self._slots.must_wait(sa):
            self._batch.moving.append((sa, passing))
        else:
            self._enroll(sa, passing)
            self._operations.append(("sa_put", sa))

    def update_sa(self, sa: SecurityAssociation, *, passing: bool = False) -> None:
        """Put ``sa`` in the place of the one with its key.  SadError ESRCH."""
        old = self.sad.get(sa.dst, sa.protocol, sa.spi)
        if self._slots.must_wait(sa):
            self.sad.update(sa)
            self._operations.append(("sa_delete", sa.dst, int(sa.protocol), sa.spi))
            if old.slot >= 0:
                self._batch.retiring.append(old.slot)
            self._batch.moving.append((sa, passing))
            self.observer("sa_updated", sa)
            return
        self._enroll(sa, passing, old.slot)
        if old.state is not SaState.LARVAL and sa.slot == old.slot and sa.slot >= 0:
            # New limits, new judgement: what a worker said about the old ones no longer counts.
            self._table.words[sa.slot + _STATE] = 0
        self.sad.update(sa)
        if old.slot != sa.slot and old.slot >= 0:
            self._batch.retiring.append(old.slot)
        self._operations.append(("sa_put", sa))
        self.observer("sa_added" if old.state is SaState.LARVAL else "sa_updated", sa)

    def delete_sa(self, key: SaKey, what: str = "sa_deleted") -> SecurityAssociation:
        """Remove and return; ``what`` the observer is told.  SadError ESRCH."""
        sa = self.sad.delete(key.dst, key.protocol, key.spi)
        self._gone(sa)
        self.observer(what, sa)
        return sa

    def retire_sa(self, key: SaKey, now: float) -> SecurityAssociation:
        """Remove and return, as a key management daemon wants it after a rekey.  SadError ESRCH.

        The daemon that asked for new SAs deletes the old ones as soon as it has the new ones; its peer sends through the
        old one until it hears of that.  So an SA with a successor (same protocol, ends and mode, and reqid if it has one)
        goes on receiving for the grace time, and never sends again.  One without a successor goes at once.
        """
        sa = self.sad.delete(key.dst, key.protocol, key.spi)
        successor = self.sad.outbound(int(sa.protocol), int(sa.mode), sa.src, sa.dst, sa.reqid)
        if successor is None or sa.slot < 0 or not self._rekey_grace:
            self._gone(sa)
        else:
            self.problems.pop(sa.key, None)
            self._leaving[key] = now + self._rekey_grace, sa
            self._operations.append(("sa_withdraw", *key))
        self.observer("sa_deleted", sa)
        return sa

    def part(self, now: float) -> None:
        """Let go of the SAs whose grace time is over."""
        for key in [key for key, (until, _) in self._leaving.items() if until <= now]:
            self._gone(self._leaving.pop(key)[1])

    def flush_sas(self, protocol: int | None = None) -> list[SecurityAssociation]:
        """Remove all SAs (of one protocol); return them."""
        gone = self.sad.flush(protocol)
        for sa in gone:
            self._gone(sa)
            self.observer("sa_deleted", sa)
        for key in [key for key in self._leaving if protocol in (None, key.protocol)]:
            self._gone(self._leaving.pop(key)[1])
        return gone

    def set_state(self, sa: SecurityAssociation, state: SaState) -> None:
        """Soft limit reached: DYING.  (At the hard limit an SA is deleted.)"""
        self.sad.set_state(sa, state)
        self._operations.append(("sa_state", sa.dst, int(sa.protocol), sa.spi, int(state)))

    def _gone(self, sa: SecurityAssociation) -> None:
        self.problems.pop(sa.key, None)
        self._operations.append(("sa_delete", sa.dst, int(sa.protocol), sa.spi))
        if sa.slot >= 0:
            self._batch.retiring.append(sa.slot)

    def _enroll(self, sa: SecurityAssociation, passing: bool, old_slot: int = -1) -> None:
        if problem := self._slots.enroll(sa, passing, old_slot):
            self.problems[sa.key] = problem

    def expire(self, now: float, sas: Iterable[SecurityAssociation]) -> list[tuple[SecurityAssociation, bool]]:
        """Judge the lifetimes of ``sas``; (SA, hard) for each that reached one.  Hard ones are gone."""
        found: list[tuple[SecurityAssociation, bool]] = []
        words = self._table.words
        for sa in sas:
            if sa.slot < 0 or sa.state not in {SaState.MATURE, SaState.DYING} or self.sad.inbound(sa.key) is not sa:
                continue
            state = lifetime.judge(sa, words, now)
            if state is SaState.DEAD:
                self.delete_sa(sa.key, "sa_expired:hard")
                found.append((sa, True))
            elif state is SaState.DYING and sa.state is SaState.MATURE:
                self.set_state(sa, SaState.DYING)
                self.observer("sa_expired:soft", sa)
                found.append((sa, False))
        return found

    def expire_larval(self, now: float) -> list[tuple[SecurityAssociation, bool]]:
        """Remove the larval SAs that nobody completed; return them as :meth:`expire` does."""
        gone = self.sad.expired_larval(now, self.sysctl.key.larval_lifetime)
        for sa in gone:
            self._gone(sa)
            self.observer("sa_expired:larval", sa)
        return [(sa, True) for sa in gone]

    def sweep(self) -> list[SecurityAssociation]:
        """The next :data:`SWEEP` SAs of a round through all of them; some may have gone meanwhile."""
        if not self._sweep:
            self._sweep = self.sad.dump()
        part, self._sweep = self._sweep[:SWEEP], self._sweep[SWEEP:]
        return part

    def expire_policies(self, now: float) -> list[Policy]:
        """Remove the policies whose lifetime is over; return them."""
        gone = self.spd.expired(now)
        for policy in gone:
            self._operations.append(("spd_delete", policy.id))
            self.observer("policy_expired", policy)
        return gone

    # -- policies and knobs ------------------------------------------------------------------------------------------

    def add_policy(self, policy: Policy) -> Policy:
        """Add; return as stored.  SpdError EEXIST."""
        stored = self.spd.add(policy)
        self._operations.append(("spd_put", stored))
        self.observer("policy_added", stored)
        return stored

    def update_policy(self, policy: Policy) -> Policy:
        """Replace or add; return as stored."""
        stored = self.spd.update(policy)
        self._operations.append(("spd_put", stored))
        self.observer("policy_added", stored)
        return stored

    def delete_policy(self, policy_id: int) -> Policy:
        """Remove; return.  SpdError ENOENT."""
        policy = self.spd.delete_id(policy_id)
        self._operations.append(("spd_delete", policy_id))
        self.observer("policy_deleted", policy)
        return policy

    def flush_policies(self) -> list[Policy]:
        """Remove all; return them."""
        gone = self.spd.flush()
        self._operations.append(("spd_replace", []))
        for policy in gone:
            self.observer("policy_deleted", policy)
        return gone

    def replace_policies(self, policies: list[Policy]) -> None:
        """Make the SPD these, in this order; those that are there already stay as they are."""
        before = [(policy.id, policy) for policy in self.spd.dump()]
        self.spd.replace_all(policies)
        if before != [(policy.id, policy) for policy in self.spd.dump()]:
            self._operations.append(("spd_replace", self.spd.dump()))
            self._tell_difference(before)

    def _tell_difference(self, before: list[tuple[int, Policy]]) -> None:
        now = {policy.id for policy in self.spd}
        known = {number for number, _ in before}
        for number, policy in before:
            if number not in now:
                self.observer("policy_deleted", policy)
        for policy in self.spd:
            if policy.id not in known:
                self.observer("policy_added", policy)

    def put_socket(self, policy: SocketPolicy) -> None:
        """Add or replace the policies of a mark."""
        self.spd.put_socket(policy)
        self._operations.append(("socket_put", policy))

    def again(self, policy: SocketPolicy) -> None:
        """One more socket has a mark that is known: workers forget what they remember about flows."""
        self._operations.append(("socket_again", policy))

    def drop_socket(self, mark: int) -> None:
        """Forget a mark that no socket has."""
        self.spd.drop_socket(mark)
        self._operations.append(("socket_drop", mark))

    def policy(self, policy_id: int) -> Policy:
        """The policy with this id, of the SPD or of a socket.  SpdError ENOENT."""
        if policy_id >= FIRST_ID:
            for pair in self.spd.sockets.values():
                for policy in pair.policies():
                    if policy.id == policy_id:
                        return policy
        return self.spd.get(policy_id)

    def set_sysctl(self, name: str, value: int | str) -> tuple[int, int]:
        """Set a knob; (old, new).  SysctlError."""
        old = self.sysctl.set(name, value)
        new = self.sysctl.get(name)
        self._operations.append(("sysctl", name, new))
        return old, new

    def usage_words(self, sa: SecurityAssociation) -> memoryview | None:
        """The SA's slot, for counters; None while it has none."""
        return self._table.words[sa.slot : sa.slot + Slot.WINDOW] if sa.slot >= 0 else None
