"""SAD, SPD and knobs as the supervisor holds them: the originals, of which workers have copies.

Every change goes through here: it is checked, gets its slot and its sequence reservation, changes the original, and is
queued as operations for the workers (:mod:`ipsecq.daemon.replica`).  The owner of the event loop takes the queue with
:meth:`Authority.take` and sends it; nothing here waits or does I/O but the reservation's write to the state file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from ipsecq.crypto import registry
from ipsecq.daemon.leases import LeaseBook
from ipsecq.daemon.messages import Operation
from ipsecq.daemon.table import SharedTable, fingerprint
from ipsecq.numbers import Protocol, SaState
from ipsecq.policy.model import Policy
from ipsecq.policy.spd import Spd
from ipsecq.sa import lifetime
from ipsecq.sa.association import SaKey, SecurityAssociation, Slot
from ipsecq.sa.sad import Sad
from ipsecq.sysctl import Sysctl

PFKEY_LABEL: Final = "pfkey:"
"""Begins the label of whatever came over PF_KEY."""
_STATE: Final = int(Slot.STATE)


class Authority:
    """The originals.  ``sad``, ``spd`` and ``sysctl`` may be read by anybody and are changed by this object alone."""

    def __init__(self, table: SharedTable, book: LeaseBook) -> None:
        self.sad = Sad()
        self.spd = Spd()
        self.sysctl = Sysctl()
        self.problems: dict[SaKey, str] = {}
        """SAs that refuse to send, and why."""
        self._table = table
        self._book = book
        self._operations: list[Operation] = []
        self._retiring: list[int] = []

    @property
    def changed(self) -> bool:
        """Are there operations that :meth:`take` has not given out yet?"""
        return bool(self._operations)

    # -- for the workers ---------------------------------------------------------------------------------------------

    def take(self) -> tuple[list[Operation], list[int]]:
        """Operations since the last call, and slots to :meth:`retire` when all workers have acknowledged them."""
        operations, self._operations = self._operations, []
        slots, self._retiring = self._retiring, []
        return operations, slots

    def retire(self, slots: Iterable[int]) -> None:
        """Give back the slots of deleted SAs that no worker knows any more."""
        live = {sa.slot for sa in self.sad}
        for slot in slots:
            if slot not in live:
                self._table.retire(slot)

    def whole_state(self) -> Iterable[Operation]:
        """Operations that bring an empty replica to now."""
        for name, value in self.sysctl.all().items():
            yield ("sysctl", name, value)
        for sa in self.sad:
            if sa.state is not SaState.LARVAL:
                yield ("sa_put", sa)
        yield ("spd_replace", self.spd.dump())

    # -- SAs ---------------------------------------------------------------------------------------------------------

    def add_sa(self, sa: SecurityAssociation, *, passing: bool = False) -> SecurityAssociation:
        """Add ``sa`` (``passing``: its keys were just negotiated, so never used).  SadError EEXIST, DaemonError."""
        self.sad.add(sa)
        try:
            self._enroll(sa, passing)
        except BaseException:
            self.sad.delete(sa.dst, sa.protocol, sa.spi)
            raise
        # A larval SA only keeps its SPI from others: packets have no use for it.
        if sa.state is not SaState.LARVAL:
            self._operations.append(("sa_put", sa))
        return sa

    def update_sa(self, sa: SecurityAssociation, *, passing: bool = False) -> None:
        """Put ``sa`` in the place of the one with its key.  SadError ESRCH."""
        old = self.sad.get(sa.dst, sa.protocol, sa.spi)
        self._enroll(sa, passing)
        if old.state is not SaState.LARVAL and sa.slot == old.slot and sa.slot >= 0:
            # New limits, new judgement: what a worker said about the old ones no longer counts.
            self._table.words[sa.slot + _STATE] = 0
        self.sad.update(sa)
        if old.slot != sa.slot and old.slot >= 0:
            self._retiring.append(old.slot)
        self._operations.append(("sa_put", sa))

    def delete_sa(self, key: SaKey) -> SecurityAssociation:
        """Remove and return.  SadError ESRCH."""
        sa = self.sad.delete(key.dst, key.protocol, key.spi)
        self._gone(sa)
        return sa

    def flush_sas(self, protocol: int | None = None) -> list[SecurityAssociation]:
        """Remove all SAs (of one protocol); return them."""
        gone = self.sad.flush(protocol)
        for sa in gone:
            self._gone(sa)
        return gone

    def set_state(self, sa: SecurityAssociation, state: SaState) -> None:
        """Soft limit reached: DYING.  (At the hard limit an SA is deleted.)"""
        self.sad.set_state(sa, state)
        self._operations.append(("sa_state", sa.dst, int(sa.protocol), sa.spi, int(state)))

    def _gone(self, sa: SecurityAssociation) -> None:
        if sa.state is SaState.LARVAL:
            return
        self.problems.pop(sa.key, None)
        self._operations.append(("sa_delete", sa.dst, int(sa.protocol), sa.spi))
        if sa.slot >= 0:
            self._retiring.append(sa.slot)

    def _enroll(self, sa: SecurityAssociation, passing: bool) -> None:
        """Slot and reservation; a larval SA has no keys and needs none."""
        if sa.state is SaState.LARVAL:
            return
        sa.slot = self._table.allocate(fingerprint(sa), sa.replay_window)
        if sa.protocol is Protocol.IPCOMP:
            return
        # AES-GMAC has a counter for its IV as an authentication algorithm, too.
        counter_iv = sa.authentication == "aes-gmac" or (
            sa.encryption is not None and registry.encryption(sa.encryption).iv_is_counter
        )
        problem = self._book.enroll(sa.slot, counter_iv=counter_iv, passing=passing)
        if problem:
            self.problems[sa.key] = self._book.refusal(sa.slot, sa.spi) or problem

    def expire(self, now: float, key: SaKey | None = None) -> list[tuple[SecurityAssociation, bool]]:
        """Judge every SA's lifetimes; (SA, hard) for each that reached one since the last call.  Hard ones are gone.

        ``key``: look at this SA only.
        """
        found: list[tuple[SecurityAssociation, bool]] = []
        words = self._table.words
        for sa in self.sad.dump() if key is None else [self.sad.get(*key)] if key in self.sad else []:
            if sa.slot < 0 or sa.state not in {SaState.MATURE, SaState.DYING}:
                continue
            state = lifetime.judge(sa, words, now)
            if state is SaState.DEAD:
                self.delete_sa(sa.key)
                found.append((sa, True))
            elif state is SaState.DYING and sa.state is SaState.MATURE:
                self.set_state(sa, SaState.DYING)
                found.append((sa, False))
        if key is None:
            found += [(sa, True) for sa in self.sad.expired_larval(now, self.sysctl.key.larval_lifetime)]
        return found

    def expire_policies(self, now: float) -> list[Policy]:
        """Remove the policies whose lifetime is over; return them."""
        gone = self.spd.expired(now)
        self._operations += [("spd_delete", policy.id) for policy in gone]
        return gone

    # -- policies and knobs ------------------------------------------------------------------------------------------

    def add_policy(self, policy: Policy) -> Policy:
        """Add; return as stored.  SpdError EEXIST."""
        stored = self.spd.add(policy)
        self._operations.append(("spd_put", stored))
        return stored

    def update_policy(self, policy: Policy) -> Policy:
        """Replace or add; return as stored."""
        stored = self.spd.update(policy)
        self._operations.append(("spd_put", stored))
        return stored

    def delete_policy(self, policy_id: int) -> Policy:
        """Remove; return.  SpdError ENOENT."""
        policy = self.spd.delete_id(policy_id)
        self._operations.append(("spd_delete", policy_id))
        return policy

    def flush_policies(self) -> list[Policy]:
        """Remove all; return them."""
        gone = self.spd.flush()
        self._operations.append(("spd_replace", []))
        return gone

    def set_sysctl(self, name: str, value: int | str) -> tuple[int, int]:
        """Set a knob; (old, new).  SysctlError."""
        old = self.sysctl.set(name, value)
        new = self.sysctl.get(name)
        self._operations.append(("sysctl", name, new))
        return old, new

    # -- files -------------------------------------------------------------------------------------------------------

    def become(self, sad: Sad, spd: Spd, sysctl: Mapping[str, int], *, was: Iterable[SaKey] = ()) -> None:
        """Take over what the files say.  SAs, policies and knobs that they do not change stay as they are.

        ``was``: what the files said before; such SAs go when the files no longer have them.  SAs and policies that
        came over PF_KEY stay, except where the files now have their own.  Nothing is changed when a slot or the disk
        fails for the first new SA; the caller has checked all else.
        """
        for sa in sad.dump():
            old = self.sad.get(sa.dst, sa.protocol, sa.spi) if sa.key in self.sad else None
            if old is None:
                self.add_sa(sa)
            elif not same(old, sa):
                self.update_sa(sa)
        wanted = {sa.key for sa in sad}
        for key in was:
            if key not in wanted and key in self.sad:
                self.delete_sa(key)
        before = [(policy.id, policy) for policy in self.spd.dump()]
        files = [replace(policy, id=0) for policy in spd.dump()]
        mine = {(policy.direction, policy.selector) for policy in files}
        others = [
            policy
            for _, policy in before
            if policy.label.startswith(PFKEY_LABEL) and (policy.direction, policy.selector) not in mine
        ]
        self.spd.replace_all([*others, *files])
        if before != [(policy.id, policy) for policy in self.spd.dump()]:
            self._operations.append(("spd_replace", self.spd.dump()))
        for name, value in Sysctl(sysctl).all().items():
            if self.sysctl.get(name) != value:
                self.set_sysctl(name, value)

    def usage_words(self, sa: SecurityAssociation) -> memoryview | None:
        """The SA's slot, for counters; None while it has none."""
        return self._table.words[sa.slot : sa.slot + Slot.WINDOW] if sa.slot >= 0 else None


def same(one: SecurityAssociation, other: SecurityAssociation) -> bool:
    """True when two SAs differ in nothing that matters to packets: then a reload leaves the old one alone."""
    blank = {"created": 0.0, "slot": -1, "label": "", "state": SaState.MATURE, "pid": 0}
    return replace(one, **blank) == replace(other, **blank)  # type: ignore[arg-type]
