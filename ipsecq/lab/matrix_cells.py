"""What the interoperability matrix is made of: every chain, shape and algorithm, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Final

from ipsecq.lab.cells import AEAD, IPCOMP, MACS, Cell, Suite, ah, esp

BEFORE_WRAP: Final = (1 << 32) - 8
"""Where ESN cells start: the high half of the sequence number changes while they run, in both directions."""

CHAINS: Final = ("esp", "ah", "ipcomp", "ipcomp+esp", "esp+ah", "ipcomp+esp+ah")
"""In written order: the first is applied first, and has the cell's mode."""
SHAPES: Final = (
    ("transport", 4, 4), ("transport", 6, 6), ("tunnel", 4, 4), ("tunnel", 6, 6), ("tunnel", 4, 6), ("tunnel", 6, 4),
)  # fmt: skip
"""Mode, inner and outer IP version."""

_ESP: Final = (
    *AEAD,
    *(esp("aes-cbc", mac) for mac in MACS),
    *(esp(cipher, mac) for cipher, mac in (
        ("aes-ctr", "hmac-sha2-256"), ("aes-ctr", "aes-cmac"), ("null", "hmac-sha1"), ("null", "hmac-sha2-512"),
        ("3des-cbc", "hmac-md5"), ("3des-cbc", "hmac-sha2-384"),
    )),
)  # fmt: skip
_AH: Final = tuple(ah(mac) for mac in MACS)


def cells() -> Iterator[Cell]:
    """All cells.  In bundles with AH, each of its algorithms meets several of ESP's instead of all."""
    for chain, (mode, inner, outer) in product(CHAINS, SHAPES):
        protocols = chain.split("+")
        for number, bundle in enumerate(_bundles(protocols)):
            for esn, natt in product((False, True), repeat=2):
                if (esn and chain == "ipcomp") or (natt and ("esp" not in protocols or "ah" in protocols)):
                    continue
                # Both ways to fill AH up; the kernel's own only matters over IPv4.
                align = 8 if "ah" in protocols and outer == 4 and (number + esn) % 2 else 4
                yield Cell(
                    bundle, mode, outer, inner, esn, natt=natt, align=align, first=BEFORE_WRAP if esn else 0
                )  # fmt: skip


def _bundles(protocols: Sequence[str]) -> Iterator[tuple[Suite, ...]]:
    if "esp" not in protocols:
        yield from ((suite,) for suite in (_AH if protocols == ["ah"] else (IPCOMP,)))
        return
    for number, suite in enumerate(_ESP):
        choice = {"ipcomp": IPCOMP, "esp": suite, "ah": _AH[number % len(_AH)]}
        yield tuple(choice[protocol] for protocol in protocols)


NOT_RUN: Final = {
    "AH with aes-gmac (RFC 4543)": "the kernel has no AES-GMAC for AH; ipsecq is held to the RFC's own vectors",
    "NAT-T with AH, alone or around ESP": "AH covers the addresses that a NAT changes: RFC 3948 is for ESP",
    "NAT-T with IPComp alone": "RFC 3948 encapsulates ESP",
    "NAT-T over IPv6, datagrams below 88 octets": (
        "the kernel drops them (it takes the IPv6 header off and then counts it); only UDP of up to 3 octets"
        " in transport mode is so short"
    ),
    "ESN with IPComp alone": "IPComp has no sequence numbers",
    "transport mode 4in6 and 6in4": "transport mode keeps the packet's own header",
}
"""What the matrix leaves out, and why."""
