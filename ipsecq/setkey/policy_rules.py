"""The rules of the setkey(8) grammar for policies: spdadd, spdupdate, spddelete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ipsecq.errors import ConfigError, PolicySyntaxError
from ipsecq.numbers import IPPROTO_GRE
from ipsecq.policy import setpolicy
from ipsecq.policy.model import Policy, Selector
from ipsecq.setkey import commands as c
from ipsecq.setkey import values
from ipsecq.setkey.cursor import Cursor
from ipsecq.setkey.lexer import Kind, Token

_U32: Final = 0xFFFFFFFF


@dataclass(slots=True)
class _Side:
    """One range of a selector; ``first`` is None for any, whose family the other side decides."""

    first: bytes | None
    last: bytes | None
    ports: tuple[int, int]
    token: Token


class PolicyRules(Cursor):
    """One method a command; the command's first word has been read, the semicolon is the caller's."""

    def spd_add(self, start: Token) -> list[c.Command]:
        """``spdadd``: one policy, or one a family for ``any any``."""
        policies, forward = self._policies(start)
        return [c.SpdAdd(policy, forward=forward, line=start.line, column=start.column) for policy in policies]

    def spd_update(self, start: Token) -> list[c.Command]:
        """``spdupdate``: as spdadd."""
        policies, forward = self._policies(start)
        return [c.SpdUpdate(policy, forward=forward, line=start.line, column=start.column) for policy in policies]

    def spd_delete(self, start: Token) -> list[c.Command]:
        """``spddelete``: of the policy only the direction matters."""
        selectors = self._selectors()
        spec = self._policy_text()
        return [
            c.SpdDelete(spec.direction, selector, forward=spec.forward, line=start.line, column=start.column)
            for selector in selectors
        ]

    def spd_dump(self, start: Token) -> list[c.Command]:
        """``spddump``."""
        return [c.SpdDump(line=start.line, column=start.column)]

    def spd_flush(self, start: Token) -> list[c.Command]:
        """``spdflush``."""
        return [c.SpdFlush(line=start.line, column=start.column)]

    def _policies(self, start: Token) -> tuple[list[Policy], bool]:
        """The policies, and whether they were written as *fwd*."""
        selectors = self._selectors()
        lifetime, fail_open = 0, False
        while self.token.kind is Kind.FLAG and self.token.text in ("-lh", "-fail_open"):
            if self.advance().text == "-lh":
                lifetime = self.number("a lifetime in seconds", _U32)
            else:
                fail_open = True
        where = self.token
        spec = self._policy_text()
        if spec.action is None:
            self.fail("an action after the direction (discard, none or ipsec)")
        if spec.action.name in ("ENTRUST", "BYPASS"):
            self.error(f"{spec.action.name.lower()} is for sockets: use none", where)
        label = f"{self.file}:{start.line}" if self.file else ""
        return [
            Policy(
                spec.direction, selector, spec.action, spec.transforms, spec.priority,
                lifetime=lifetime, fail_open=fail_open, label=label,
            )
            for selector in selectors
        ], spec.forward  # fmt: skip

    def _selectors(self) -> list[Selector]:
        """Return one selector, or one for each family when both sides are any and no option names the family."""
        if self.token.kind is Kind.WORD and self.token.text == "tagged":
            self.error("tagged (ALTQ tags of pf) is not supported: write addresses", self.token)
        self.options()
        src, dst = self._side(), self._side()
        token = self.token
        if token.kind is not Kind.WORD:
            self.fail("an upper-layer protocol or any")
        self.advance()
        try:
            upper = values.parse_upper(token.text)
        except ValueError as error:
            self.fail(str(error), token)
        sport, dport = src.ports, dst.ports
        if self.token.kind is Kind.WORD:
            kind = self.advance()
            if upper == IPPROTO_GRE:
                self.error("selectors have no GRE keys here: without one, the policy is for all of gre", kind)
            if upper not in values.ICMP:
                self.fail("-P (only icmp and icmp6 have TYPE,CODE)", kind)
            try:
                ranges = values.parse_icmp(kind.text)
            except ValueError as error:
                self.fail(str(error), kind)
            sport, dport = ranges[:2], ranges[2:]
        elif upper in values.ICMP and (sport, dport) != ((0, 65535), (0, 65535)):
            self.error(f"ports mean nothing for {token.text}: write TYPE,CODE after it", src.token)
        lengths = {len(side.first) for side in (src, dst) if side.first is not None}
        if len(lengths) > 1:
            self.fail("source and destination in one family", dst.token)
        if not lengths:
            lengths = {4: {4}, 6: {16}}.get(self.family, {4, 16})
        result = []
        for length in sorted(lengths):
            zero, ones = bytes(length), b"\xff" * length
            result.append(Selector(
                src.first if src.first is not None else zero, src.last if src.last is not None else ones,
                dst.first if dst.first is not None else zero, dst.last if dst.last is not None else ones,
                upper, *sport, *dport,
            ))  # fmt: skip
        return result

    def _side(self) -> _Side:
        token = self.word("an address, ADDRESS/PREFIX, FIRST-LAST or any")
        first: bytes | None
        last: bytes | None
        if token.text == "any":
            first = last = None
        elif "-" in token.text:
            low, _, high = token.text.partition("-")
            first, last = (self.address(Token(Kind.WORD, part, token.line, token.column)) for part in (low, high))
            if len(first) != len(last) or first > last:
                self.fail("a range of one family, the lower address first", token)
        else:
            first = last = self.address(token)
            if self.at_sign("/"):
                self.advance()
                first, last = values.prefix_range(first, self.number("a prefix length", len(first) * 8))
        return _Side(first, last, self.port() or (0, 65535), token)

    def _policy_text(self) -> setpolicy.PolicySpec:
        if self.token.kind is not Kind.FLAG or self.token.text != "-P":
            self.fail("-P and a policy")
        self.advance()
        token = self.advance()
        try:
            return setpolicy.parse(token.text, forward=True)
        except PolicySyntaxError as error:
            before = token.text[: error.column - 1]
            line = token.line + before.count("\n")
            column = len(before) - before.rfind("\n") if "\n" in before else token.column + len(before)
            raise ConfigError(error.message, file=self.file, line=line, column=column) from None
