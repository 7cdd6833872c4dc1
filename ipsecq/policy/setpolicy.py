"""Policy strings of ipsec_set_policy(3): ``out prio high + 3 ipsec esp/tunnel/A-B/require``, to data and back.

    policy     := direction [priority] [action rule*]
    direction  := in | out
    priority   := (prio | priority) ([+|-] offset | (low | def | high) [(+|-) offset])
    action     := discard | none | entrust | bypass | ipsec
    rule       := protocol / mode [ / [ends] [ / [level] ] ]
    ends       := SRC-DST | SRC[PORT]-DST[PORT] | me-any (out) | any-me (in)
    level      := default | use | require | unique, each with an optional :ID (or #ID, as setkey -DP prints it)

White space is free around every sign.  Ports of ends are read and don't matter: an SA is found by its addresses and
reqid.  Host names are not resolved.

A priority counts from the default: ``prio high + 3`` is more urgent than ``prio high``, that more than none at all.
:attr:`Policy.priority` holds it with 0 for the default and lower (negative) values first; PF_KEY and setkey count from
0x80000000, see :func:`priority_to_wire`.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeVar

from ipsecq.errors import PolicySyntaxError
from ipsecq.numbers import Action, Direction, Level, Mode, Protocol
from ipsecq.policy.model import Policy, Transform
from ipsecq.secret import may_be_key

PRIORITY_BASES: Final = {"high": -0x40000000, "def": 0, "low": 0x40000000}
_WIRE_DEFAULT: Final = 0x80000000
_MAX_OFFSET: Final = 0x3FFFFFFF
"""Largest offset from low, def or high, so that the three don't overlap (setkey(8): 1073741823)."""

_PROTOCOLS: Final = {"esp": Protocol.ESP, "ah": Protocol.AH, "ipcomp": Protocol.IPCOMP}
_MODES: Final = {"transport": Mode.TRANSPORT, "tunnel": Mode.TUNNEL, "any": Mode.ANY}
_LEVELS: Final = {level.name.lower(): level for level in Level}
_ACTIONS: Final = {action.name.lower(): action for action in Action}
_DIRECTIONS: Final = {"in": Direction.IN, "out": Direction.OUT}

_Choice = TypeVar("_Choice")
_TOKEN: Final = re.compile(r"\s*([\w.:%#]+|\S)")


@dataclass(slots=True, frozen=True)
class PolicySpec:
    """What a policy string says: everything of a :class:`Policy` but the selector.

    ``action`` is None when the string is a direction only (``spddelete``).
    """

    direction: Direction
    action: Action | None = None
    priority: int = 0
    transforms: tuple[Transform, ...] = ()
    forward: bool = False
    """Written as *fwd*; the direction is IN."""


def parse(text: str, *, forward: bool = False) -> PolicySpec:
    """Parse a policy string; PolicySyntaxError with the column (from 1) of what is wrong.

    ``forward``: Linux's direction *fwd* is taken, too (libipsec of ipsec-tools).
    """
    return _Parser(text).policy(forward)


def format(policy: Policy | PolicySpec, delimiter: str = " ") -> str:
    """Return the policy string of ``policy``: ``parse`` gives the same back.

    ``delimiter`` stands before each rule (``setkey -DP`` uses a line feed and a tab).
    """
    words = [policy.direction.name.lower()]
    if policy.priority:
        words.append(format_priority(policy.priority))
    if policy.action is not None:
        words.append(policy.action.name.lower())
    return " ".join(words) + "".join(delimiter + format_transform(rule) for rule in policy.transforms)


def format_priority(priority: int) -> str:
    """Return ``prio high + 3``, ``prio def - 5``, …: the name next to it, as setkey(8) prints it."""
    name, base = min(PRIORITY_BASES.items(), key=lambda item: (abs(priority - item[1]), abs(item[1])))
    offset = base - priority
    if not offset:
        return f"prio {name}"
    return f"prio {name} {'+' if offset > 0 else '-'} {abs(offset)}"


def format_transform(rule: Transform) -> str:
    """Return ``protocol/mode/src-dst/level`` of one transform."""
    ends = ""
    if rule.src is not None and rule.dst is not None:
        ends = f"{ipaddress.ip_address(rule.src)}-{ipaddress.ip_address(rule.dst)}"
    reqid = f":{rule.reqid}" if rule.reqid else ""
    return f"{rule.protocol.name.lower()}/{rule.mode.name.lower()}/{ends}/{rule.level.name.lower()}{reqid}"


def priority_to_wire(priority: int) -> int:
    """Return ``sadb_x_policy_priority`` (u32): 0 when none was given, else counted from 0x80000000."""
    return (priority + _WIRE_DEFAULT) & 0xFFFFFFFF if priority else 0


def priority_from_wire(value: int) -> int:
    """Return :attr:`Policy.priority` of a ``sadb_x_policy_priority``; 0 on the wire is the default."""
    return value - _WIRE_DEFAULT if value else 0


def decimal(digits: str) -> int:
    """Return the number that ASCII digits spell; of one with more than 20 digits only that it is too large.

    int() takes no more than 4300 digits.
    """
    return int(digits.lstrip("0")[:21] or "0")


@lru_cache(1024)
def _packed(text: str) -> bytes:
    """One object for the ends of neighbouring policies.  ValueError."""
    return ipaddress.ip_address(text).packed


