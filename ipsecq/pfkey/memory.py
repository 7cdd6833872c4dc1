"""SAD and SPD with no gateway behind them, as a :class:`SecurityDatabase`: for tests, fuzzers and offline tools."""

from __future__ import annotations

from collections.abc import Sequence

from ipsecq.numbers import Direction
from ipsecq.pfkey.database import Usage
from ipsecq.policy.model import Policy, Selector
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import SaKey, SecurityAssociation
from ipsecq.sa.sad import Sad


class MemoryDatabase:
    """The two databases; ``usages`` by SA key and ``failed`` (what acquire_failed was told) are for whoever tests."""

    def __init__(self) -> None:
        self.sad = Sad()
        self.spd = Spd()
        self.usages: dict[SaKey, Usage] = {}
        self.failed: list[tuple[int, bytes, bytes, int]] = []

    def find_sa(self, key: SaKey) -> SecurityAssociation | None:  # noqa: D102
        return self.sad.get(*key) if key in self.sad else None

    def add_sa(self, sa: SecurityAssociation, *, negotiated: bool = False) -> None:  # noqa: D102
        self.sad.add(sa)

    def update_sa(self, sa: SecurityAssociation, *, negotiated: bool = False) -> None:  # noqa: D102
        self.sad.update(sa)

    def delete_sa(self, key: SaKey) -> SecurityAssociation:  # noqa: D102
        return self.sad.delete(*key)

    def flush_sas(self, protocol: int | None) -> Sequence[SecurityAssociation]:  # noqa: D102
        return self.sad.flush(protocol)

    def sas(self, protocol: int | None) -> Sequence[SecurityAssociation]:  # noqa: D102
        return self.sad.dump(protocol)

    def usage(self, sa: SecurityAssociation) -> Usage:  # noqa: D102
        return self.usages.get(sa.key, Usage())

    def add_policy(self, policy: Policy) -> Policy:  # noqa: D102
        return self.spd.add(policy)

    def update_policy(self, policy: Policy) -> Policy:  # noqa: D102
        return self.spd.update(policy)

    def delete_policy(self, policy_id: int) -> Policy:  # noqa: D102
        return self.spd.delete_id(policy_id)

    def find_policy(self, direction: Direction, selector: Selector) -> Policy | None:  # noqa: D102
        return self.spd.find(direction, selector)

    def get_policy(self, policy_id: int) -> Policy:  # noqa: D102
        return self.spd.get(policy_id)

    def flush_policies(self) -> Sequence[Policy]:  # noqa: D102
        return self.spd.flush()

    def policies(self) -> Sequence[Policy]:  # noqa: D102
        return self.spd.dump()

    def acquire_failed(self, protocol: int, src: bytes, dst: bytes, reqid: int) -> None:  # noqa: D102
        self.failed.append((protocol, src, dst, reqid))
