"""Between PF_KEY messages and :class:`SecurityAssociation`, both ways."""

from __future__ import annotations

import errno
from typing import Final

from ipsecq.crypto.registry import check_combination
from ipsecq.errors import AlgorithmError
from ipsecq.numbers import IPPROTO_ANY, Mode, Protocol, SaState
from ipsecq.pfkey import algorithms
from ipsecq.pfkey.constants import (
    ALG_MAX,
    CALG_MAX,
    FLAGS_KEPT,
    UDP_ENCAP_ESPINUDP,
    Dialect,
    SaFlag,
    SaType,
)
from ipsecq.pfkey.database import Usage
from ipsecq.pfkey.errors import PfkeyError
from ipsecq.pfkey.extensions import Address, KeyExt, LifetimeExt, Sa
from ipsecq.pfkey.messages import Message
from ipsecq.pfkey.xextensions import NatPort, NatType, Number, Sa2
from ipsecq.sa.association import Lifetime, NatTraversal, SaKey, SecurityAssociation
from ipsecq.secret import NO_KEY

PROTOCOL_OF: Final = {SaType.AH: Protocol.AH, SaType.ESP: Protocol.ESP, SaType.IPCOMP: Protocol.IPCOMP}
SATYPE_OF: Final = {protocol: satype for satype, protocol in PROTOCOL_OF.items()}


def protocol_of(satype: int) -> Protocol | None:
    """The protocol of ``sadb_msg_satype``; None for UNSPEC, PfkeyError (EINVAL) for what ipsecq doesn't have."""
    if satype == SaType.UNSPEC:
        return None
    protocol = PROTOCOL_OF.get(satype)  # type: ignore[call-overload]  # a plain int hashes as the enumeration
    if protocol is None:
        raise PfkeyError(f"SA type {satype}: AH (2), ESP (3) and IPComp (9) are here")
    return Protocol(protocol)


def need_protocol(satype: int, unspec: int = errno.EINVAL) -> Protocol:
    """Like :func:`protocol_of` where UNSPEC means nothing; ``unspec`` is the errno for it."""
    protocol = protocol_of(satype)
    if protocol is None:
        raise PfkeyError("SA type UNSPEC: this message needs AH, ESP or IPComp", unspec)
    return protocol


def need_addresses(message: Message) -> tuple[Address, Address]:
    """Source and destination, both there and of one family, or PfkeyError (EINVAL)."""
    src, dst = message.src, message.dst
    if src is None or dst is None:
        raise PfkeyError("source and destination addresses are needed")
    if len(src.address) != len(dst.address):
        raise PfkeyError("source and destination are of different families")
    return src, dst


def key_of(message: Message) -> SaKey:
    """(destination, protocol, SPI) that DELETE and GET name; PfkeyError EINVAL, or ESRCH for SA type UNSPEC."""
    _, dst = need_addresses(message)
    if message.sa is None:
        raise PfkeyError("the SA extension is needed")
    return SaKey(dst.address, int(need_protocol(message.satype, errno.ESRCH)), message.sa.spi)


def mode_of(message: Message) -> Mode:
    """``sadb_x_sa2_mode``; ``any`` without the extension."""
    mode = message.sa2.mode if message.sa2 is not None else 0
    if mode not in (0, 1, 2):
        raise PfkeyError(f"mode {mode}: any (0), transport (1) and tunnel (2) are here")
    return Mode(mode)


