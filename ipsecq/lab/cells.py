"""Cells of the interoperability matrix: transforms, mode and families, in setkey's and in iproute2's words.

A cell is data.  :func:`setkey` says it to ipsecq, :func:`xfrm` to the Linux kernel; both get the same keys.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final


@dataclass(frozen=True)
class Suite:
    """One protocol with its algorithms.  Key lengths in octets, salts included."""

    name: str
    protocol: str
    """``esp``, ``ah`` or ``ipcomp``."""
    encryption: str = ""
    encryption_key: int = 0
    xfrm_encryption: str = ""
    """iproute2's words, ``KEY`` where the key goes."""
    authentication: str = ""
    authentication_key: int = 0
    xfrm_authentication: str = ""


def _aead(name: str, key: int, kernel: str, bits: int) -> Suite:
    return Suite(f"esp {name}", "esp", name, key, f"aead {kernel} KEY {bits}")


AEAD: Final = (
    _aead("aes-gcm-16", 20, "rfc4106(gcm(aes))", 128),
    _aead("aes-gcm-12", 20, "rfc4106(gcm(aes))", 96),
    _aead("aes-gcm-8", 20, "rfc4106(gcm(aes))", 64),
    _aead("aes-ccm-16", 19, "rfc4309(ccm(aes))", 128),
    _aead("aes-ccm-12", 19, "rfc4309(ccm(aes))", 96),
    _aead("aes-ccm-8", 19, "rfc4309(ccm(aes))", 64),
    _aead("aes-gmac", 20, "rfc4543(gcm(aes))", 128),
    _aead("chacha20-poly1305", 36, "rfc7539esp(chacha20,poly1305)", 128),
)
CIPHERS: Final = {
    "aes-cbc": (16, "enc cbc(aes) KEY"),
    "aes-ctr": (20, "enc rfc3686(ctr(aes)) KEY"),
    "null": (0, "enc ecb(cipher_null) KEY"),
    "3des-cbc": (24, "enc cbc(des3_ede) KEY"),
}
MACS: Final = {
    "hmac-sha2-256": (32, "auth-trunc hmac(sha256) KEY 128"),
    "hmac-sha2-384": (48, "auth-trunc hmac(sha384) KEY 192"),
    "hmac-sha2-512": (64, "auth-trunc hmac(sha512) KEY 256"),
    "hmac-sha1": (20, "auth-trunc hmac(sha1) KEY 96"),
    "aes-xcbc-mac": (16, "auth-trunc xcbc(aes) KEY 96"),
    "aes-cmac": (16, "auth-trunc cmac(aes) KEY 96"),
    "hmac-md5": (16, "auth-trunc hmac(md5) KEY 96"),
}
IPCOMP: Final = Suite("ipcomp deflate", "ipcomp")


def esp(cipher: str, mac: str) -> Suite:
    """ESP with separate algorithms."""
    (cipher_key, cipher_words), (mac_key, mac_words) = CIPHERS[cipher], MACS[mac]
    return Suite(f"esp {cipher} {mac}", "esp", cipher, cipher_key, cipher_words, mac, mac_key, mac_words)


def ah(mac: str) -> Suite:
    """AH."""
    key, words = MACS[mac]
    return Suite(f"ah {mac}", "ah", authentication=mac, authentication_key=key, xfrm_authentication=words)


@dataclass(frozen=True)
class Ends:
    """Addresses of the two ends for one IP version: us (ipsecq) and the peer (the kernel)."""

    near_outer: str
    far_outer: str
    near_inner: str
    """Network or address behind us, with prefix length."""
    far_inner: str


@dataclass(frozen=True)
class Cell:
    """One cell.  ``suites`` in written order: the first, applied first, has the cell's mode, the rest are transport."""

    suites: tuple[Suite, ...]
    mode: str = "tunnel"
    outer: int = 4
    inner: int = 4
    esn: bool = False
    replay: int = 128
    """Replay window in packets."""
    natt: bool = False
    """ESP in UDP, port 4500 at both ends."""
    align: int = 4
    """AH over IPv4 is filled up to this: 4 is the RFC's (the kernel's ``align4``), 8 the kernel's without it."""
    spi: int = 0x2000
    """The first SPI of the cell."""
    first: int = 0
    """The last sequence number that both ends count as used."""
    keys: tuple[tuple[tuple[str, str], tuple[str, str]], ...] = field(default=(), compare=False, repr=False)

    @property
    def name(self) -> str:
        """For test ids and tables."""
        suites = " + ".join(suite.name for suite in self.suites)
        extras = (", esn" if self.esn else "") + (", nat-t" if self.natt else "")
        return f"{suites}, {self.mode} {self.inner}in{self.outer}" + extras + (", align 8" if self.align == 8 else "")

    def keyed(self) -> Cell:
        """The cell with fresh keys: for each suite (encryption, authentication) outbound and inbound."""
        fresh = tuple(
            tuple((_hex(suite.encryption_key), _hex(suite.authentication_key)) for _ in range(2))
            for suite in self.suites
        )
        return replace(self, keys=fresh)  # type: ignore[arg-type]

    def associations(self, ends: Ends) -> Iterator[tuple[int, int, str, str, Suite, str, tuple[str, str]]]:
        """(number, SPI, source, destination, suite, mode, keys) of each SA; even numbers are ipsecq's outbound ones."""
        for place, suite in enumerate(self.suites):
            mode = self.mode if place == 0 else "transport"
            for way, (src, dst) in enumerate(((ends.near_outer, ends.far_outer), (ends.far_outer, ends.near_outer))):
                number = 2 * place + way
                yield number, self.spi + number, src, dst, suite, mode, self.keys[place][way]


