"""One NFQUEUE: packets in by the batch, verdicts out by the batch.

PyPI's NetfilterQueue binds the queue.  The hot path then works on its descriptor: whole batches are read without a
Python object for each packet, and a run of equal verdicts is one message.  What reading and verdict cost
is in ``docs/performance.md``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from io import FileIO
from socket import htonl, ntohl
from struct import Struct
from types import TracebackType
from typing import Final, NamedTuple

from netfilterqueue import NetfilterQueue

from ipsecq.datapath import nfqueue as nl
from ipsecq.datapath.mmsg import ReceiveVector
from ipsecq.errors import NetfilterError
from ipsecq.netlink import HEADER, NETLINK_NO_ENOBUFS, NLM_F_ACK, NLMSG_ERROR, SOL_NETLINK, attribute, error_number

BATCH: Final = 64
"""Packets read at once.  More gains nothing measurable and lets the first packet of a batch wait for the last."""

MAX_LENGTH: Final = 4096
"""Packets that the kernel keeps for us before it drops: about 10 ms of a busy worker."""

RECEIVE_BUFFER: Final = 8 << 20
"""Octets of socket buffer; the kernel counts about twice the packets' size."""

PROC_TABLE: Final = "/proc/thread-self/net/netfilter/nfnetlink_queue"

SO_RCVBUFFORCE: Final = 33
_ACK_PATIENCE: Final = 2.0

Packet = tuple[int, int, int, int, memoryview]
"""(cookie, hook, mark, info, payload): info is a set of NFQA_SKB_* bits; the payload is valid until the next read."""

_NATIVE: Final = sys.byteorder
_MAX_LAYOUTS: Final = 8
_MAX_PENDING: Final = 1 << 16
"""Octets of verdicts that the kernel refused for want of memory; with more than that the worker gives up."""
_BATCH: Final = Struct("=I16sHHII")
_BATCH_MARK: Final = Struct("=I16sHHIIHHI")


class QueueStats(NamedTuple):
    """A line of ``/proc/net/netfilter/nfnetlink_queue``."""

    waiting: int
    """Packets in the kernel that have no verdict yet (field 3)."""
    dropped: int
    """Dropped because the queue was full (field 6)."""
    user_dropped: int
    """Dropped because the socket buffer was full (field 7)."""
    sequence: int
    """Packets queued so far."""


def queue_table() -> dict[int, QueueStats]:
    """Every bound queue of this network namespace by its number; empty where NFQUEUE was never used."""
    try:
        with open(PROC_TABLE, "rb") as proc:
            lines = proc.read().splitlines()
    except OSError:
        return {}
    rows = [[int(number) for number in line.split()] for line in lines]
    return {row[0]: QueueStats(row[2], row[5], row[6], row[7]) for row in rows if len(row) >= 8}


