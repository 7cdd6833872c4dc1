"""What every rule of the setkey(8) grammar stands on: the token at hand, expectations and their errors, addresses."""

from __future__ import annotations

from typing import Final, NoReturn

from ipsecq.crypto import registry
from ipsecq.errors import ConfigError
from ipsecq.policy.setpolicy import decimal
from ipsecq.secret import may_be_key
from ipsecq.setkey import values
from ipsecq.setkey.lexer import Kind, Token, tokens

COMMANDS: Final = (
    "add", "get", "delete", "deleteall", "flush", "dump", "spdadd", "spdupdate", "spddelete", "spddump", "spdflush",
)  # fmt: skip
_KNOWN: Final = frozenset((
    *COMMANDS, "exit", "quit", "bye", "getspi", "esp", "ah", "ipcomp", "esp-udp", "transport", "tunnel", "any",
    *registry.ENCRYPTION, *registry.AUTHENTICATION, *registry.COMPRESSION,
    "-E", "-A", "-C", "-R", "-P", "-m", "-r", "-u", "-f", "-lh", "-ls", "-bh", "-bs", "-uh", "-us", "-ah", "-as",
    "-esn", "-tfc", "-align", "-natt", "-natt_mtu", "-oai", "-oar", "-rebind", "-hwif", "-ctx", "-fail_open",
))  # fmt: skip
"""Words of the grammar: no key, wherever they stand."""


class Cursor:
    """A position in the tokens of one file.  Errors are ConfigError with file, line and column; keys are not shown."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.stream = tokens(text, file)
        self.token = next(self.stream)
        self.family = 0
        """4 or 6 after the options -4 and -6 of a command; 0 without."""
        self.secret = False
        """After -E or -A: a word that is out of place may be a key, or a piece of one, without its 0x or quotes."""
        self.flipped = False
        """After a quoted string with a semicolon or a line's end in it: quotes may be out of step, and from there on the
        file's keys look like words."""

    def advance(self) -> Token:
        """Take the token at hand (END is never left)."""
        token = self.token
        if token.kind is Kind.QUOTED and (";" in token.text or "\n" in token.text):
            self.flipped = True
        if token.kind is not Kind.END:
            self.token = next(self.stream)
        return token

    def fail(self, expected: str, token: Token | None = None) -> NoReturn:
        """Raise ConfigError: what was expected at ``token`` (the one at hand), and what was found."""
        token = token or self.token
        self.error(f"expected {expected}, found {self.describe(token)}", token)

    def error(self, message: str, token: Token) -> NoReturn:
        """Raise ConfigError with ``message`` at ``token``."""
        raise ConfigError(message, file=self.file, line=token.line, column=token.column)

    def describe(self, token: Token) -> str:
        """Return what a message may say about a token: nothing that could be a key."""
        if token.kind is Kind.HEX:
            return f"a hexadecimal number of {len(token.text)} digits"
        if token.kind is Kind.QUOTED:
            return f"a {token.kind.value}"
        if token.kind in (Kind.END, Kind.POLICY):
            return str(token.kind.value)
        shown = token.kind is Kind.SIGN or token.text in _KNOWN
        if not shown and (self.secret or self.flipped or may_be_key(token.text)):
            return f"a word of {len(token.text)} characters"
        return f"'{token.text}'"

    def word(self, expected: str) -> Token:
        """Take a word, or fail."""
        if self.token.kind is not Kind.WORD:
            self.fail(expected)
        return self.advance()

    def sign(self, sign: str) -> None:
        """Take one of ``; / [ ]``, or fail."""
        if self.token.kind is not Kind.SIGN or self.token.text != sign:
            self.fail(f"'{sign}'")
        self.advance()

    def at_sign(self, sign: str) -> bool:
        """Return whether the token at hand is this sign."""
        return self.token.kind is Kind.SIGN and self.token.text == sign

    def number(self, what: str, most: int, least: int = 0) -> int:
        """Take a decimal or 0x number between ``least`` and ``most``, or fail."""
        token = self.token
        if token.kind is Kind.HEX:
            value = int(token.text, 16)
        elif token.kind is Kind.WORD and token.text.isascii() and token.text.isdigit():
            value = decimal(token.text)
        else:
            self.fail(what)
        if not least <= value <= most:
            self.fail(f"{what} from {least} to {most}", token)
        self.advance()
        return value

    # -- addresses and ports ----------------------------------------------------------------------------

    def options(self) -> None:
        """-4, -6 and -n, alone or together; only the family means anything, since names are never resolved."""
        while self.token.kind is Kind.FLAG and set(self.token.text[1:]) <= set("46n"):
            for letter in self.advance().text[1:]:
                if letter in "46":
                    self.family = int(letter)

    def address(self, token: Token | None = None) -> bytes:
        """Take an address (of the family of -4 or -6) and return it packed, or fail."""
        token = token or self.word("an IPv4 or IPv6 address")
        try:
            packed = values.parse_address(token.text)
        except ValueError as error:
            self.fail(str(error), token)
        if self.family and len(packed) != (4 if self.family == 4 else 16):
            self.fail(f"an IPv{self.family} address (option -{self.family})", token)
        return packed

    def port(self) -> tuple[int, int] | None:
        """Take ``[port]`` and return its range; None when there is no bracket."""
        if not self.at_sign("["):
            return None
        self.advance()
        token = self.word("a port or any")
        try:
            ports = values.parse_port(token.text)
        except ValueError as error:
            self.fail(str(error), token)
        self.sign("]")
        return ports