def to_association(message: Message, dialect: Dialect, now: float, allow_legacy: bool) -> SecurityAssociation:
    """The SA that SADB_ADD or SADB_UPDATE describes, checked whole: PfkeyError EINVAL or, for algorithms, ENOSYS."""
    src, dst = need_addresses(message)
    protocol = need_protocol(message.satype, errno.EPROTONOSUPPORT)
    ext = message.sa
    if ext is None:
        raise PfkeyError("the SA extension is needed")
    if (message.lifetime_hard is None) != (message.lifetime_soft is None):
        raise PfkeyError("hard and soft lifetime go together: send both or none")
    _check_spi(protocol, ext.spi)
    encryption, authentication, compression = _names(protocol, ext, dialect)
    encryption_key = message.key_encrypt.key if message.key_encrypt else NO_KEY
    authentication_key = message.key_auth.key if message.key_auth else NO_KEY
    if protocol is Protocol.IPCOMP:
        # Daemons send empty keys along; there is nothing to do with them.
        encryption_key = authentication_key = NO_KEY
    elif authentication is None and ext.auth:
        authentication_key = NO_KEY
    try:
        check_combination(protocol, encryption, encryption_key, authentication, authentication_key, allow_legacy)
    except AlgorithmError as error:
        raise PfkeyError(str(error)) from error
    if dialect is Dialect.FREEBSD and ext.flags & SaFlag.CYCSEQ:
        raise PfkeyError("cyclic sequence numbers would use an IV twice: leave SADB_X_EXT_CYCSEQ out")
    return SecurityAssociation(
        protocol, ext.spi, src.address, dst.address,
        mode=mode_of(message),
        reqid=message.sa2.reqid if message.sa2 else 0,
        encryption=encryption, encryption_key=encryption_key,
        authentication=authentication, authentication_key=authentication_key,
        compression=compression,
        replay_window=_replay_window(message, ext, dialect),
        esn=bool(ext.flags & SaFlag.ESN),
        natt=_natt(message, protocol),
        soft=_limits(message.lifetime_soft), hard=_limits(message.lifetime_hard),
        seq=message.seq, pid=message.pid, created=now, state=SaState.MATURE,
        flags=ext.flags & FLAGS_KEPT[dialect], label=f"pfkey:{message.pid}",
    )  # fmt: skip


def _check_spi(protocol: Protocol, spi: int) -> None:
    if protocol is Protocol.IPCOMP:
        if not 0 < spi <= 0xFFFF:
            raise PfkeyError(f"CPI {spi:#x}: 1 to 0xffff (RFC 3173)")
    elif spi <= 0xFF:
        raise PfkeyError(f"SPI {spi:#x}: 0 to 0xff are reserved (RFC 4303 section 2.1)")


def _names(protocol: Protocol, ext: Sa, dialect: Dialect) -> tuple[str | None, str | None, str | None]:
    auth_max, encrypt_max = ALG_MAX[dialect]
    if ext.auth > auth_max or ext.encrypt > (CALG_MAX if protocol is Protocol.IPCOMP else encrypt_max):
        raise PfkeyError(f"algorithm numbers {ext.auth}, {ext.encrypt} are out of their range")
    if protocol is Protocol.IPCOMP:
        name = algorithms.compression_name(ext.encrypt, dialect)
        if name is None:
            raise PfkeyError("an IPComp SA needs a compression algorithm (SADB_X_CALG_DEFLATE, 2)")
        return None, None, name
    authentication = algorithms.authentication_name(ext.auth, dialect)
    return algorithms.encryption_name(ext.encrypt, dialect), authentication, None


def _replay_window(message: Message, ext: Sa, dialect: Dialect) -> int:
    if dialect is Dialect.LINUX:
        return ext.replay
    return message.sa_replay.value if message.sa_replay is not None else ext.replay * 8


def _natt(message: Message, protocol: Protocol) -> NatTraversal | None:
    if message.natt_type is None or message.natt_type.type == 0:
        return None
    if message.natt_type.type != UDP_ENCAP_ESPINUDP:
        raise PfkeyError(f"UDP encapsulation of type {message.natt_type.type}: only 2 (RFC 3948) is here")
    if protocol is not Protocol.ESP:
        raise PfkeyError("UDP encapsulation is for ESP only (RFC 3948)")
    return NatTraversal(
        (message.natt_sport.port if message.natt_sport else 0) or 4500,
        (message.natt_dport.port if message.natt_dport else 0) or 4500,
        message.natt_oa.address if message.natt_oa else None,
        message.natt_oar.address if message.natt_oar else None,
    )


