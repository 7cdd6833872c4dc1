"""Faults that can be read from SAs and policies alone: no clock, no machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from ipsecq.crypto import registry
from ipsecq.doctor.finding import Finding, Grade
from ipsecq.numbers import Action, Direction, Mode
from ipsecq.packet.address import text as _text
from ipsecq.policy.model import Policy, Selector, Transform
from ipsecq.sa.association import SecurityAssociation
from ipsecq.setkey import printer

End = tuple[bytes | None, bytes | None]


def examine(
    sas: Iterable[SecurityAssociation], policies: Sequence[Policy], is_local: Callable[[bytes], bool]
) -> Iterator[Finding]:
    """Mirrors, ends and keys.  ``is_local(address)``: whether an address is this machine's."""
    found = [*_mirrors(policies), *_ends(policies, is_local), *_keys(list(sas))]
    yield from found
    if policies and not found:
        yield Finding(Grade.OK, "policies", "every policy has its mirror, and one end of every tunnel is here")


def _swapped(selector: Selector) -> Selector:
    if selector.protocol in {1, 58}:  # type and code do not change places
        return Selector(
            selector.dst_first, selector.dst_last, selector.src_first, selector.src_last, selector.protocol,
            selector.sport_first, selector.sport_last, selector.dport_first, selector.dport_last,
        )  # fmt: skip
    return Selector(
        selector.dst_first, selector.dst_last, selector.src_first, selector.src_last, selector.protocol,
        selector.dport_first, selector.dport_last, selector.sport_first, selector.sport_last,
    )  # fmt: skip


def _ends(policies: Sequence[Policy], is_local: Callable[[bytes], bool]) -> Iterator[Finding]:
    said: set[tuple[bytes | None, bytes | None]] = set()
    for policy in policies:
        # Inner tunnels of a bundle may end elsewhere; the outermost one, written last, begins here.
        transform = next((each for each in reversed(policy.transforms) if each.mode is Mode.TUNNEL), None)
        if transform is None or transform.src is None or transform.dst is None:
            continue
        ours = transform.src if policy.direction is Direction.OUT else transform.dst
        theirs = transform.dst if policy.direction is Direction.OUT else transform.src
        if is_local(ours) or (ours, theirs) in said:
            continue
        said.add((ours, theirs))
        if is_local(theirs):
            yield Finding(
                Grade.FAIL, "tunnel ends", f"{_text(transform.src)}-{_text(transform.dst)} of an '"
                f"{policy.direction.name.lower()}' policy has its ends in each other's place ({policy.label})",
                "this machine's address is the first end of 'out' and the second of 'in'",
            )  # fmt: skip
        else:
            yield Finding(
                Grade.FAIL, "tunnel ends", f"{_text(ours)} is no address of this machine, but policies tunnel from there "
                f"({policy.label})", f"ip address add {_text(ours)} dev DEVICE, or mend the policy",
            )  # fmt: skip


def _mirrors(policies: Sequence[Policy]) -> Iterator[Finding]:
    by_selector: dict[tuple[Direction, Selector], Policy] = {}
    for policy in policies:
        by_selector.setdefault((policy.direction, policy.selector), policy)
    for policy in policies:
        if policy.action is not Action.IPSEC:
            continue
        other = Direction.IN if policy.direction is Direction.OUT else Direction.OUT
        mirror = by_selector.get((other, _swapped(policy.selector)))
        name = printer.config_policy(policy)
        if mirror is None:
            near = _overlapping(policies, other, _swapped(policy.selector))
            yield Finding(
                Grade.WARN, "mirror", f"no '{other.name.lower()}' policy mirrors: {name}"
                + (f"; nearest: {printer.config_policy(near)}" if near else ""),
                "add it with source and destination, and the tunnel's ends, in each other's place",
            )  # fmt: skip
        elif policy.direction is Direction.OUT and _ends_of(mirror.transforms) != _ends_of(policy.transforms, swap=True):
            yield Finding(
                Grade.FAIL, "mirror", f"out and in of one traffic go different ways: {name} against "
                f"{printer.config_policy(mirror)}", "the same transforms, with their ends in each other's place",
            )  # fmt: skip


def _overlapping(policies: Sequence[Policy], direction: Direction, wanted: Selector) -> Policy | None:
    for policy in policies:
        selector = policy.selector
        if (
            policy.direction is direction
            and policy.action is Action.IPSEC
            and selector.family == wanted.family
            and selector.src_first <= wanted.src_last
            and wanted.src_first <= selector.src_last
            and selector.dst_first <= wanted.dst_last
            and wanted.dst_first <= selector.dst_last
        ):
            return policy
    return None


def _ends_of(transforms: Sequence[Transform], *, swap: bool = False) -> list[tuple[int, int, End]]:
    return [
        (int(each.protocol), int(each.mode), (each.dst, each.src) if swap else (each.src, each.dst))
        for each in transforms
    ]


def _keys(sas: list[SecurityAssociation]) -> Iterator[Finding]:
    """Manual keys that two SAs share: the counters of counter modes start at one in both."""
    users: dict[tuple[str, object], list[SecurityAssociation]] = defaultdict(list)
    for sa in sas:
        if sa.encryption and sa.encryption_key and registry.encryption(sa.encryption).iv_is_counter:
            users[sa.encryption, sa.encryption_key].append(sa)
    for sharers in users.values():
        if len(sharers) > 1:
            yield Finding(
                Grade.FAIL, "shared key", "one key of a counter mode in several SAs ("
                + ", ".join(f"0x{sa.spi:x} at {sa.label or 'PF_KEY'}" for sa in sharers)
                + "): the same nonces under the same key give plaintexts away",
                "make a key of its own for each SA and direction",
            )  # fmt: skip
