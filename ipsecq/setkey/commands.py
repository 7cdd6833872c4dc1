"""The commands of setkey(8) as data: what one sentence of a configuration says, and where it was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ipsecq.numbers import Direction, Protocol
from ipsecq.policy.model import Policy, Selector
from ipsecq.sa.association import SecurityAssociation

SADB_X_EXT_RAWCPI: Final = 0x0080
"""``-C deflate -R`` (KAME): the SPI is the CPI on the wire, which it always is here."""
SADB_X_EXT_PRAND: Final = 0x0100
"""``-f random-pad`` (KAME).  Kept for the dump; ESP pads with 1, 2, 3, … always (RFC 4303 section 2.4)."""
SADB_X_EXT_PZERO: Final = 0x0200
"""``-f zero-pad`` (KAME).  As above."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Command:
    """Common to all: where the command's first word stands, from 1."""

    line: int = 0
    column: int = 0


@dataclass(slots=True, frozen=True)
class Add(Command):
    """``add``: a new SA."""

    sa: SecurityAssociation


@dataclass(slots=True, frozen=True)
class Get(Command):
    """``get``: show one SA."""

    src: bytes
    dst: bytes
    protocol: Protocol
    spi: int


@dataclass(slots=True, frozen=True)
class Delete(Command):
    """``delete``: remove one SA."""

    src: bytes
    dst: bytes
    protocol: Protocol
    spi: int


@dataclass(slots=True, frozen=True)
class DeleteAll(Command):
    """``deleteall``: remove every SA of one protocol (all of them, if None) between two ends."""

    src: bytes
    dst: bytes
    protocol: Protocol | None = None


@dataclass(slots=True, frozen=True)
class Flush(Command):
    """``flush``: remove every SA (of one protocol)."""

    protocol: Protocol | None = None


@dataclass(slots=True, frozen=True)
class Dump(Command):
    """``dump``: show every SA (of one protocol)."""

    protocol: Protocol | None = None


@dataclass(slots=True, frozen=True)
class SpdAdd(Command):
    """``spdadd``: a new policy."""

    policy: Policy
    forward: bool = field(default=False, kw_only=True)
    """Written as *fwd*, which the policy's direction, IN, doesn't say."""


@dataclass(slots=True, frozen=True)
class SpdUpdate(Command):
    """``spdupdate``: replace the policy with this direction and selector, or add it."""

    policy: Policy
    forward: bool = field(default=False, kw_only=True)


@dataclass(slots=True, frozen=True)
class SpdDelete(Command):
    """``spddelete``: remove the policy with this direction and selector."""

    direction: Direction
    selector: Selector
    forward: bool = field(default=False, kw_only=True)


@dataclass(slots=True, frozen=True)
class SpdDump(Command):
    """``spddump``: show every policy."""


@dataclass(slots=True, frozen=True)
class SpdFlush(Command):
    """``spdflush``: remove every policy."""


@dataclass(slots=True, frozen=True)
class Exit(Command):
    """``exit`` (``quit``, ``bye``): the rest of the input is not read."""
