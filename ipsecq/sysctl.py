"""The knobs of ipsec(4) under their own names, with default, range and meaning.

:class:`Sysctl` holds the values.  The packet path reads plain attributes of the per-family objects
(``sysctl.v4.dfbit``, ``sysctl.v6.ecn``), one attribute look-up each; names and texts are for the edges.  A variable
that the manual has once for both families (``net.inet.ipsec.check_policy_history``) is set in both objects.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ipsecq.errors import SysctlError


@dataclass(slots=True, frozen=True)
class Variable:
    """One variable: its homes (``v4``, ``v6``, ``key``, ``enc``), default, inclusive range, meaning in a line."""

    name: str
    homes: tuple[str, ...]
    attribute: str
    default: int
    low: int
    high: int
    meaning: str


_BOTH: Final = ("v4", "v6")
_INT_MAX: Final = 0x7FFFFFFF


def _table() -> Iterator[Variable]:
    for tree, home, family in (("net.inet.ipsec", "v4", "IPv4"), ("net.inet6.ipsec6", "v6", "IPv6")):
        for protocol in ("esp", "ah"):
            for net, mode in (("trans", "transport"), ("net", "tunnel")):
                attribute = f"{protocol}_{net}_deflev"
                yield Variable(
                    f"{tree}.{attribute}", (home,), attribute, 1, 1, 2,
                    f"What level default means for {protocol.upper()} {mode} mode over {family}: 1 use, 2 require.",
                )  # fmt: skip
        yield Variable(
            f"{tree}.def_policy", (home,), "def_policy", 1, 0, 1,
            f"Policy for {family} packets that no policy matches: 0 discard, 1 none.",
        )  # fmt: skip
        yield Variable(
            f"{tree}.ecn", (home,), "ecn", 0, -1, 1,
            "ECN at tunnel ends: 0 forbidden (outer bits cleared), 1 allowed (RFC 6040), -1 leave alone.",
        )  # fmt: skip
        yield Variable(
            f"{tree}.debug", (home,), "debug", 0, 0, _INT_MAX, f"Non-zero: log why workers drop {family} packets."
        )
        yield Variable(
            f"{tree}.filtertunnel", (home,), "filtertunnel", 0, 0, 1,
            f"1: decapsulated {family} packets pass the operator's inner rules; 0: they don't.",
        )  # fmt: skip
    yield Variable(
        "net.inet.ipsec.dfbit", _BOTH, "dfbit", 0, 0, 2,
        "DF bit of the outer IPv4 header of a tunnel: 0 cleared, 1 set, 2 copied from the inner header.",
    )  # fmt: skip
    yield Variable(
        "net.inet.ipsec.min_pmtu", _BOTH, "min_pmtu", 576, 68, 65535,
        "Smallest IPv4 path MTU in octets that is believed, whatever ICMP errors say; smaller routes and links count.",
    )  # fmt: skip
    yield Variable(
        "net.inet.ipsec.ah_cleartos", _BOTH, "ah_cleartos", 1, 0, _INT_MAX,
        "Non-zero: AH takes the IPv4 type-of-service field as zero (RFC 2402); 0 covers it (RFC 1826).",
    )  # fmt: skip
    yield Variable(
        "net.inet.ipsec.ah_offsetmask", _BOTH, "ah_offsetmask", 0, 0, 0xFFFF,
        "AH covers the IPv4 flags and fragment offset ANDed with this mask; 0 for RFC 2402.",
    )  # fmt: skip
    yield Variable(
        "net.inet.ipsec.natt_cksum_policy", _BOTH, "natt_cksum_policy", 0, 0, _INT_MAX,
        "TCP/UDP checksums after UDP-encapsulated transport mode: 0 incremental or ignored, non-zero recomputed.",
    )  # fmt: skip
    yield Variable(
        "net.inet.ipsec.check_policy_history", _BOTH, "check_policy_history", 0, 0, _INT_MAX,
        "Non-zero: protocol, mode and SA addresses applied to an inbound packet must match its policy, in order.",
    )  # fmt: skip
    for protocol, long in (("esp", "ESP"), ("ah", "AH"), ("ipcomp", "IPComp")):
        attribute = f"{protocol}_enable"
        yield Variable(
            f"net.inet.{protocol}.{attribute}", _BOTH, attribute, 1, 0, 1,
            f"0: packets that need {long} are dropped and counted, both ways; 1: {long} is on.",
        )  # fmt: skip
    for attribute, default, low, high, meaning in (
        ("preferred_oldsa", 1, 0, 1, "Which of several matching SAs sends: 1 the oldest, 0 the newest."),
        ("larval_lifetime", 30, 1, _INT_MAX, "Seconds until a larval SA (GETSPI, ACQUIRE) is given up."),
        ("blockacq_count", 10, 0, _INT_MAX, "ACQUIREs suppressed for a pair before it is asked for again."),
        ("blockacq_lifetime", 20, 0, _INT_MAX, "Seconds after which a pair's suppressed ACQUIRE is sent again."),
        ("spi_minval", 0x100, 0x100, 0xFFFFFFFF, "Lowest SPI that GETSPI gives when it is not asked for a range."),
        ("spi_maxval", 0x0FFFFFFF, 0x100, 0xFFFFFFFF, "Highest SPI that GETSPI gives when not asked for a range."),
    ):
        yield Variable(f"net.key.{attribute}", ("key",), attribute, default, low, high, meaning)
    for way, bpf_default in (("out", 3), ("in", 1)):
        yield Variable(
            f"net.enc.{way}.ipsec_bpf_mask", ("enc",), f"{way}_bpf_mask", bpf_default, 0, 3,
            f"Views of {way}going packets that enc0 captures see: bit 0 before, bit 1 after the outer header.",
        )  # fmt: skip
        yield Variable(
            f"net.enc.{way}.ipsec_filter_mask", ("enc",), f"{way}_filter_mask", 1, 0, 3,
            f"Views of {way}going packets that firewall rules on enc0 see: bit 0 before, bit 1 after.",
        )  # fmt: skip


VARIABLES: Final[Mapping[str, Variable]] = {
    variable.name: variable for variable in sorted(_table(), key=lambda variable: variable.name)
}
"""Every variable by its full name, in the order that ``sysctl -a`` prints."""


class FamilyKnobs:
    """Current values that the packet path of one address family reads; names as in ipsec(4)."""

    __slots__ = (
        "ah_cleartos",
        "ah_enable",
        "ah_net_deflev",
        "ah_offsetmask",
        "ah_trans_deflev",
        "check_policy_history",
        "debug",
        "def_policy",
        "dfbit",
        "ecn",
        "esp_enable",
        "esp_net_deflev",
        "esp_trans_deflev",
        "filtertunnel",
        "ipcomp_enable",
        "min_pmtu",
        "natt_cksum_policy",
    )

    ah_cleartos: int
    ah_enable: int
    ah_net_deflev: int
    ah_offsetmask: int
    ah_trans_deflev: int
    check_policy_history: int
    debug: int
    def_policy: int
    dfbit: int
    ecn: int
    esp_enable: int
    esp_net_deflev: int
    esp_trans_deflev: int
    filtertunnel: int
    ipcomp_enable: int
    min_pmtu: int
    natt_cksum_policy: int


class KeyKnobs:
    """``net.key``: key management."""

    __slots__ = (
        "blockacq_count",
        "blockacq_lifetime",
        "larval_lifetime",
        "preferred_oldsa",
        "spi_maxval",
        "spi_minval",
    )

    blockacq_count: int
    blockacq_lifetime: int
    larval_lifetime: int
    preferred_oldsa: int
    spi_maxval: int
    spi_minval: int


class EncKnobs:
    """``net.enc``: the masks of enc(4)."""

    __slots__ = ("in_bpf_mask", "in_filter_mask", "out_bpf_mask", "out_filter_mask")

    in_bpf_mask: int
    in_filter_mask: int
    out_bpf_mask: int
    out_filter_mask: int


class Sysctl:
    """The values of all variables, starting at their defaults (or at ``values``)."""

    __slots__ = ("enc", "generation", "key", "v4", "v6")

    def __init__(self, values: Mapping[str, int | str] | None = None) -> None:
        self.v4 = FamilyKnobs()
        self.v6 = FamilyKnobs()
        self.key = KeyKnobs()
        self.enc = EncKnobs()
        self.generation = 0
        """Grows with every change, so that a cached decision knows that it is old."""
        for variable in VARIABLES.values():
            self._store(variable, variable.default)
        for name, value in (values or {}).items():
            self.set(name, value)

    def get(self, name: str) -> int:
        """Return the value of ``name``; SysctlError "unknown oid" when there is no such variable."""
        variable = _variable(name)
        return int(getattr(getattr(self, variable.homes[0]), variable.attribute))

    def set(self, name: str, value: int | str) -> int:
        """Set ``name`` to ``value`` and return the old value.

        ``value`` is an int, or text as sysctl(8) reads it: decimal, 0x hexadecimal, 0 octal.
        Raises SysctlError: unknown oid, no leaf node, invalid integer, or Invalid argument when the value is out of range.
        """
        variable = _variable(name)
        number = value if isinstance(value, int) else _integer(value)
        if not variable.low <= number <= variable.high:
            raise SysctlError(f"{name}={str(value).strip()}: Invalid argument (use {variable.low} to {variable.high})")
        old = self.get(name)
        self._store(variable, number)
        self.generation += 1
        return old

    def check(self, names: Container[str]) -> None:
        """What concerns two variables, after those in ``names`` were set.  SysctlError "Invalid argument"."""
        low, high = "net.key.spi_minval", "net.key.spi_maxval"
        if (low in names or high in names) and self.get(low) > self.get(high):
            what = "Invalid argument (no SPI is in this range; set both at once)"
            raise SysctlError(f"{low}={self.get(low)}, {high}={self.get(high)}: {what}")

    def all(self) -> dict[str, int]:
        """Return every variable's value by name, in the order of ``sysctl -a``."""
        return {name: self.get(name) for name in VARIABLES}

    def _store(self, variable: Variable, number: int) -> None:
        for home in variable.homes:
            setattr(getattr(self, home), variable.attribute, number)