def setkey(cell: Cell, ends: Ends) -> str:
    """The cell as setkey.conf of the ipsecq end."""
    lines = ["flush;", "spdflush;"]
    for _, spi, src, dst, suite, mode, (enc_key, auth_key) in cell.associations(ends):
        protocol = "esp-udp" if cell.natt and suite.protocol == "esp" else suite.protocol
        line = f"add {src} {dst} {protocol} 0x{spi:x} -m {mode}"
        if suite.protocol == "ipcomp":
            line += " -C deflate"
        else:
            line += f" -r {cell.replay // 8}" + (" -esn" if cell.esn else "")
        if suite.encryption:
            line += f" -E {suite.encryption}" + (f" 0x{enc_key}" if enc_key else ' ""')
        if suite.authentication:
            line += f" -A {suite.authentication} 0x{auth_key}"
        if suite.protocol == "ah":
            line += f" -align {cell.align}"
        lines.append(line + ";")
    for direction, (src, dst) in (
        ("out", (ends.near_inner, ends.far_inner)),
        ("in", (ends.far_inner, ends.near_inner)),
    ):
        pair = (ends.near_outer, ends.far_outer) if direction == "out" else (ends.far_outer, ends.near_outer)
        rules = []
        for place, suite in enumerate(cell.suites):
            tunnel = place == 0 and cell.mode == "tunnel"
            rules.append(f"{suite.protocol}/tunnel/{pair[0]}-{pair[1]}/require" if tunnel
                         else f"{suite.protocol}/transport//require")  # fmt: skip
        lines.append(f"spdadd {src} {dst} any -P {direction} ipsec {' '.join(rules)};")
    return "\n".join(lines) + "\n"


def xfrm(cell: Cell, ends: Ends) -> Sequence[str]:
    """The cell as ``ip -batch`` lines of the kernel's end, which has nothing else."""
    return ["xfrm state flush", "xfrm policy flush", *xfrm_add(cell, ends)]


def xfrm_add(cell: Cell, ends: Ends) -> Sequence[str]:
    """The cell as ``ip -batch`` lines, beside others that the kernel's end has already."""
    lines = []
    names = {"esp": "esp", "ah": "ah", "ipcomp": "comp"}
    for number, spi, src, dst, suite, mode, (enc_key, auth_key) in cell.associations(ends):
        line = f"xfrm state add src {src} dst {dst} proto {names[suite.protocol]} spi 0x{spi:x}"
        line += f" reqid {number // 2 + 1} mode {mode}"
        if suite.protocol == "ipcomp":
            line += " comp deflate"
        else:
            line += f" replay-window {cell.replay}"
            if cell.first:
                low, high = cell.first & 0xFFFFFFFF, cell.first >> 32
                line += f" replay-seq {low} replay-oseq {low} replay-seq-hi {high} replay-oseq-hi {high}"
        if flags := _flags(cell, suite):
            line += f" flag {flags}"
        if suite.xfrm_authentication:
            line += " " + suite.xfrm_authentication.replace("KEY", "0x" + auth_key)
        if suite.xfrm_encryption:
            line += " " + suite.xfrm_encryption.replace("KEY", "0x" + enc_key if enc_key else '""')
        if cell.natt and suite.protocol == "esp":
            line += " encap espinudp 4500 4500 0.0.0.0"
        lines.append(line)
    for direction in ("out", "in", "fwd"):
        src, dst = (ends.far_inner, ends.near_inner) if direction == "out" else (ends.near_inner, ends.far_inner)
        pair = (ends.far_outer, ends.near_outer) if direction == "out" else (ends.near_outer, ends.far_outer)
        line = f"xfrm policy add src {src} dst {dst} dir {direction}"
        for place, suite in enumerate(cell.suites):
            mode = cell.mode if place == 0 else "transport"
            # IPComp sends small packets as they are: inbound it cannot be required.
            level = "use" if suite.protocol == "ipcomp" and direction != "out" else "required"
            line += f" tmpl src {pair[0]} dst {pair[1]} proto {names[suite.protocol]} reqid {place + 1} mode {mode}"
            line += f" level {level}"
        lines.append(line)
    return lines


def _flags(cell: Cell, suite: Suite) -> str:
    """iproute2's flags of one SA."""
    flags = ["esn"] if cell.esn and suite.protocol != "ipcomp" else []
    if cell.inner != cell.outer:
        flags.append("af-unspec")
    if suite.protocol == "ah" and cell.align == 4:
        flags.append("align4")
    return " ".join(flags)


def _hex(octets: int) -> str:
    return secrets.token_hex(octets)
