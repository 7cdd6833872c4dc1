"""The xt_NFQUEUE target as an expression in an nft chain, for kernels without nft's own ``queue`` statement.

nft_compat takes any xtables target under the expression name ``target``.  nft lists such a rule but cannot load it,
so it goes in through nfnetlink.  Source: ``include/uapi/linux/netfilter/xt_NFQUEUE.h`` (revision 3).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from ipsecq import netlink as nl
from ipsecq.netfilter import nftsocket as nft

_NFTA_LIST_ELEM: Final = 1
_NFTA_EXPR_NAME: Final = 1
_NFTA_EXPR_DATA: Final = 2
_NFTA_TARGET_NAME: Final = 1
_NFTA_TARGET_REV: Final = 2
_NFTA_TARGET_INFO: Final = 3
_REVISION: Final = 3
_BYPASS: Final = 1
_INFO: Final = Struct("=HHHxx")
"""struct xt_NFQ_info_v3: first queue, number of queues, flags, in native order, padded as XT_ALIGN does."""

Request = tuple[int, int, int, bytes]


def queue_rule(table: str, chain: str, first: int, last: int, bypass: bool) -> Request:
    """Append a rule that queues to ``first`` … ``last``, spread by host pair."""
    info = _INFO.pack(first, last - first + 1, _BYPASS if bypass else 0)
    target = nl.nested(
        _NFTA_EXPR_DATA,
        nl.string(_NFTA_TARGET_NAME, "NFQUEUE"),
        nl.attribute(_NFTA_TARGET_REV, _REVISION.to_bytes(4, "big")),
        nl.attribute(_NFTA_TARGET_INFO, info),
    )
    element = nl.nested(_NFTA_LIST_ELEM, nl.string(_NFTA_EXPR_NAME, "target"), target)
    body = nl.string(nft.NFTA_RULE_TABLE, table) + nl.string(nft.NFTA_RULE_CHAIN, chain)
    body += nl.nested(nft.NFTA_RULE_EXPRESSIONS, element)
    return nft.NFT_MSG_NEWRULE, nl.NLM_F_CREATE | nl.NLM_F_APPEND, nft.NFPROTO_INET, body


def flush_chain(table: str, chain: str) -> Request:
    """Delete the rules of a chain."""
    body = nl.string(nft.NFTA_RULE_TABLE, table) + nl.string(nft.NFTA_RULE_CHAIN, chain)
    return nft.NFT_MSG_DELRULE, 0, nft.NFPROTO_INET, body