def _limits(ext: LifetimeExt | None) -> Lifetime:
    return Lifetime(ext.allocations, ext.octets, ext.addtime, ext.usetime) if ext is not None else Lifetime()


def _limits_ext(limits: Lifetime) -> LifetimeExt:
    return LifetimeExt(min(limits.allocations, 0xFFFFFFFF), limits.bytes, limits.addtime, limits.usetime)


def host(address: bytes, dialect: Dialect) -> Address:
    """The address extension of one host, as a reply has it."""
    return Address(address, len(address) * 8, 0 if dialect is Dialect.LINUX else IPPROTO_ANY)


def from_association(
    sa: SecurityAssociation,
    usage: Usage,
    dialect: Dialect,
    *,
    keys: bool = True,
    hard: bool = True,
    soft: bool = True,
) -> Message:
    """The message that describes ``sa`` (type, seq and pid are the caller's), with what Linux puts into it.

    ``hard`` and ``soft``: which limits go in; an SADB_EXPIRE has the one that was reached.
    """
    encrypt = (
        algorithms.compression_number(sa.compression)
        if sa.protocol is Protocol.IPCOMP
        else algorithms.encryption_number(sa.encryption, dialect)
    )
    flags = sa.flags | (SaFlag.ESN if sa.esn else 0)
    window = sa.replay_window
    message = Message(
        0, int(SATYPE_OF[sa.protocol]),
        sa=Sa(
            sa.spi,
            min(255, window if dialect is Dialect.LINUX else (window + 7) // 8),
            int(sa.state),
            algorithms.authentication_number(sa.authentication, sa.authentication_key, dialect),
            encrypt,
            flags,
        ),
        lifetime_hard=_limits_ext(sa.hard) if hard else None,
        lifetime_soft=_limits_ext(sa.soft) if soft else None,
        lifetime_current=LifetimeExt(usage.packets & 0xFFFFFFFF, usage.octets, int(sa.created), usage.first_use),
        src=host(sa.src, dialect), dst=host(sa.dst, dialect),
        sa2=Sa2(int(sa.mode), sa.reqid, usage.sequence),
    )  # fmt: skip
    if keys:
        message.key_auth = KeyExt(sa.authentication_key) if sa.authentication_key else None
        message.key_encrypt = KeyExt(sa.encryption_key) if sa.encryption_key else None
    if dialect is Dialect.FREEBSD and window:
        message.sa_replay = Number(window)
    if sa.natt is not None:
        message.natt_type = NatType(UDP_ENCAP_ESPINUDP)
        message.natt_sport, message.natt_dport = NatPort(sa.natt.sport), NatPort(sa.natt.dport)
        if dialect is Dialect.FREEBSD:
            message.natt_oa = host(sa.natt.original_src, dialect) if sa.natt.original_src else None
            message.natt_oar = host(sa.natt.original_dst, dialect) if sa.natt.original_dst else None
    return message


def merged_update(old: SecurityAssociation, new: SecurityAssociation) -> SecurityAssociation:
    """SADB_UPDATE of an SA in use: lifetimes and UDP encapsulation change, nothing else may.

    PfkeyError EINVAL for other algorithms or keys, where Linux keeps the old ones without a word: a client that
    believes that it rekeyed, and did not, is worse off than one that is told.
    """
    for name in ("src", "mode", "encryption", "encryption_key", "authentication", "authentication_key", "compression"):
        if getattr(old, name) != getattr(new, name):
            raise PfkeyError(f"an SA in use keeps its {name.replace('_', ' ')}: add a new SA", errno.EINVAL)
    new.created, new.slot, new.state = old.created, old.slot, SaState.MATURE
    new.replay_window, new.esn, new.flags = old.replay_window, old.esn, old.flags
    new.reqid, new.tfc_pad, new.ah_align, new.seq = old.reqid, old.tfc_pad, old.ah_align, old.seq
    if new.natt is None:
        new.natt = old.natt
    elif old.natt is None:
        raise PfkeyError("an SA in use cannot begin UDP encapsulation: add a new SA")
    return new
