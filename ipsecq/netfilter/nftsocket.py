"""A netlink socket to nf_tables: batches, dumps and notifications.

Source: Linux ``include/uapi/linux/netfilter/nfnetlink.h`` and ``nf_tables.h``.  Numbers in attributes are in network
order.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import Final

from ipsecq.errors import NetfilterError
from ipsecq.netlink import (
    NETLINK_ADD_MEMBERSHIP,
    NLM_F_ACK,
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
    attribute,
    attributes,
    error_number,
    genmsg,
    message,
    messages,
    string,
)

NETLINK_NETFILTER: Final = 12
NFNLGRP_NFTABLES: Final = 7

NFNL_MSG_BATCH_BEGIN: Final = 0x10
NFNL_MSG_BATCH_END: Final = 0x11
NFNL_SUBSYS_NFTABLES: Final = 10
NFT_MSG_NEWRULE: Final = NFNL_SUBSYS_NFTABLES << 8 | 6
NFT_MSG_GETRULE: Final = NFNL_SUBSYS_NFTABLES << 8 | 7
NFT_MSG_DELRULE: Final = NFNL_SUBSYS_NFTABLES << 8 | 8

NFT_MSG_NEWOBJ: Final = NFNL_SUBSYS_NFTABLES << 8 | 18
NFT_MSG_GETOBJ: Final = NFNL_SUBSYS_NFTABLES << 8 | 19
NFT_OBJECT_COUNTER: Final = 1

NFPROTO_INET: Final = 1
NFPROTO_NETDEV: Final = 5

NFTA_RULE_TABLE: Final = 1
NFTA_RULE_CHAIN: Final = 2
NFTA_RULE_EXPRESSIONS: Final = 4

NFTA_OBJ_TABLE: Final = 1
NFTA_OBJ_NAME: Final = 2
NFTA_OBJ_TYPE: Final = 3
NFTA_OBJ_DATA: Final = 4
NFTA_COUNTER_BYTES: Final = 1
NFTA_COUNTER_PACKETS: Final = 2


class NftSocket:
    """A netlink socket to nf_tables in the current network namespace."""

    def __init__(self, group: int = 0) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        self.socket.settimeout(10)
        self._sequence = 0
        if group:
            self.socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def __enter__(self) -> NftSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def drain(self) -> bool:
        """Throw away what waits in a non-blocking socket; True when there was something."""
        found = False
        while True:
            try:
                self.socket.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            found = True

    def fileno(self) -> int:
        """The descriptor, for select and asyncio."""
        return self.socket.fileno()

    def batch(self, requests: list[tuple[int, int, int, bytes]]) -> None:
        """Send (type, flags, family, attributes) requests as one transaction.

        Raises NetfilterError with the errno of the first request that the kernel refused; nothing is changed then.
        """
        begin = self._sequence = self._sequence + 1
        frame = genmsg(0, NFNL_SUBSYS_NFTABLES)
        parts = [message(NFNL_MSG_BATCH_BEGIN, 0, begin, frame)]
        for kind, flags, family, body in requests:
            self._sequence += 1
            parts.append(message(kind, flags | NLM_F_ACK, self._sequence, genmsg(family) + body))
        last = self._sequence
        self._sequence += 1
        parts.append(message(NFNL_MSG_BATCH_END, 0, self._sequence, frame))
        self.socket.send(b"".join(parts))
        waiting, failure = last - begin, 0
        while waiting > 0:
            for kind, sequence, body in self._receive():
                if kind != NLMSG_ERROR or not begin <= sequence <= last:
                    continue
                number = error_number(body)
                failure = failure or number
                # An error of the whole batch carries the first message's sequence and ends it.
                waiting = 0 if sequence == begin else waiting - 1
        if failure:
            name = errno.errorcode.get(failure, str(failure))
            raise NetfilterError(f"nf_tables refused the transaction: {os.strerror(failure)} ({name})")

    def rule_counts(self, family: int, table: str) -> dict[str, int]:
        """Rules in each chain of a table that has any; empty when there is no such table."""
        counts: dict[str, int] = {}
        for kind, found in self._dump(NFT_MSG_GETRULE, family, string(NFTA_RULE_TABLE, table)):
            # Kernels before 5.x ignore the filter of a dump: look at the table's name too.
            if kind == NFT_MSG_NEWRULE and found.get(NFTA_RULE_TABLE, b"")[:-1].decode() == table:
                chain = found.get(NFTA_RULE_CHAIN, b"")[:-1].decode()
                counts[chain] = counts.get(chain, 0) + 1
        return counts

    def counters(self, family: int, table: str) -> dict[str, tuple[int, int]]:
        """The named counters of a table: name → (packets, bytes); empty when there is no such table."""
        counts: dict[str, tuple[int, int]] = {}
        body = string(NFTA_OBJ_TABLE, table) + attribute(NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER.to_bytes(4, "big"))
        for kind, found in self._dump(NFT_MSG_GETOBJ, family, body):
            if kind == NFT_MSG_NEWOBJ and found.get(NFTA_OBJ_TABLE, b"")[:-1].decode() == table:
                data = dict(attributes(found.get(NFTA_OBJ_DATA, b"")))
                packets, octets = (
                    int.from_bytes(data.get(each, b""), "big") for each in (NFTA_COUNTER_PACKETS, NFTA_COUNTER_BYTES)
                )
                counts[found.get(NFTA_OBJ_NAME, b"")[:-1].decode()] = packets, octets
        return counts

    def _dump(self, request: int, family: int, body: bytes) -> Iterator[tuple[int, dict[int, bytes]]]:
        """(message type, attributes) of each record."""
        self._sequence += 1
        self.socket.send(message(request, NLM_F_DUMP, self._sequence, genmsg(family) + body))
        while True:
            for kind, sequence, record in self._receive():
                if sequence != self._sequence:
                    continue
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return
                yield kind, dict(attributes(record[4:]))

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        try:
            buffer = self.socket.recv(1 << 18)
        except TimeoutError:
            raise NetfilterError("nf_tables did not answer within 10 s") from None
        return messages(buffer)
