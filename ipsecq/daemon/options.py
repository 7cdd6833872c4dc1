"""The options of the configuration file: one table, from which everything about them is made.

Each dataclass is one table of the file and each field one key: its type, default, what is accepted and what it means.
``config`` checks a file against them; ``reference`` prints them as the commented default file, as ipsecq.conf(5) and as
``docs/configuration.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from ipsecq.policy.interface import MAX_REQID

QUEUE_BASE: Final = 0x4950
"""18768, "IP": away from the small numbers that other users of NFQUEUE take first."""

MARK_SOCKETS: Final = 0xFCFF0000
"""The first 63 policies of sockets use the top six bits alone, where few others' marks are."""


def _option(
    default: Any,
    meaning: str,
    *,
    among: tuple[str, ...] = (),
    within: tuple[int, int] | None = None,
    restart: bool = False,
    shape: str = "",
    example: str = "",
) -> Any:
    """One key.  ``restart``: a reload refuses a change.  ``shape``: what a string looks like, for people.

    ``example``: TOML that the default file has in force, in place of the default.
    """
    metadata = {"meaning": meaning, "among": among, "restart": restart, "shape": shape, "example": example}
    return field(default=default, metadata={**metadata, **({"within": within} if within else {})})


@dataclass(slots=True, frozen=True)
class DaemonConfig:
    """The daemon: its policies, workers and directories."""

    policy: tuple[str, ...] = _option(
        (),
        "Files of SAs and policies in the syntax of setkey(8), read in this order; relative to this file. "
        '"credential:NAME" takes a file that systemd hands over with LoadCredential=, so that keys need not lie in /etc.',
        shape="list of file names",
        example='["setkey.conf"]',
    )
    workers: int = _option(
        0,
        "Worker processes; 0 is one for each processor that the daemon may use.",
        within=(0, 256),
        restart=True,
    )
    lanes: int = _option(
        4,
        "Queues of each worker. SAs in different ones have equal shares of a worker that has too much to do.",
        within=(1, 16),
        restart=True,
    )
    parallel_sas: bool = _option(
        False,
        "Share the flows of a policy among all outbound SAs that fit it (RFC 9611), where otherwise the oldest, or the "
        "newest, serves all of them. Each flow keeps to one SA, and so to its order.",
        restart=True,
    )
    queue_base: int = _option(
        QUEUE_BASE,
        "First of the NFQUEUE numbers: workers times lanes, and with offload.gso as many more as there are workers.",
        within=(0, 65535),
        restart=True,
    )
    state_dir: str = _option(
        "/var/lib/ipsecq",
        "Must survive a reboot: which sequence numbers may have been used is kept there. Never restore it from a backup.",
        shape="directory",
        restart=True,
    )
    run_dir: str = _option(
        "/run/ipsecq",
        "Must not survive a reboot: shared table, lock, control socket, PF_KEY socket.",
        shape="directory",
        restart=True,
    )
    group: str = _option(
        "",
        "Members of this group may read the status over the control socket; empty: root and the daemon's own user alone.",
        shape="group name",
        restart=True,
    )
    allow_legacy: bool = _option(False, "Accept DES, 3DES and MD5.")
    pfkey_freebsd: bool = _option(
        False,
        "A second PF_KEY socket, pfkey.freebsd in run_dir, for programs built on FreeBSD's headers.",
        restart=True,
    )
    rekey_grace: int = _option(
        2,
        "Seconds that an SA which key management deletes after a rekey goes on receiving what is on its way.",
        within=(0, 60),
        restart=True,
    )
    natt_keepalive: int = _option(
        20,
        "Seconds of silence after which an SA in UDP sends a NAT keepalive (RFC 3948 section 2.3); 0: never.",
        within=(0, 3600),
    )
    on_stop: str = _option(
        "block",
        'What a clean stop leaves: "block" keeps protected traffic blocked, "remove" lets it pass in clear.',
        among=("block", "remove"),
    )


