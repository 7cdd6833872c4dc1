"""The daemon takes over what its files say, and takes that back when a late step of a reload fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from ipsecq.daemon.authority import Authority
from ipsecq.daemon.undo import Undo
from ipsecq.numbers import SaState
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SaKey, SecurityAssociation
from ipsecq.sa.sad import Sad

PFKEY_LABEL: Final = ("pfkey:", "setkey:")
"""Begin the labels of whatever came over PF_KEY, or by ``ipsecq setkey``."""


def take_over(
    authority: Authority, sad: Sad, spd: Spd, sysctl: Mapping[str, int],
    *, was: Iterable[SaKey] = (), undo: Undo | None = None,
) -> None:  # fmt: skip
    """Take over what the files say.  SAs, policies and knobs that they do not change stay as they are.

    ``sysctl``: the knobs to set; the others keep the values that somebody set since the start.

    ``was``: what the files said before; such SAs go when the files no longer have them.  SAs and policies that
    came over PF_KEY stay, except where the files now have their own.  When a slot or the disk fails for a new SA,
    what was done so far stands in ``undo``: see :func:`take_back`.
    """
    undo = undo if undo is not None else Undo()
    with authority.book.batch():
        for sa in sad.dump():
            old = _there(authority, sa.key)
            if old is None:
                authority.add_sa(sa)
            elif not same(old, sa):
                authority.update_sa(sa)
            else:
                continue
            undo.sas[sa.key] = old, sa
    wanted = {sa.key for sa in sad}
    for key in was:
        if key not in wanted and key in authority.sad:
            undo.sas[key] = authority.delete_sa(key), None
    undo.before = authority.spd.dump()
    files = [replace(policy, id=0) for policy in spd.dump()]
    mine = {(policy.direction, policy.selector) for policy in files}
    others = [
        policy
        for policy in undo.before
        if policy.label.startswith(PFKEY_LABEL) and (policy.direction, policy.selector) not in mine
    ]
    # As after a start: the files first, and what key management added since behind them.
    authority.replace_policies([*files, *others])
    undo.after = authority.spd.dump()
    for name, value in sysctl.items():
        if authority.sysctl.get(name) != value:
            undo.knobs[name] = authority.set_sysctl(name, value)[0]


def take_back(authority: Authority, undo: Undo) -> None:
    """Take back what :func:`take_over` did, and leave alone what others changed since."""
    for key, (old, new) in undo.sas.items():
        now = _there(authority, key)
        if now is not new:
            continue
        if old is None:
            authority.delete_sa(key)
        elif now is None:
            authority.add_sa(old)
        else:
            authority.update_sa(old)
    if undo.after is not None:
        authority.replace_policies(undo.policies(authority.spd.dump()))
    for name, value in undo.knobs.items():
        authority.set_sysctl(name, value)


def _there(authority: Authority, key: SaKey) -> SecurityAssociation | None:
    return authority.sad.get(*key) if key in authority.sad else None


def same(one: SecurityAssociation, other: SecurityAssociation) -> bool:
    """True when two SAs differ in nothing that matters to packets: then a reload leaves the old one alone."""
    blank = {"created": 0.0, "slot": -1, "label": "", "state": SaState.MATURE, "pid": 0}
    return replace(one, **blank) == replace(other, **blank)  # type: ignore[arg-type]
