"""What the ruleset needs to know beside the policies: names, numbers, marks."""

from __future__ import annotations

from dataclasses import dataclass

from ipsecq.numbers import NATT_PORT


@dataclass(slots=True, frozen=True)
class NetfilterSettings:
    """Names and numbers of our tables.  The defaults are those of the configuration file.

    ``mark_mask`` covers exactly ``mark_done | mark_stolen``; whoever may set these bits (CAP_NET_ADMIN) can bypass
    every policy, and an operator's own marks must keep clear of them.
    """

    table: str = "ipsecq"
    """Name of the ``inet`` and of the ``netdev`` table; nothing outside of these two is ever touched."""
    queue_base: int = 50
    """Number of the first NFQUEUE; worker *i* serves ``queue_base + i`` and every ``workers``-th one after it."""
    workers: int = 1
    lanes: int = 1
    """Queues of each worker (:mod:`ipsecq.netfilter.steering`)."""
    mark_mask: int = 0x03000000
    mark_done: int = 0x01000000
    """Sent by ipsecq, or by a socket with a ``bypass`` policy: leave alone."""
    mark_stolen: int = 0x02000000
    """Replaced by what ipsecq sent: drop at egress."""
    mark_sockets: int = 0xFCFF0000
    """The bits that name the policy of the sending socket (:mod:`ipsecq.policy.sockets`); 0: sockets have none.
    Without those of ``mark_mask`` and ``reqid_mark``."""
    enc_device: str = "enc0"
    natt_ports: tuple[int, ...] = (NATT_PORT,)
    """Local UDP ports that carry ESP (RFC 3948)."""
    udp_ports: tuple[int, ...] = ()
    """Local ports of our own sockets that send ESP in UDP; what leaves from them gets the first of ``natt_ports``."""
    direct: bool = False
    """Whole ESP datagrams come by packet rings (:mod:`ipsecq.datapath.ring`), so our table drops them first of all."""
    queue_bypass: bool = False
    """Fail open for *every* policy: queue statements say ``bypass``.  ``Policy.fail_open`` does it for one."""
    loopback: bool = False
    """Apply policies to what this host sends to itself over ``lo``.  Off, as Linux's own IPsec has it."""
    neighbour_discovery: bool = True
    """Leave IPv6 neighbour discovery (RFC 4861, hop limit 255) and MLD (hop limit 1) alone: without them no packet
    reaches a link.  Neither is ever forwarded."""
    defragment: str = "tproxy"
    """What switches the kernel's defragmentation on: ``tproxy``, ``ct`` (brings connection tracking) or ``none``."""
    socket_match: bool = True
    """Use nft's ``socket`` expression, by which packets *to* bypass sockets are exempt from inbound policies."""
    inner_dir: str = ""
    """Directory whose ``*.nft`` hold the operator's rules for decapsulated packets; "" for none."""
    reqid_mark: int = 0
    """Adjacent bits of the packet mark that get the reqid of decapsulated packets' SAs; 0: none do."""

    interfaces: tuple[str, ...] = ()
    """Devices of route-based tunnels: what goes in or comes out there has policies of its own."""

    def __post_init__(self) -> None:
        if self.mark_done | self.mark_stolen != self.mark_mask or self.mark_done & self.mark_stolen:
            raise ValueError(
                f"mark_mask {self.mark_mask:#x} must be mark_done {self.mark_done:#x} | mark_stolen "
                f"{self.mark_stolen:#x}, two different bits"
            )
        low = self.reqid_mark & -self.reqid_mark
        if self.reqid_mark & self.mark_mask or self.reqid_mark & (self.reqid_mark + low):
            raise ValueError(f"reqid_mark {self.reqid_mark:#x}: adjacent bits, clear of {self.mark_mask:#x}")
        # Whatever else these bits are for goes first.
        object.__setattr__(self, "mark_sockets", self.mark_sockets & ~(self.mark_mask | self.reqid_mark))
        if not 1 <= self.workers <= 256 or not 1 <= self.lanes <= 16 or not 0 <= self.queue_base <= 0xFFFF - self.queues:
            raise ValueError(
                f"workers {self.workers} (1 to 256), lanes {self.lanes} (1 to 16) from queue {self.queue_base} on "
                "(up to 65535)"
            )

    @property
    def queues(self) -> int:
        """Queues of all workers."""
        return self.workers * self.lanes

    @property
    def socket_policy(self) -> str:
        """nft expression, behind ``meta`` or ``socket``: the mark of the socket's policy."""
        return f"mark & {self.mark_sockets:#010x}"

    @property
    def done(self) -> str:
        """nft match: the packet is ours."""
        return f"meta mark & {self.mark_mask:#010x} == {self.mark_done:#010x}"

    @property
    def stolen(self) -> str:
        """nft match: the packet was replaced."""
        return f"meta mark & {self.mark_mask:#010x} == {self.mark_stolen:#010x}"