@dataclass(slots=True, frozen=True)
class NftablesConfig:
    """Our rules in the kernel: the tables `inet` and `netdev` of one name, and nothing else in the ruleset."""

    table: str = _option("ipsecq", "Name of our tables.", shape="name", restart=True)
    mark_done: int = _option(
        0x01000000,
        "Bit of the packet mark that says: sent by ipsecq, leave alone. Your own rules must not change it.",
        within=(1, 0xFFFFFFFF),
        shape="hex",
        restart=True,
    )
    mark_stolen: int = _option(
        0x02000000,
        "Bit of the packet mark that says: replaced by what ipsecq sent. Your own rules must not change it.",
        within=(1, 0xFFFFFFFF),
        shape="hex",
        restart=True,
    )
    mark_sockets: int = _option(
        MARK_SOCKETS,
        "Bits of the packet mark that name the policy of the sending socket, filled from the highest down; 0: sockets have "
        "no policies of their own. Your own rules must not change them.",
        within=(0, 0xFFFFFFFF),
        shape="hex",
        restart=True,
    )
    enc_device: str = _option(
        "enc0",
        'Decapsulated packets arrive on this device: match them with iifname "enc0".',
        shape="device name",
        restart=True,
    )
    natt_ports: tuple[int, ...] = _option(
        (4500,), "Local UDP ports that carry ESP behind NAT (RFC 3948): one or more.", shape="list of port numbers",
        restart=True,
    )
    queue_bypass: bool = _option(
        False,
        "true: FAIL OPEN, protected traffic passes in clear while no worker serves its queue. Loud in status and logs.",
        restart=True,
    )
    loopback: bool = _option(False, "Apply policies to what this host sends to itself.", restart=True)
    neighbour_discovery: bool = _option(
        True, "Leave IPv6 neighbour discovery alone whatever the policies say.", restart=True
    )
    inner_dir: str = _option(
        "inner.d",
        "Directory of nft files (*.nft) with your rules for decapsulated packets, called when filtertunnel is 1; relative "
        "to this file. A reload reads them again.",
        shape="directory",
        restart=True,
    )
    reqid_mark: int = _option(
        0,
        "Adjacent bits of the packet mark that tell a decapsulated packet's reqid, such as 0x0000ff00; 0: none.",
        within=(0, 0xFFFFFFFF),
        shape="hex",
        restart=True,
    )


@dataclass(slots=True, frozen=True)
class OffloadConfig:
    """What makes packets cheaper, each with a switch."""

    gso: bool = _option(
        True,
        "Take TCP super-packets whole from the kernel, where it can give them, and cut them here. A second queue a "
        "worker, numbered behind the workers' own, has the kernel cut what cannot be cut here.",
        restart=True,
    )
    coalesce: bool = _option(
        True, "Give runs of decapsulated TCP segments, and of equal datagrams, to the kernel as one packet.", restart=True
    )
    udp_segment: bool = _option(
        True,
        "Send ESP in UDP in bursts, many datagrams in one system call, where the kernel can (UDP_SEGMENT). They leave "
        "from sockets of our own; our table makes their source port the first of natt_ports.",
        restart=True,
    )
    compiled: bool = _option(
        True,
        "Let compiled code seal and open the packets of flows that are decided about (AES-GCM and ChaCha20-Poly1305 in "
        "tunnel mode), where it was built when ipsecq was installed.",
        restart=True,
    )
    ring: bool = _option(
        True,
        "Take whole ESP datagrams from packet rings (packet(7)) in place of queues, for the compiled code. Our table drops "
        "what is in a ring before all other rules of prerouting (priority -450). A ring takes 1.5 MiB (IPv4) and 0.5 MiB "
        "(IPv6) for each lane of each worker.",
        restart=True,
    )


@dataclass(slots=True, frozen=True)
class MetricsConfig:
    """Prometheus metrics."""

    listen: str = _option(
        "127.0.0.1:9814",
        'Prometheus scrapes http://ADDRESS:PORT/metrics; "[address]:port" for IPv6; empty serves none.',
        shape='"address:port"',
        restart=True,
    )
    sa_limit: int = _option(
        1000,
        "SAs with series of their own; beyond it only the sums grow.",
        within=(0, 1_000_000),
        restart=True,
    )
    peer_limit: int = _option(
        1000,
        "Peers, and tunnels, with series of their own; beyond it peers are counted together as other.",
        within=(0, 1_000_000),
        restart=True,
    )


@dataclass(slots=True, frozen=True)
class LogConfig:
    """What is logged, and how."""

    level: str = _option("info", "The least that is logged.", among=("debug", "info", "warning", "error"))
    format: str = _option("text", "Lines for people or objects for programs.", among=("text", "json"))


@dataclass(slots=True, frozen=True)
class InterfaceConfig:
    """A route-based tunnel in the manner of if_ipsec(4): what is routed into the device leaves through the SAs with its
    reqid, or not at all, and what those open enters from it. Addresses and routes are yours (`ip address`, `ip route`).
    Repeat the table for each; a reload makes, changes and removes devices."""

    name: str = _option("", "Name of the device.", shape="device name", example='"ipsec0"')
    local: str = _option("", "Outer address of this end, IPv4 or IPv6.", shape="address", example='"192.0.2.1"')
    remote: str = _option("", "Outer address of the far end.", shape="address", example='"198.51.100.1"')
    reqid: int = _option(
        0,
        "The reqid of its SAs (`-u` of setkey): ESP in tunnel mode between the two ends. No other SA, and no policy, may "
        "have it.",
        within=(1, MAX_REQID),
        example="100",
    )
    mtu: int = _option(1400, "MTU of the device.", within=(576, 65535))


ARRAYS: Final[dict[str, type[Any]]] = {"interface": InterfaceConfig}
"""Tables that may come more than once, ``[[interface]]``."""

SECTIONS: Final[dict[str, type[Any]]] = {
    "daemon": DaemonConfig,
    "nftables": NftablesConfig,
    "offload": OffloadConfig,
    "metrics": MetricsConfig,
    "log": LogConfig,
}
"""The tables of the file, in its order; ``[sysctl]`` is the table of ``ipsecq.sysctl``."""