class Queue:
    """A bound queue.  ``gso`` tells whether super-packets come whole, which not every kernel can.

    ``read()`` returns a batch; ``add_verdict`` collects verdicts in the order of the packets, ``flush`` sends them.
    """

    def __init__(
        self,
        number: int,
        *,
        max_length: int = MAX_LENGTH,
        copy_range: int = nl.PAYLOAD_MAX,
        gso: bool = False,
        receive_buffer: int = RECEIVE_BUFFER,
        room: Queue | None = None,
    ) -> None:
        """Bind queue ``number`` of this network namespace.

        ``room``: a queue of the same thread whose buffers this one uses, too: a read of either ends the other's batch.
        NetfilterError when another process has it or the kernel has no NFQUEUE.
        """
        self.number = number
        self.overruns = 0
        """Reads that answered ENOBUFS (only where NETLINK_NO_ENOBUFS cannot be set)."""
        self.errors = 0
        """Netlink errors, most of them verdicts for packets that the kernel had dropped already."""
        self.truncated = 0
        """Packets that did not fit the copy range; dropped here."""
        self._binding = NetfilterQueue()
        try:
            with warnings.catch_warnings():
                # It warns when the buffer that it asks for is not the one it gets; ours is set below.
                warnings.simplefilter("ignore", RuntimeWarning)
                self._binding.bind(number, _never, max_length)
        except OSError as error:
            raise NetfilterError(
                f"queue {number}: cannot bind ({error}); is another process serving it, "
                "and is nfnetlink_queue in the kernel? See /proc/net/netfilter/nfnetlink_queue"
            ) from None
        # The descriptor is the binding's; the socket object made of it is never closed, only detached.
        self._socket = socket.socket(fileno=self._binding.get_fd())
        self.fd = self._socket.fileno()
        self._sequence = 0
        self._pending = bytearray()
        self._run = (-1, 0, 0)
        self._batch_header = nl.message(nl.NFQNL_MSG_VERDICT_BATCH, 0, 0, number, b"")[4:]
        self._layouts: list[nl.Layout] = []
        self._vector: ReceiveVector = ReceiveVector(self.fd, BATCH, nl.PAYLOAD_MAX + 512, room._vector if room else None)
        try:
            self._configure(max_length, copy_range, gso, receive_buffer)
        except BaseException:
            self._socket.detach()
            self._binding.unbind()
            raise
        self.blind = ""
        """Why the kernel's own counts cannot be read; empty when they can."""
        self._proc: FileIO | None = None
        try:
            # thread-self: /proc/net is the namespace of the process's first thread.
            self._proc = open(PROC_TABLE, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:  # mode 0440, group root: a daemon that is not in that group serves all the same
            self.blind = f"{PROC_TABLE}: {error.strerror}"

    # -- configuration -----------------------------------------------------------------------------------------

    def _configure(self, max_length: int, copy_range: int, gso: bool, receive_buffer: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
        except OSError:  # no CAP_NET_ADMIN in the initial user namespace: as much as rmem_max allows
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        except OSError:
            self.overruns = 0  # reads will answer ENOBUFS, which read() counts
        # bind() limits the copy to 4016 octets; packets that came before this are dropped below, in _await.
        params = nl.be32(copy_range) + bytes([nl.NFQNL_COPY_PACKET])
        self._command(attribute(nl.NFQA_CFG_PARAMS, params))
        self._command(attribute(nl.NFQA_CFG_QUEUE_MAXLEN, nl.be32(max_length)))
        # Never fail-open; nobody reads UIDs, security contexts or conntrack from here.
        others = nl.NFQA_CFG_F_FAIL_OPEN | nl.NFQA_CFG_F_CONNTRACK | nl.NFQA_CFG_F_UID_GID
        self._flags(others, 0)
        self.gso = False
        if gso:
            try:
                self._flags(nl.NFQA_CFG_F_GSO, nl.NFQA_CFG_F_GSO)
                self.gso = True
            except NetfilterError:
                self.gso = False

    def _flags(self, mask: int, value: int) -> None:
        self._command(
            attribute(nl.NFQA_CFG_MASK, nl.be32(mask)) + attribute(nl.NFQA_CFG_FLAGS, nl.be32(value))
        )

    def _command(self, attributes: bytes) -> None:
        """Send one configuration message and wait for the kernel's answer."""
        self._sequence += 1
        self._socket.send(nl.message(nl.NFQNL_MSG_CONFIG, NLM_F_ACK, self._sequence, self.number, attributes))
        self._socket.settimeout(_ACK_PATIENCE)
        try:
            while True:
                try:
                    answer = self._socket.recv(nl.PAYLOAD_MAX + 512)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        continue
                    raise NetfilterError(f"queue {self.number}: no answer to its configuration: {error}") from None
                kind, sequence = int.from_bytes(answer[4:6], _NATIVE), int.from_bytes(answer[8:12], _NATIVE)
                if kind == nl.NFQNL_MSG_PACKET:
                    self._early(answer)
                elif kind == NLMSG_ERROR and sequence == self._sequence:
                    code = error_number(answer[HEADER:])
                    if code:
                        reason = errno.errorcode.get(code, str(code))
                        raise NetfilterError(f"queue {self.number}: the kernel refused its configuration: {reason}")
                    return
        finally:
            self._socket.settimeout(0.0)

    def _early(self, answer: bytes) -> None:
        """Drop a packet that came before the queue was configured: it may be cut off."""
        found = nl.walk(memoryview(answer), len(answer))
        if found is not None:
            self.truncated += 1
            self.add_verdict(found.cookie, nl.NF_DROP)
            self.flush()

    # -- packets -----------------------------------------------------------------------------------------------

    def read(self) -> list[Packet]:
        """Read what is there, at most :data:`BATCH` packets; never waits.

        The payloads are views of buffers that the next ``read`` overwrites.  Packets that were cut off get their
        verdict (drop) here and are not in the list.
        """
        sizes = self._vector.receive()
        if sizes is None:
            self.overruns += 1
            return []
        return self._packets(self._vector.views, sizes)

    def rest(self, first: int, end: int) -> list[Packet]:
        """The packets of messages ``first`` to ``end`` (excluded) that somebody else has read into the vector."""
        return self._packets(self._vector.views[first:end], self._vector.lengths(first, end))

    def _packets(self, views: Sequence[memoryview], sizes: Sequence[int]) -> list[Packet]:
        packets: list[Packet] = []
        append = packets.append
        layouts = self._layouts
        for view, size in zip(views, sizes, strict=False):
            for layout in layouts:
                fields = layout.unpack_from(view)
                if fields[::2] == layout.expected and size >= layout.start:
                    mark, info = layout.mark, layout.info
                    append((
                        fields[1],
                        fields[2],
                        ntohl(fields[mark]) if mark else 0,
                        ntohl(fields[info]) if info else 0,
                        view[layout.start : size],
                    ))  # fmt: skip
                    break
            else:
                packet = self._unusual(view, size)
                if packet is not None:
                    append(packet)
        return packets

    def _unusual(self, view: memoryview, size: int) -> Packet | None:
        """A message whose layout is new: learn it.  Errors are counted, packets that were cut off dropped."""
        if int.from_bytes(view[4:6], _NATIVE) != nl.NFQNL_MSG_PACKET:
            self.errors += 1
            return None
        found = nl.walk(view, size)
        if found is None:
            self.errors += 1
            return None
        if found.captured or found.end <= found.start:
            self.truncated += 1
            # Not through add_verdict: a batch verdict would answer the packets before it, too.
            self.send_verdict(found.cookie, nl.NF_DROP)
            return None
        if len(self._layouts) < _MAX_LAYOUTS:
            with contextlib.suppress(ValueError):  # an unusual packet is walked each time
                self._layouts.append(nl.Layout(view, size))
        return found.cookie, found.hook, found.mark, found.info, view[found.start : found.end]

    @property
    def vector(self) -> int:
        """Where the batch's message headers lie (struct mmsghdr, :data:`BATCH` of them)."""
        return self._vector.address

    @property
    def verdict_header(self) -> bytes:
        """What a batch verdict has behind its length."""
        return self._batch_header

    @property
    def unsent(self) -> bool:
        """Verdicts wait that the kernel did not take: they go first."""
        return bool(self._pending)

    def refuse(self, number: int) -> None:
        """Somebody else's read of the queue answered this errno."""
        if number == errno.ENOBUFS:
            self.overruns += 1
        elif number not in {errno.EAGAIN, errno.EINTR}:
            raise OSError(number, f"recvmmsg: {os.strerror(number)}")

    def keep(self, messages: bytes) -> None:
        """Verdicts that the kernel did not take, for the next :meth:`flush`."""
        self.errors += 1
        self._pending += messages

    # -- verdicts ----------------------------------------------------------------------------------------------

    def add_verdict(self, cookie: int, verdict: int, mark: int = -1) -> None:
        """Note a verdict; call it in the order of the packets, for every packet of a batch, then :meth:`flush`.

        A batch verdict answers *all* packets that are outstanding up to its id.  Packets come in the order of their
        ids and each gets its verdict here in the same order, so a run of equal verdicts is one message that names the
        last.  ``mark`` replaces the packet's mark; -1 leaves it.
        """
        run = self._run
        if (run[0] != verdict or run[2] != mark) and run[0] >= 0:
            self._pending += self._encode(*run)
        self._run = (verdict, cookie, mark)

    def flush(self) -> None:
        """Send the verdicts that were noted, in one call."""
        run = self._run
        if run[0] >= 0:
            self._pending += self._encode(*run)
            self._run = (-1, 0, 0)
        if self._pending:
            self._send(b"")

    def send_verdict(self, cookie: int, verdict: int) -> None:
        """Answer one packet at once, whatever is outstanding before it."""
        answer = attribute(nl.NFQA_VERDICT_HDR, nl.be32(verdict) + cookie.to_bytes(4, _NATIVE))
        self._send(nl.message(nl.NFQNL_MSG_VERDICT, 0, 0, self.number, answer))

    def add_requeue(self, cookie: int, number: int) -> None:
        """Note that a packet goes to another queue, where (``gso`` off) the kernel segments it, as only it can."""
        self.add_verdict(cookie, nl.NF_QUEUE | number << 16)

    def _encode(self, verdict: int, cookie: int, mark: int) -> bytes:
        if mark < 0:
            return _BATCH.pack(32, self._batch_header, 12, nl.NFQA_VERDICT_HDR, htonl(verdict), cookie)
        return _BATCH_MARK.pack(
            40, self._batch_header, 12, nl.NFQA_VERDICT_HDR, htonl(verdict), cookie, 8, nl.NFQA_MARK, htonl(mark)
        )

    def _send(self, messages: bytes) -> None:
        """Send messages behind what could not be sent before.

        When the kernel has no memory for a message, its packets stay in the queue, and the next batch verdict would
        answer them: with an accept that was meant for others.  So what failed is kept and always goes first.
        """
        if messages and not self._pending:
            data: bytes | bytearray = messages
        else:
            self._pending += messages
            data = self._pending
        try:
            self._socket.send(data)
        except OSError as error:
            self.errors += 1
            if len(data) > _MAX_PENDING:
                raise NetfilterError(f"queue {self.number}: the kernel takes no verdicts: {error}") from None
            if data is messages:
                self._pending += messages
        else:
            self._pending.clear()

    # -- the rest ----------------------------------------------------------------------------------------------

    def stats(self) -> QueueStats:
        """Length and losses of this queue, from /proc; zeros when it isn't listed or cannot be read (``blind``)."""
        if self._proc is None:
            return QueueStats(0, 0, 0, 0)
        self._proc.seek(0)
        for line in self._proc.read(65536).splitlines():
            fields = line.split()
            if len(fields) >= 8 and int(fields[0]) == self.number:
                return QueueStats(int(fields[2]), int(fields[5]), int(fields[6]), int(fields[7]))
        return QueueStats(0, 0, 0, 0)

    def close(self) -> None:
        """Unbind: the kernel drops what waits, and whatever comes, unless a rule says bypass."""
        if self.fd >= 0:
            self.fd = -1
            if self._proc is not None:
                self._proc.close()
            self._socket.detach()
            self._binding.unbind()

    def __enter__(self) -> Queue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _never(packet: object) -> None:
    """NetfilterQueue wants a callback; it is called by its ``run``, which nobody calls."""