def describe(name: str) -> str:
    """Return the meaning of ``name`` in one line, as ``sysctl -d`` prints it."""
    return _variable(name).meaning


def matching(prefix: str) -> list[str]:
    """Return the names at or below ``prefix`` (``net.inet.ipsec``), as sysctl(8) does for an inner node.

    Raises SysctlError "unknown oid" when there are none.
    """
    names = [name for name in VARIABLES if name == prefix or name.startswith(prefix + ".")]
    if not names:
        raise SysctlError(f"unknown oid {prefix!r}")
    return names


def _variable(name: str) -> Variable:
    variable = VARIABLES.get(name)
    if variable is None:
        raise SysctlError(no_variable(name))
    return variable


def no_variable(name: str) -> str:
    """What is wrong with a name that is no variable's, as sysctl(8) says it."""
    node = any(each.startswith(name + ".") for each in VARIABLES)
    return f"oid {name!r} isn't a leaf node" if node else f"unknown oid {name!r}"


_NUMBER: Final = re.compile(
    r"\s*(?P<sign>[+-]?)(?:0x(?P<hex>[0-9a-f]{1,16})|(?P<octal>0[0-7]{0,22})|(?P<decimal>[1-9][0-9]{0,19}))\s*",
    re.ASCII | re.IGNORECASE,
)
"""As strtoimax(3) reads it for sysctl(8), base 0."""


def _integer(text: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise SysctlError(f"invalid integer {text!r}")
    base = {"hex": 16, "octal": 8, "decimal": 10}[str(match.lastgroup)]
    value = int(match[str(match.lastgroup)], base)
    return -value if match["sign"] == "-" else value
