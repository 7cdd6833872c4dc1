"""The rules of the setkey(8) grammar for SAs: add, get, delete, deleteall, flush, dump."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from ipsecq.crypto import registry
from ipsecq.errors import AlgorithmError
from ipsecq.numbers import NATT_PORT, Mode, Protocol
from ipsecq.sa.association import Lifetime, NatTraversal, SecurityAssociation
from ipsecq.sa.replay import MAX_REPLAY_WINDOW
from ipsecq.secret import NO_KEY, Key, may_be_key
from ipsecq.setkey import commands as c
from ipsecq.setkey.cursor import Cursor
from ipsecq.setkey.lexer import Kind, Token

_MODES: Final = {"transport": Mode.TRANSPORT, "tunnel": Mode.TUNNEL, "any": Mode.ANY}
_PADS: Final = {"seq-pad": 0, "random-pad": c.SADB_X_EXT_PRAND, "zero-pad": c.SADB_X_EXT_PZERO, "nocyclic-seq": 0}
_REFUSED_PROTOCOLS: Final = {
    "esp-old": "esp-old (RFC 1827) has no sequence numbers and no integrity: use esp",
    "ah-old": "ah-old (RFC 1826) has no sequence numbers: use ah",
    "tcp": "tcp (TCP-MD5, RFC 2385) is done by the kernel's own TCP, not by IPsec: remove this line",
}
_LIFETIMES: Final = {
    "-lh": ("hard", "addtime"), "-ls": ("soft", "addtime"),
    "-bh": ("hard", "bytes"), "-bs": ("soft", "bytes"),
    "-uh": ("hard", "usetime"), "-us": ("soft", "usetime"),
    "-ah": ("hard", "allocations"), "-as": ("soft", "allocations"),
}  # fmt: skip
_ALGORITHMS: Final = {
    "-E": list(registry.ENCRYPTION), "-A": list(registry.AUTHENTICATION), "-C": list(registry.COMPRESSION),
}  # fmt: skip
_U32: Final = 0xFFFFFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF


@lru_cache(1024)
def _lifetime(**limits: int) -> Lifetime:
    """One object for the SAs that have the same limits."""
    return Lifetime(**limits)


@dataclass(slots=True)
class _Extensions:
    mode: Mode = Mode.ANY
    reqid: int = 0
    replay_window: int = 0
    flags: int = 0
    esn: bool = False
    tfc_pad: int = 0
    rebind: bool = False
    udp: bool = False
    ports: tuple[int, int] = (NATT_PORT, NATT_PORT)
    original_src: bytes | None = None
    original_dst: bytes | None = None
    lifetimes: dict[str, dict[str, int]] = field(default_factory=lambda: {"hard": {}, "soft": {}})

    def natt(self) -> NatTraversal | None:
        if not self.udp:
            return None
        return NatTraversal(*self.ports, self.original_src, self.original_dst, self.rebind)


class SaRules(Cursor):
    """One method a command; the command's first word has been read, the semicolon is the caller's."""

    def add(self, start: Token) -> list[c.Command]:
        """``add``: extensions and algorithms may come in any order."""
        self.options()
        src, dst, ports = self._ends()
        extensions = _Extensions()
        if ports is not None:
            extensions.ports = ports
        protocol = self._protocol(extensions)
        if ports is not None and not extensions.udp:
            self.fail("no ports on the addresses: only esp-udp has some")
        spi = self.number("an SPI", _U32)
        sa = SecurityAssociation(protocol, spi, src, dst, label=f"{self.file}:{start.line}" if self.file else "")
        while self.token.kind is Kind.FLAG:
            flag = self.advance()
            if not self._algorithm(flag, sa):
                self._extension(flag, extensions, sa)
        if not (sa.encryption or sa.authentication or sa.compression):
            self.fail("an algorithm (-E, -A or -C)")
        if extensions.original_src is not None or extensions.original_dst is not None or extensions.rebind:
            extensions.udp = True
        sa.mode, sa.reqid, sa.flags = extensions.mode, extensions.reqid, sa.flags | extensions.flags
        sa.replay_window, sa.esn, sa.tfc_pad = extensions.replay_window, extensions.esn, extensions.tfc_pad
        sa.natt = extensions.natt()
        sa.hard, sa.soft = _lifetime(**extensions.lifetimes["hard"]), _lifetime(**extensions.lifetimes["soft"])
        return [c.Add(sa, line=start.line, column=start.column)]

    def get(self, start: Token) -> list[c.Command]:
        """``get``."""
        return [c.Get(*self._one_sa(), line=start.line, column=start.column)]

    def delete(self, start: Token) -> list[c.Command]:
        """``delete``."""
        return [c.Delete(*self._one_sa(), line=start.line, column=start.column)]

    def delete_all(self, start: Token) -> list[c.Command]:
        """``deleteall``."""
        self.options()
        src, dst, _ = self._ends()
        protocol = None if self.at_sign(";") else self._protocol(_Extensions())
        return [c.DeleteAll(src, dst, protocol, line=start.line, column=start.column)]

    def flush(self, start: Token) -> list[c.Command]:
        """``flush``."""
        protocol = None if self.at_sign(";") else self._protocol(_Extensions())
        return [c.Flush(protocol, line=start.line, column=start.column)]

    def dump(self, start: Token) -> list[c.Command]:
        """``dump``."""
        protocol = None if self.at_sign(";") else self._protocol(_Extensions())
        return [c.Dump(protocol, line=start.line, column=start.column)]

    def _ends(self) -> tuple[bytes, bytes, tuple[int, int] | None]:
        src = self.address()
        sport = self.port()
        token = self.word("the destination's address")
        dst = self.address(token)
        if len(src) != len(dst):
            self.fail("source and destination in one family", token)
        dport = self.port()
        if sport is None and dport is None:
            return src, dst, None
        return src, dst, (self._one_port(sport), self._one_port(dport))

    @staticmethod
    def _one_port(ports: tuple[int, int] | None) -> int:
        return NATT_PORT if ports is None or ports == (0, 65535) else ports[0]

    def _protocol(self, extensions: _Extensions) -> Protocol:
        token = self.word("a protocol (esp, ah, ipcomp, esp-udp)")
        name = token.text
        if name in _REFUSED_PROTOCOLS:
            self.error(_REFUSED_PROTOCOLS[name], token)
        if name == "esp-udp":
            extensions.udp = True
            # An address here is the original one (ipsec-tools); an SPI has neither dot nor colon.
            if self.token.kind is Kind.WORD and ("." in self.token.text or ":" in self.token.text):
                extensions.original_src = self.address()
            return Protocol.ESP
        if name not in ("esp", "ah", "ipcomp"):
            self.fail("a protocol (esp, ah, ipcomp, esp-udp)", token)
        return Protocol[name.upper()]

    def _one_sa(self) -> tuple[bytes, bytes, Protocol, int]:
        self.options()
        src, dst, _ = self._ends()
        protocol = self._protocol(_Extensions())
        spi = self.number("an SPI", _U32)
        while self.token.kind is Kind.FLAG and self.token.text == "-m":
            self.advance()
            self._mode()
        return src, dst, protocol, spi

    def _mode(self) -> Mode:
        token = self.word("a mode (transport, tunnel, any)")
        mode = _MODES.get(token.text)
        if mode is None:
            self.fail("a mode (transport, tunnel, any)", token)
        return mode

    def _extension(self, flag: Token, extensions: _Extensions, sa: SecurityAssociation) -> None:
        name = flag.text
        if name == "-m":
            extensions.mode = self._mode()
        elif name == "-r":
            extensions.replay_window = 8 * self.number("a replay window in octets", MAX_REPLAY_WINDOW // 8)
        elif name == "-u":
            extensions.reqid = self.number("a reqid", _U32)
        elif name == "-f":
            token = self.word(f"an extension ({', '.join(_PADS)})")
            if token.text not in _PADS:
                self.fail(f"an extension ({', '.join(_PADS)})", token)
            extensions.flags |= _PADS[token.text]
        elif name in _LIFETIMES:
            which, what = _LIFETIMES[name]
            extensions.lifetimes[which][what] = self.number("a lifetime", _U64)
        elif name == "-esn":
            extensions.esn = True
        elif name == "-tfc":
            extensions.tfc_pad = self.number("a length in octets", 65535)
        elif name == "-align":
            sa.ah_align = self.number("an alignment in octets, 4 or 8", 8)
        elif name == "-natt":
            extensions.original_src = self.address()
            sport = self.port()
            extensions.original_dst = self.address()
            extensions.ports = (self._one_port(sport), self._one_port(self.port()))
        elif name == "-oai":
            extensions.original_src = self.address()
        elif name == "-oar":
            extensions.original_dst = self.address()
        elif name == "-rebind":
            extensions.rebind = True
        elif name == "-natt_mtu":
            # The MTU comes from routes and ICMP here; FreeBSD's hint is not needed.
            self.number("an MTU", 65535)
        elif name == "-hwif":
            self.word("an interface")
        elif name == "-ctx":
            self.error("security contexts (-ctx) are not supported: remove -ctx and what follows it", flag)
        else:
            self.fail("an extension (-m -r -u -f -lh -ls -bh -bs -esn -natt …) or an algorithm (-E -A -C)", flag)
        if name in ("-natt", "-oai", "-oar", "-rebind") and sa.protocol is not Protocol.ESP:
            self.error(f"{name} is for esp only", flag)

    def _algorithm(self, flag: Token, sa: SecurityAssociation) -> bool:
        if flag.text not in ("-E", "-A", "-C"):
            return False
        token = self.word("the name of an algorithm")
        try:
            if flag.text == "-E":
                encryption = registry.encryption(token.text)
                sa.encryption = encryption.name
                sa.encryption_key = self._key(encryption.key_bits == (0,))
            elif flag.text == "-A":
                # null is setkey's word for none: it has no key.
                if token.text == "null":
                    sa.authentication = None
                    self._key(optional=True)
                else:
                    sa.authentication = registry.authentication(token.text).name
                    sa.authentication_key = self._key(optional=False)
            else:
                sa.compression = registry.compression(token.text).name
                if self.token.kind is Kind.FLAG and self.token.text == "-R":
                    self.advance()
                    sa.flags |= c.SADB_X_EXT_RAWCPI
        except AlgorithmError as error:
            # What is not like any algorithm's name may be a key in the wrong place, or a word of one.
            if may_be_key(token.text) or not re.fullmatch(r"(?=.*[g-zG-Z])\w+(-\w+)+", token.text):
                self.secret = True
                self.fail(f"the name of an algorithm ({', '.join(_ALGORITHMS[flag.text])})", token)
            self.error(str(error), token)
        return True

    def _key(self, optional: bool) -> Key:
        self.secret = True
        token = self.token
        if token.kind is Kind.QUOTED:
            self.advance()
            return Key(token.text.encode("utf-8", "surrogateescape"))
        if token.kind is Kind.HEX:
            self.advance()
            return Key(bytes.fromhex(token.text if len(token.text) % 2 == 0 else "0" + token.text))
        if not optional:
            self.fail('a key ("in quotes" or 0x and hexadecimal digits)')
        return NO_KEY
