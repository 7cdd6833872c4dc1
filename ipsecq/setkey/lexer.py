"""Tokens of setkey(8) with line and column."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ipsecq.errors import ConfigError


class Kind(Enum):
    """What a token is."""

    WORD = "word"
    FLAG = "flag"
    HEX = "hexadecimal number"
    QUOTED = "quoted string"
    SIGN = "sign"
    POLICY = "policy"
    """All that stands between ``-P`` and the semicolon; comments in it are blanked."""
    END = "the end of the file"


@dataclass(slots=True, frozen=True)
class Token:
    """One token.  ``text`` of QUOTED is without the quotes, of HEX without 0x: both may be keys, never print them."""

    kind: Kind
    text: str
    line: int
    column: int
    offset: int = 0


_SPACE: Final = re.compile(r"(?:[ \t\r\n\f\v]+|#[^\n]*)+")
_TOKEN: Final = re.compile(
    r"""(?P<QUOTED>"[^"]*")
      | (?P<HEX>0[xX][0-9A-Fa-f]+)(?![0-9A-Za-z:_.%,+*-])
      | (?P<FLAG>-[0-9A-Za-z_]+)
      | (?P<WORD>[0-9A-Za-z:_.%,+*-]+)
      | (?P<SIGN>[;/\[\]])
    """,
    re.VERBOSE,
)
_COMMENT: Final = re.compile(r"#[^\n]*")


def tokens(text: str, file: str = "") -> Iterator[Token]:
    """Yield the tokens of ``text``, END last.  ConfigError for a character that no token begins with."""
    offset, line, line_start = 0, 1, 0
    length = len(text)
    while True:
        space = _SPACE.match(text, offset)
        if space is not None:
            newlines = text.count("\n", offset, space.end())
            if newlines:
                line += newlines
                line_start = text.rindex("\n", offset, space.end()) + 1
            offset = space.end()
        column = offset - line_start + 1
        if offset >= length:
            yield Token(Kind.END, "", line, column, offset)
            return
        match = _TOKEN.match(text, offset)
        if match is None:
            what = "closing '\"'" if text[offset] == '"' else "a word, a number or ';'"
            found = "the end of the file" if text[offset] == '"' else repr(text[offset])
            raise ConfigError(f"expected {what}, found {found}", file=file, line=line, column=column)
        kind = Kind[match.lastgroup or "WORD"]
        value = match.group()
        if kind is Kind.QUOTED:
            newlines = value.count("\n")
            yield Token(kind, value[1:-1], line, column, offset)
            if newlines:
                line += newlines
                line_start = offset + value.rindex("\n") + 1
        else:
            yield Token(kind, value[2:] if kind is Kind.HEX else value, line, column, offset)
        offset = match.end()
        if kind is Kind.FLAG and value == "-P":
            end = offset
            # A semicolon in a comment does not end the policy.
            while end < length and text[end] != ";":
                comment = _COMMENT.match(text, end)
                end = comment.end() if comment is not None else end + 1
            body = _COMMENT.sub(lambda comment: " " * len(comment.group()), text[offset:end])
            yield Token(Kind.POLICY, body, line, offset - line_start + 1, offset)
            newlines = body.count("\n")
            if newlines:
                line += newlines
                line_start = offset + body.rindex("\n") + 1
            offset = end
