"""What the machine can do: privileges, kernel, sysctls, MTU.

Reads ``/proc/sys`` and the links of the current network namespace; changes nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ipsecq.doctor.finding import Finding, Grade
from ipsecq.netfilter.capabilities import Capabilities
from ipsecq.netfilter.links import Link, list_links
from ipsecq.netfilter.load import NATIVE
from ipsecq.netfilter.settings import NetfilterSettings
from ipsecq.numbers import IPV4_MIN_MTU, IPV6_MIN_MTU, Mode
from ipsecq.policy.model import Policy

_TUNNEL_OVERHEAD: Final = {4: 20 + 8 + 8 + 2 + 16 + 3, 6: 40 + 8 + 8 + 2 + 16 + 3}
"""What ESP with AES-GCM adds in tunnel mode, by outer family: header, SPI and sequence, IV, trailer, ICV, padding."""


def examine(
    settings: NetfilterSettings, policies: Sequence[Policy], capabilities: Capabilities
) -> list[Finding]:
    """Look at the machine; ``policies`` make the findings about forwarding, MTU and families precise."""
    families = {policy.selector.family for policy in policies} or {4, 6}
    return [
        *_process(capabilities),
        *_kernel(capabilities),
        *_forwarding(families),
        *_reverse_path(settings),
        *_mtu(policies),
    ]


def _process(can: Capabilities) -> Iterator[Finding]:
    for name, has in (("CAP_NET_ADMIN", can.net_admin), ("CAP_NET_RAW", can.net_raw)):
        if has:
            yield Finding(Grade.OK, "privilege", f"this process has {name}")
        else:
            yield Finding(Grade.FAIL, "privilege", f"{name} is missing", "run as root, or by the systemd unit")
    if shutil.which("nft"):
        yield Finding(Grade.OK, "nft", "the nft program is there")
    else:
        yield Finding(Grade.FAIL, "nft", "the nft program is not there", "apt install nftables")


def _kernel(can: Capabilities) -> Iterator[Finding]:
    if can.mechanism == NATIVE:
        yield Finding(Grade.OK, "queue", "packets are queued by nft's own queue statement")
    elif can.mechanism:
        yield Finding(Grade.OK, "queue", "no nft queue statement in this kernel: xt_NFQUEUE through nft_compat is used")
    else:
        yield Finding(
            Grade.FAIL, "queue", "neither nft_queue nor nft_compat with xt_NFQUEUE works",
            "modprobe nft_queue nfnetlink_queue (or nft_compat xt_NFQUEUE)",
        )  # fmt: skip
    for works, subject, lost, mend in (
        (can.nft, "nf_tables", "nf_tables does not work", "modprobe nf_tables"),
        (can.egress, "egress", "no netdev egress hook: originals of protected packets cannot be held back",
         "a kernel of 5.16 or later with CONFIG_NETFILTER_EGRESS"),
        (can.fib, "fib", "no fib expression: packets to this host cannot be told from others",
         "modprobe nft_fib_inet nft_fib_ipv4 nft_fib_ipv6"),
        (can.tun, "tun", "no TUN device: decapsulated packets have no way in", "modprobe tun; ls -l /dev/net/tun"),
    ):  # fmt: skip
        yield Finding(Grade.OK, subject, "works") if works else Finding(Grade.FAIL, subject, lost, mend)
    if can.tproxy:
        yield Finding(Grade.OK, "fragments", "defragmentation is switched on by a tproxy statement")
    elif can.conntrack:
        yield Finding(
            Grade.WARN, "fragments", "no nft_tproxy: defragmentation comes with connection tracking of all traffic",
            "modprobe nft_tproxy",
        )  # fmt: skip
    else:
        yield Finding(
            Grade.FAIL, "fragments", "nothing here defragments: ESP fragments and ports of fragments are not seen",
            "modprobe nft_tproxy, or nf_conntrack",
        )  # fmt: skip
    for works, subject, lost, mend in (
        (can.gso, "gso", "the queue does not hand over super-packets: slower", "a kernel of 3.10 or later"),
        (can.socket_match, "socket", "no socket expression: inbound policies apply to bypass sockets too",
         "modprobe nft_socket"),
        (can.owner, "owner", "no owned tables: a foreign 'nft flush ruleset' takes the second line of defence too",
         "a kernel of 5.12 or later"),
    ):  # fmt: skip
        yield Finding(Grade.OK, subject, "works") if works else Finding(Grade.WARN, subject, lost, mend)


def _forwarding(families: set[int]) -> Iterator[Finding]:
    for family, name in ((4, "net.ipv4.ip_forward"), (6, "net.ipv6.conf.all.forwarding")):
        if family not in families:
            continue
        value = _sysctl(name)
        if value == 1:
            yield Finding(Grade.OK, "forwarding", f"{name} = 1")
        elif value is None:
            yield Finding(Grade.WARN, "forwarding", f"{name} cannot be read: no IPv{family} here")
        else:
            yield Finding(
                Grade.WARN, "forwarding", f"{name} = {value}: this machine is a host, not a gateway",
                f"sysctl -w {name}=1",
            )  # fmt: skip


def _reverse_path(settings: NetfilterSettings) -> Iterator[Finding]:
    # The kernel takes the larger of "all" and the device's value; decapsulated packets come from the enc device, while
    # the route back to their source leads to the outer device, which a strict filter (1) calls spoofed.
    everywhere = _sysctl("net.ipv4.conf.all.rp_filter") or 0
    device = _sysctl(f"net/ipv4/conf/{settings.enc_device}/rp_filter")
    if device is None:
        device = _sysctl("net.ipv4.conf.default.rp_filter") or 0
    if max(everywhere, device) == 1:
        culprit = "all" if everywhere == 1 else settings.enc_device
        yield Finding(
            Grade.FAIL, "rp_filter", f"net.ipv4.conf.{culprit}.rp_filter = 1 (strict) drops decapsulated packets",
            f"sysctl -w net.ipv4.conf.{culprit}.rp_filter=2",
        )  # fmt: skip
    else:
        yield Finding(Grade.OK, "rp_filter", "decapsulated packets pass the reverse-path filter")


def _mtu(policies: Sequence[Policy]) -> Iterator[Finding]:
    ends = {
        transform.src
        for policy in policies
        for transform in policy.transforms
        if transform.mode == Mode.TUNNEL and transform.src is not None
    }
    outer = {4 if len(end) == 4 else 6 for end in ends} or {4}
    links = [link for link in list_links().values() if link.up and not link.loopback]
    smallest: Link | None = min(links, key=lambda link: link.mtu, default=None)
    if smallest is None:
        yield Finding(Grade.WARN, "mtu", "no device is up", "ip link set DEVICE up")
        return
    for family in sorted(outer):
        inside = smallest.mtu - _TUNNEL_OVERHEAD[family]
        floor = IPV6_MIN_MTU if any(policy.selector.family == 6 for policy in policies) else IPV4_MIN_MTU
        text = f"{smallest.name} has MTU {smallest.mtu}: about {inside} octets fit through an IPv{family} tunnel"
        if inside < floor:
            yield Finding(
                Grade.WARN, "mtu", f"{text}, less than the inner protocol's {floor}: outer packets will be fragmented",
                f"ip link set {smallest.name} mtu {floor + _TUNNEL_OVERHEAD[family]}",
            )  # fmt: skip
        else:
            yield Finding(Grade.OK, "mtu", text)


def _sysctl(name: str) -> int | None:
    path = Path("/proc/sys") / (name if "/" in name else name.replace(".", "/"))
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
