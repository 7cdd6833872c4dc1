"""The registry's algorithms under their PF_KEY numbers: look-up, lists for REGISTER, proposals for ACQUIRE."""

from __future__ import annotations

import errno
from typing import Final

from ipsecq.crypto import registry
from ipsecq.errors import AlgorithmError
from ipsecq.numbers import Protocol
from ipsecq.pfkey.constants import Dialect
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import Algorithm, Combination, LifetimeExt, Proposal, Supported
from ipsecq.secret import Key

_REGISTRY: Final[dict[Dialect, registry.Dialect]] = {Dialect.LINUX: "linux", Dialect.FREEBSD: "freebsd"}
_UNKNOWN: Final = {Dialect.LINUX: errno.ENOSYS, Dialect.FREEBSD: errno.EINVAL}
"""What each system answers to an algorithm that it doesn't have."""

# RFC 2367 section 3.1.6 leaves the lifetimes of a proposal to the kernel; these are what KAME and Linux propose.
_SOFT: Final = LifetimeExt(addtime=20 * 3600, usetime=7 * 3600)
_HARD: Final = LifetimeExt(addtime=24 * 3600, usetime=8 * 3600)


def encryption_name(number: int, dialect: Dialect) -> str | None:
    """Name of ``sadb_sa_encrypt`` of an ESP SA; None for 0; PfkeyError for a number that is not supported."""
    if number == 0:
        return None
    try:
        return registry.encryption_by_number(number, _REGISTRY[dialect]).name
    except AlgorithmError as error:
        raise PfkeyError(str(error), _UNKNOWN[dialect]) from error


def compression_name(number: int, dialect: Dialect) -> str | None:
    """Name of ``sadb_sa_encrypt`` of an IPComp SA, which KAME overloads with SADB_X_CALG_*."""
    if number == 0:
        return None
    try:
        return registry.compression_by_number(number).name
    except AlgorithmError as error:
        raise PfkeyError(str(error), _UNKNOWN[dialect]) from error


def authentication_name(number: int, dialect: Dialect) -> str | None:
    """Name of ``sadb_sa_auth``; None for 0 and SADB_X_AALG_NULL; PfkeyError for a number that is not supported."""
    try:
        row = registry.authentication_by_number(number, _REGISTRY[dialect])
    except AlgorithmError as error:
        raise PfkeyError(str(error), _UNKNOWN[dialect]) from error
    return row.name if row is not None else None


def encryption_number(name: str | None, dialect: Dialect) -> int:
    """``SADB_EALG_*``; 0 where the dialect has no number for it."""
    return (registry.encryption(name).number(_REGISTRY[dialect]) or 0) if name else 0


def authentication_number(name: str | None, key: Key, dialect: Dialect) -> int:
    """``SADB_AALG_*`` for a key of this length; 0 where the dialect has no number for it."""
    return (registry.authentication(name).number(_REGISTRY[dialect], key.bits) or 0) if name else 0


def compression_number(name: str | None) -> int:
    """``SADB_X_CALG_*``, the same in both dialects."""
    return registry.compression(name).number if name else 0


def _encryption_algorithms(dialect: Dialect, allow_legacy: bool) -> list[Algorithm]:
    return [
        Algorithm(number, row.iv_length, min(row.key_bits), max(row.key_bits))
        for row in registry.ENCRYPTION.values()
        if (number := row.number(_REGISTRY[dialect])) is not None and (allow_legacy or not row.legacy)
    ]


def _authentication_algorithms(dialect: Dialect, allow_legacy: bool) -> list[Algorithm]:
    found: dict[int, Algorithm] = {}
    for row in registry.AUTHENTICATION.values():
        if row.legacy and not allow_legacy:
            continue
        for bits in row.key_bits:
            number = row.number(_REGISTRY[dialect], bits)
            if number is None:
                continue
            known = found.setdefault(number, Algorithm(number, row.iv_length, bits, bits))
            known.minbits, known.maxbits = min(known.minbits, bits), max(known.maxbits, bits)
    return list(found.values())


def supported(dialect: Dialect, allow_legacy: bool) -> tuple[Supported, Supported]:
    """(authentication, encryption) for the reply to SADB_REGISTER."""
    return (
        Supported(_authentication_algorithms(dialect, allow_legacy)),
        Supported(_encryption_algorithms(dialect, allow_legacy)),
    )


def proposal(protocol: Protocol, dialect: Dialect, allow_legacy: bool) -> Proposal | None:
    """Every combination that ipsecq would take for this protocol, strongest first; None for IPComp."""
    if protocol is Protocol.IPCOMP:
        return None
    macs = _authentication_algorithms(dialect, allow_legacy)
    if protocol is Protocol.AH:
        choices = [_combination(None, mac) for mac in macs]
    else:
        choices = []
        gmac = set(registry.AUTHENTICATION["aes-gmac"].linux.values())
        for cipher in _encryption_algorithms(dialect, allow_legacy):
            row = registry.encryption_by_number(cipher.id, _REGISTRY[dialect])
            if row.aead:
                choices.append(_combination(cipher, None))
            else:
                choices += [_combination(cipher, mac) for mac in macs if mac.id not in gmac or row.name == "null"]
    return Proposal(32, choices)


def _combination(cipher: Algorithm | None, mac: Algorithm | None) -> Combination:
    cipher, mac = cipher or Algorithm(0), mac or Algorithm(0)
    return Combination(
        mac.id, cipher.id, 0, mac.minbits, mac.maxbits, cipher.minbits, cipher.maxbits, _SOFT, _HARD
    )