class _Parser:
    """Recursive descent over the tokens of one string; each token knows its column."""

    def __init__(self, text: str) -> None:
        self.tokens = [(match.group(1), match.start(1) + 1) for match in _TOKEN.finditer(text)]
        # The end has the column after the last sign, where something is missing.
        self.tokens.append(("", len(text.rstrip()) + 1))
        self.index = 0

    @property
    def word(self) -> str:
        return self.tokens[self.index][0]

    def fail(self, expected: str) -> PolicySyntaxError:
        word, column = self.tokens[self.index]
        # In setkey.conf, a sentence without its semicolon runs on into the next one, where keys may be.
        hidden = may_be_key(word.strip(":#"))
        found = f"a word of {len(word)} characters" if hidden else f"'{word}'" if word else "the end of the policy"
        return PolicySyntaxError(f"expected {expected}, found {found}", column)

    def take(self) -> str:
        word = self.word
        self.index += 1
        return word

    def take_if(self, word: str) -> bool:
        if self.word.lower() != word:
            return False
        self.index += 1
        return True

    def choose(self, choices: dict[str, _Choice], what: str) -> _Choice:
        choice = choices.get(self.word.lower())
        if choice is None:
            raise self.fail(f"{what} ({', '.join(choices)})")
        self.index += 1
        return choice

    def policy(self, forward: bool) -> PolicySpec:
        written_forward = forward and self.take_if("fwd")
        direction = Direction.IN if written_forward else self.choose(_DIRECTIONS, "a direction")
        if not self.word:
            return PolicySpec(direction, forward=written_forward)
        priority = self.priority() if self.word.lower() in ("prio", "priority") else 0
        action = self.choose(_ACTIONS, "an action")
        rules: list[Transform] = []
        while self.word:
            if action is not Action.IPSEC:
                raise self.fail(f"nothing after {action.name.lower()}")
            rules.append(self.rule(direction))
        if action is Action.IPSEC and not rules:
            raise self.fail("a rule such as esp/tunnel/SRC-DST/require")
        return PolicySpec(direction, action, priority, tuple(rules), written_forward)

    def priority(self) -> int:
        self.take()
        base = PRIORITY_BASES.get(self.word.lower())
        if base is not None:
            self.take()
            if self.word not in ("+", "-"):
                return base
            sign = 1 if self.take() == "+" else -1
            return base - sign * self.number("an offset", _MAX_OFFSET)
        sign = -1 if self.word == "-" else 1
        if self.word in ("+", "-"):
            self.take()
        # A larger number is more urgent, a lower Policy.priority too.
        return -sign * self.number("low, def, high or an offset", 0x7FFFFFFF)

    def number(self, what: str, most: int) -> int:
        word = self.word
        if not word.isascii() or not word.isdigit() or decimal(word) > most:
            raise self.fail(f"{what} from 0 to {most}")
        self.take()
        return decimal(word)

    def rule(self, direction: Direction) -> Transform:
        protocol = self.choose(_PROTOCOLS, "a protocol")
        self.slash()
        mode_column = self.tokens[self.index][1]
        mode = self.choose(_MODES, "a mode")
        src: bytes | None = None
        dst: bytes | None = None
        level, reqid = Level.DEFAULT, 0
        if self.take_if("/"):
            if self.word not in ("/", "") and not self.at_rule():
                src, dst = self.ends(direction)
            if self.take_if("/") and self.word and not self.at_rule():
                level, reqid = self.level()
        if mode is Mode.TUNNEL and src is None:
            raise PolicySyntaxError("a tunnel needs its ends: write esp/tunnel/SRC-DST/require", mode_column)
        return Transform(protocol, mode, src, dst, level, reqid)

    def at_rule(self) -> bool:
        return self.word.lower() in _PROTOCOLS and self.tokens[self.index + 1][0] == "/"

    def slash(self) -> None:
        if not self.take_if("/"):
            raise self.fail("'/'")

    def ends(self, direction: Direction) -> tuple[bytes | None, bytes | None]:
        words = ("me", "any") if direction is Direction.OUT else ("any", "me")
        if self.word.lower() in words:
            for position, word in enumerate(words):
                if position and not self.take_if("-"):
                    raise self.fail("'-'")
                if not self.take_if(word):
                    raise self.fail(f"{words[0]}-{words[1]} for direction {direction.name.lower()}")
            return None, None
        src = self.address()
        if not self.take_if("-"):
            raise self.fail("'-' between the ends")
        column = self.tokens[self.index][1]
        dst = self.address()
        if len(src) != len(dst):
            raise PolicySyntaxError("expected both ends in one family, found IPv4 and IPv6", column)
        return src, dst

    def address(self) -> bytes:
        try:
            packed = _packed(self.word)
        except ValueError:
            raise self.fail("an IPv4 or IPv6 address (names are not resolved)") from None
        if "%" in self.word:
            raise self.fail("an address without a zone")
        self.take()
        if self.take_if("["):
            if self.word.lower() == "any":
                self.take()
            else:
                self.number("a port", 65535)
            if not self.take_if("]"):
                raise self.fail("']'")
        return packed

    def level(self) -> tuple[Level, int]:
        name, sign, digits = re.split(r"([:#])", self.word, maxsplit=1) if re.search("[:#]", self.word) else (
            self.word, "", "")  # fmt: skip
        level = _LEVELS.get(name.lower())
        if level is None:
            raise self.fail("a level (default, use, require, unique or unique:ID)")
        reqid = 0
        if sign:
            if not digits.isascii() or not digits.isdigit() or not 0 < decimal(digits) <= 0xFFFFFFFF:
                raise self.fail("an ID from 1 to 4294967295 after the level")
            reqid = decimal(digits)
        self.take()
        return level, reqid
