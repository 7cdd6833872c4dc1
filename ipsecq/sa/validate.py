"""What an SA must be before it enters the SAD, with the errno that a PF_KEY client is told (RFC 2367 section 3.1.3)."""

from __future__ import annotations

import errno

from ipsecq.crypto import registry
from ipsecq.errors import AlgorithmError, SadError
from ipsecq.numbers import Mode, Protocol, SaState
from ipsecq.sa.association import Lifetime, SecurityAssociation
from ipsecq.sa.replay import MAX_REPLAY_WINDOW


def validate(
    sa: SecurityAssociation, allow_legacy: bool = False, *, allow_unauthenticated: bool = False
) -> None:
    """Raise SadError (EINVAL) or AlgorithmError unless ``sa`` may be used.

    ``allow_legacy`` admits algorithms that RFC 8221 forbids, ``allow_unauthenticated`` (reading captures) an ESP SA
    without its authentication key.  A larval SA has no algorithms yet and needs none.
    """
    _check_spi(sa)
    if len(sa.src) != len(sa.dst) or len(sa.dst) not in (4, 16):
        raise SadError("source and destination of an SA must be of one family, IPv4 or IPv6")
    if not any(sa.dst):
        raise SadError("the destination of an SA must not be the unspecified address")
    if not 0 <= sa.reqid <= 0xFFFFFFFF:
        raise SadError(f"reqid {sa.reqid}: use 0 to 4294967295")
    if not 0 <= sa.replay_window <= MAX_REPLAY_WINDOW:
        raise SadError(f"replay window of {sa.replay_window} packets: use 0 to {MAX_REPLAY_WINDOW}")
    if sa.protocol is Protocol.IPCOMP and (sa.replay_window or sa.esn):
        raise SadError("ipcomp has no sequence numbers: remove the replay window (-r) and ESN")
    if sa.esn and not sa.replay_window:
        raise SadError("extended sequence numbers need a replay window (RFC 4303 section 2.2.1): add -r 8 or more")
    if sa.natt is not None:
        _check_natt(sa)
    if sa.tfc_pad and (sa.protocol is not Protocol.ESP or sa.mode is Mode.TRANSPORT):
        raise SadError("traffic flow confidentiality padding is for esp in tunnel mode only (RFC 4303 section 2.7)")
    if not 0 <= sa.tfc_pad <= 65535:
        raise SadError(f"padding to {sa.tfc_pad} octets: use 0 to 65535")
    if sa.ah_align not in (0, 4, 8) or (sa.ah_align and sa.protocol is not Protocol.AH):
        raise SadError(f"alignment to {sa.ah_align} octets: use 4 or 8, and for ah only")
    _check_lifetimes(sa.soft, sa.hard)
    if sa.state is not SaState.LARVAL:
        _check_algorithms(sa, allow_legacy, allow_unauthenticated)


def _check_spi(sa: SecurityAssociation) -> None:
    if sa.protocol is Protocol.IPCOMP:
        # A CPI has 16 bits; below 64 it names the algorithm itself (RFC 3173 section 3.3), 64 to 255 are reserved.
        if not 0 < sa.spi <= 0xFFFF or 64 <= sa.spi <= 255:
            raise SadError(f"CPI {sa.spi:#x} of an ipcomp SA: use 0x100 to 0xffff, or a well-known one below 64")
        return
    if not 256 <= sa.spi <= 0xFFFFFFFF:
        raise SadError(f"SPI {sa.spi}: use 256 to 4294967295; 0 to 255 are reserved (RFC 4303 section 2.1)")


def _check_natt(sa: SecurityAssociation) -> None:
    natt = sa.natt
    if natt is None:
        return
    if sa.protocol is not Protocol.ESP:
        raise SadError("only esp goes through UDP (RFC 3948): remove the NAT traversal")
    if not 0 < natt.sport <= 65535 or not 0 < natt.dport <= 65535:
        raise SadError(f"UDP ports {natt.sport} and {natt.dport} of esp-udp: use 1 to 65535")
    for original in (natt.original_src, natt.original_dst):
        if original is not None and len(original) not in (4, 16):
            raise SadError("an original address of esp-udp must be an IPv4 or IPv6 address")


def _check_lifetimes(soft: Lifetime, hard: Lifetime) -> None:
    for name in ("allocations", "bytes", "addtime", "usetime"):
        low, high = getattr(soft, name), getattr(hard, name)
        if low < 0 or high < 0:
            raise SadError(f"lifetime {name} is negative: use 0 for none")
        if low and high and low > high:
            raise SadError(f"soft lifetime {low} of {name} is over the hard one, {high}: the soft one must come first")


def _check_algorithms(sa: SecurityAssociation, allow_legacy: bool, allow_unauthenticated: bool) -> None:
    if sa.protocol is Protocol.IPCOMP:
        if sa.compression is None:
            raise AlgorithmError("ipcomp needs a compression algorithm: add '-C deflate'")
        row = registry.compression(sa.compression)
        if sa.spi < 64 and sa.spi != row.cpi:
            raise SadError(f"CPI {sa.spi} means another algorithm than {row.name} ({row.cpi})", errno.EINVAL)
    elif sa.compression is not None:
        name = sa.protocol.name.lower()
        raise AlgorithmError(f"{name} does not compress: remove '-C {sa.compression}', or use ipcomp")
    registry.check_combination(
        sa.protocol, sa.encryption, sa.encryption_key, sa.authentication, sa.authentication_key, allow_legacy,
        allow_unauthenticated,
    )  # fmt: skip
