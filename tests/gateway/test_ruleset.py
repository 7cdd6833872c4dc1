"""The compiled ruleset in a real kernel: who gets which packet, and that nothing protected leaves in clear.

    left 10.1.0.2, fd00:1::2 ── lan gw wan ── 10.2.0.2, fd00:2::2 right

``gw`` forwards and has the ruleset; queues are bound by the test.
"""

from __future__ import annotations

import re
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruleset_site import A4, A6, B4, B6, SETTINGS, STOLEN, Site, arrived, frames, policy, queues, wire
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.packet import Raw

from ipsecq.doctor.examination import examine
from ipsecq.doctor.finding import Grade
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.netfilter.capabilities import detect
from ipsecq.netfilter.links import LinkWatcher
from ipsecq.netfilter.sentinel import Sentinel
from ipsecq.netfilter.steering import inbound_queue, worker_of
from ipsecq.numbers import Action, Direction, Level
from ipsecq.policy.model import Policy
from ipsecq.sysctl import Sysctl

pytestmark = pytest.mark.root


@pytest.fixture
def site() -> Iterator[Site]:
    with Lab() as lab:
        here = Site(lab)
        yield here
        if here.queues:
            here.queues.close()


def test_protected_packets_go_to_their_workers_queue_and_the_rest_never_leaves_the_kernel(site: Site) -> None:
    one, two = policy(1, A4, "10.2.0.2/32"), policy(2, A6, B6, peer=b"\xcb\0\x71\x09")
    site.load(one, two)
    assert not site.ping(site.left, "10.2.0.2")
    assert not site.ping(site.left, "fd00:2::2")
    got = queues(site).take(2)
    assert [(queue, packet[0] >> 4) for queue, packet in got] == [(worker_of(one, 3), 4), (worker_of(two, 3), 6)]
    assert site.answers(site.left, "10.2.0.1")
    assert site.answers(site.right, "10.2.0.1")
    assert queues(site).seen == []


def test_without_a_listener_protected_traffic_is_dropped_and_the_block_counts_it(site: Site) -> None:
    site.load(policy(1, A4, B4), listen=False)
    tap = wire(site)
    assert not site.ping(site.left, "10.2.0.2")
    site.gw.call(site.loader.block)
    assert not site.ping(site.left, "10.2.0.2")
    assert site.counter("blocked_dropped") == 1
    assert arrived(tap, socket.inet_aton("10.1.0.2")) == 0
    tap.close()


def test_a_fail_open_policy_passes_in_clear_without_a_listener_and_in_a_block(site: Site) -> None:
    site.load(policy(1, A4, B4, fail_open=True), listen=False)
    assert site.answers(site.left, "10.2.0.2")
    site.gw.call(site.loader.block)
    assert site.answers(site.left, "10.2.0.2")


def test_a_replaced_packet_never_leaves_but_its_flow_is_confirmed(site: Site) -> None:
    site.gw.nft("table inet operator { chain c { type filter hook forward priority 0; ct state new counter; }; }")
    site.load(policy(1, A4, B4))

    def steal(packet: Any) -> None:
        packet.set_mark(STOLEN)
        packet.accept()

    queues(site).answer = steal
    tap = wire(site)
    with site.left.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"this must not be seen", ("10.2.0.2", 4242))
    queues(site).take()
    assert site.counter("stolen") == 1
    assert arrived(tap, b"this must not be seen") == 0
    tap.close()
    listing = site.gw.run("conntrack", "-L", "-p", "udp", "--dport", "4242").stdout
    assert "src=10.1.0.2 dst=10.2.0.2" in listing


def test_an_unguarded_and_a_renamed_device_drop_protected_traffic(site: Site) -> None:
    site.load(policy(1, A4, B4), guard=False)
    assert not site.ping(site.left, "10.2.0.2")
    assert (site.counter("out_unguarded_dropped"), queues(site).seen) == (1, [])

    def guard() -> None:
        watcher = LinkWatcher()
        assert site.loader.guard({link.index: link.name for link in watcher.links.values()}) == []
        watcher.close()

    site.gw.call(guard)
    site.ping(site.left, "10.2.0.2")
    queues(site).take()
    site.gw.run("ip", "link", "set", "wan", "name", "other")
    assert not site.ping(site.left, "10.2.0.2")
    assert (site.counter("out_unguarded_dropped"), queues(site).seen) == (2, [])
    site.gw.call(guard)
    assert site.gw.call(site.loader.is_loaded)
    site.ping(site.left, "10.2.0.2")
    queues(site).take()


def test_clear_packets_that_inbound_policy_wants_protected_die_in_the_kernel(site: Site) -> None:
    site.load(
        policy(1, B4, A4, direction=Direction.IN), policy(2, B6, A6, direction=Direction.IN, level=Level.USE),
        policy(3, "10.2.0.2/32", "10.2.0.1/32", direction=Direction.IN, action=Action.DISCARD),
    )  # fmt: skip
    assert not site.ping(site.right, "10.1.0.2")
    assert site.counter("in_clear_dropped") == 1
    assert site.answers(site.right, "fd00:1::2"), "use is not enforced inbound"
    assert not site.ping(site.right, "10.2.0.1")
    assert site.counter("in_discard_dropped") == 1
    assert queues(site).seen == []


def test_the_first_match_of_the_spd_decides_with_ports_ranges_and_prefixes(site: Site) -> None:
    udp = {"protocol": 17}
    site.load(
        policy(1, A4, B4, action=Action.NONE, dport_first=1000, dport_last=2047, **udp),
        policy(2, A4, "10.2.0.2/32", action=Action.DISCARD, sport_first=7000, sport_last=7000, **udp),
        policy(3, "10.0.0.0/8", "10.2.0.0/16", **udp),
        policy(
            4, "0.0.0.0/0", "0.0.0.0/0", action=Action.DISCARD, protocol=1, sport_first=8, sport_last=8, dport_last=255
        ),
    )  # fmt: skip
    tap = wire(site)
    for sport, dport, text in (
        (9, 999, b"to queue a"), (9, 1000, b"clear a"), (9, 2047, b"clear b"), (9, 2048, b"to queue b"),
        (7000, 1500, b"clear c"), (7000, 2500, b"discarded"), (7001, 2500, b"to queue c"),
    ):  # fmt: skip
        site.send(site.left, IP(src="10.1.0.2", dst="10.2.0.2") / UDP(sport=sport, dport=dport) / text)
    assert [packet[28:] for _, packet in queues(site).take(3)] == [b"to queue a", b"to queue b", b"to queue c"]
    assert arrived(tap, b"clear ") == 3
    assert site.counter("out_discard_dropped") == 1
    assert not site.ping(site.left, "10.2.0.2")
    assert site.counter("out_discard_dropped") == 2
    tap.close()


def test_inbound_ipsec_is_steered_by_its_outermost_spi(site: Site) -> None:
    site.load(policy(1, "0.0.0.0/0", "0.0.0.0/0", direction=Direction.IN))
    for spi in range(0x1000, 0x1000 + 18):
        number = spi.to_bytes(4, "big")
        ah = b"\x06\x04\0\0" + number + bytes(16)
        for protocol, body in ((50, number + bytes(24)), (51, ah), (108, b"\x06\0" + number[2:] + bytes(8))):
            v4 = IP(src="10.2.0.2", dst="10.1.0.1", proto=protocol) / Raw(body)
            v6 = IPv6(src="fd00:2::2", dst="fd00:1::1", nh=protocol) / Raw(body)
            for packet in (v4, v6):
                site.send(site.right, packet)
                assert [queue for queue, _ in queues(site).take()] == [inbound_queue(spi, 3)], (spi, protocol, packet)
    assert site.counter("in_clear_dropped") == 0


def test_ah_behind_ipv6_extension_headers_is_found(site: Site) -> None:
    site.load()
    body = Raw(b"\x06\x04\0\0" + (0x1007).to_bytes(4, "big") + bytes(16))
    packet = IPv6(src="fd00:2::2", dst="fd00:2::1") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(nh=51) / body
    site.send(site.right, packet)
    assert [queue for queue, _ in queues(site).take()] == [inbound_queue(0x1007, 3)]


def test_forwarded_ipsec_of_others_is_left_alone(site: Site) -> None:
    site.load()
    tap = wire(site)
    site.send(site.left, IP(src="10.1.0.2", dst="10.2.0.2", proto=50) / Raw(b"\0\0\x10\0somebody else's"))
    wait_for(lambda: arrived(tap, b"somebody else's"), "the forwarded packet")
    assert queues(site).seen == []
    tap.close()


def test_esp_in_udp_is_queued_while_ike_stays_and_keepalives_go(site: Site) -> None:
    site.load()
    with site.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as ike:
        ike.bind(("10.2.0.1", 4500))
        ike.settimeout(2)
        for body in (b"\xff", bytes(4) + b"IKE message", (0x1235).to_bytes(4, "big") + bytes(28)):
            site.send(site.right, IP(src="10.2.0.2", dst="10.2.0.1") / UDP(sport=4500, dport=4500) / Raw(body))
        assert [queue for queue, _ in queues(site).take()] == [inbound_queue(0x1235, 3)]
        assert ike.recv(100) == bytes(4) + b"IKE message"
    assert site.counter("natt_keepalives") == 1


def test_icmp_too_big_about_our_packets_goes_to_worker_0_and_others_to_the_kernel(site: Site) -> None:
    site.load()
    ours = (
        IP(src="10.2.0.1", dst="10.9.0.1", proto=50) / Raw(bytes(24)),
        IP(src="10.2.0.1", dst="10.9.0.1") / UDP(sport=4500, dport=4500) / Raw(bytes(24)),
    )
    other = IP(src="10.2.0.1", dst="10.9.0.1") / UDP(sport=53, dport=4500) / Raw(bytes(24))
    for quoted in (*ours, other):
        error = IP(src="10.2.0.2", dst="10.2.0.1") / ICMP(type=3, code=4, nexthopmtu=1300)
        site.send(site.right, error / Raw(bytes(quoted)[:28]))
    site.send(site.right, IP(src="10.2.0.2", dst="10.2.0.1") / ICMP(type=3, code=3) / Raw(bytes(ours[0])[:28]))
    for quoted in (
        IPv6(src="fd00:2::1", dst="fd00:9::1", nh=50) / Raw(bytes(24)),
        IPv6(src="fd00:2::1", dst="fd00:9::1") / UDP(sport=4500, dport=4500) / Raw(bytes(24)),
        IPv6(src="fd00:2::1", dst="fd00:9::1") / UDP(sport=53, dport=53) / Raw(bytes(24)),
        IPv6(src="fd00:2::1", dst="fd00:9::1") / IPv6ExtHdrFragment(nh=50, m=1) / Raw(bytes(24)),
        IPv6(src="fd00:2::1", dst="fd00:9::1") / IPv6ExtHdrDestOpt(nh=50) / Raw(bytes(24)),
    ):
        error = IPv6(src="fd00:2::2", dst="fd00:2::1") / ICMPv6PacketTooBig(mtu=1300)
        site.send(site.right, error / Raw(bytes(quoted)))
    got = queues(site).take(6)
    assert [(queue, packet[0] >> 4) for queue, packet in got] == [(0, 4), (0, 4), (0, 6), (0, 6), (0, 6), (0, 6)]
    assert [packet[54] for _, packet in got[2:]] == [50, 17, 44, 60]


def test_fragments_arrive_at_the_workers_as_whole_datagrams_in_both_directions(site: Site) -> None:
    site.load(policy(1, A4, B4, protocol=17, dport_first=9, dport_last=9))
    with site.left.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(bytes(3600), ("10.2.0.2", 9))  # the listener's buffer holds 4096 octets
    assert [len(packet) for _, packet in queues(site).take()] == [3628]
    whole = IP(src="10.2.0.2", dst="10.2.0.1", proto=50, id=7) / Raw(b"\0\0\x10\0" + bytes(3500))
    for fragment in whole.fragment(1400):
        site.send(site.right, fragment)
    assert [len(packet) for _, packet in queues(site).take()] == [20 + 3504]


def test_def_policy_discard_drops_what_no_policy_names_but_not_discovery_loopback_and_bypass(site: Site) -> None:
    knobs = Sysctl({"net.inet.ipsec.def_policy": 0, "net.inet6.ipsec6.def_policy": 0})
    site.load(
        policy(1, A4, B4, action=Action.NONE),
        policy(2, B4, A4, action=Action.NONE, direction=Direction.IN),
        sysctl=Sysctl({"net.inet.ipsec.def_policy": 0}),
    )
    assert not site.ping(site.left, "10.2.0.2"), "the request is not named inbound"
    assert site.counter("in_default_dropped") == 1
    assert site.answers(site.left, "fd00:2::2"), "the other family has its own default"
    site.gw.run("ip", "neigh", "flush", "all")
    assert site.gw.run("ping", "-c1", "-W1", "127.0.0.1", check=False).returncode == 0
    site.gw.call(lambda: site.loader.update([], knobs))
    assert not site.ping(site.left, "fd00:2::2")
    site.gw.call(lambda: site.loader.update(_both_ways(), knobs))
    assert site.answers(site.left, "10.2.0.2")
    assert site.answers(site.left, "fd00:2::2"), "neighbour discovery is exempt"
    with site.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as ike, site.right.socket(
        socket.AF_INET, socket.SOCK_DGRAM
    ) as peer:
        for sock, address in ((ike, "10.2.0.1"), (peer, "10.2.0.2")):
            sock.bind((address, 500))
            sock.settimeout(0.3)
        peer.sendto(b"before", ("10.2.0.1", 500))
        with pytest.raises(TimeoutError):
            ike.recv(100)
        ike.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, SETTINGS.mark_done)
        for sock in (ike, peer):
            sock.settimeout(5)
        peer.sendto(b"bypass", ("10.2.0.1", 500))
        assert ike.recv(100) == b"bypass"
        ike.sendto(b"answer", ("10.2.0.2", 500))
        assert peer.recv(100) == b"answer"


def _both_ways() -> list[Policy]:
    return [
        policy(number, *ends, direction=direction, action=Action.NONE)
        for number, (ends, direction) in enumerate(
            (
                (ends, direction)
                for pair in ((A4, B4), (A6, B6))
                for ends in (pair, pair[::-1])
                for direction in (Direction.IN, Direction.OUT)
            ),
            1,
        )
    ]


def test_a_foreign_flush_is_noticed_and_foreign_tables_are_never_touched(site: Site) -> None:
    site.gw.nft("table inet operator { counter c { packets 5 bytes 6 }; chain c { type nat hook output priority 0; };}")
    before = site.gw.run("nft", "list", "table", "inet", "operator").stdout
    site.load(policy(1, A4, B4))
    site.gw.call(lambda: site.loader.update([policy(2, A4, B4)], Sysctl()))
    assert site.gw.run("nft", "list", "table", "inet", "operator").stdout == before
    watch = site.gw.call(site.loader.watch)
    assert site.gw.call(site.loader.is_loaded)
    site.gw.run("nft", "flush", "ruleset")
    assert select.select([watch], [], [], 1)[0]
    assert watch.drain()
    assert not site.gw.call(site.loader.is_loaded)
    site.load(policy(1, A4, B4), listen=False)
    site.ping(site.left, "10.2.0.2")
    queues(site).take()
    site.gw.nft("flush chain inet ipsecq_t postrouting")
    assert not site.gw.call(site.loader.is_loaded)
    site.gw.call(site.loader.remove)
    assert site.gw.run("nft", "list", "tables").stdout == ""
    watch.close()


def test_after_a_foreign_flush_the_sentinel_still_blocks_what_must_be_protected(site: Site) -> None:
    site.loader.sentinel = site.gw.call(lambda: Sentinel(SETTINGS))
    use = policy(3, A4, "10.2.0.1/32", level=Level.USE)
    site.load(use, policy(1, A4, B4), policy(2, A6, B6), policy(4, B6, A6, direction=Direction.IN))
    site.gw.run("nft", "flush", "ruleset")
    tap = wire(site)
    assert not site.ping(site.left, "10.2.0.2")
    assert not site.ping(site.left, "fd00:2::2")
    assert not site.ping(site.right, "fd00:1::2")
    assert arrived(tap, socket.inet_aton("10.1.0.2")) == 0
    assert site.answers(site.left, "10.2.0.1"), "what no policy requires to be protected passes"
    site.gw.call(lambda: site.loader.update([policy(5, A6, B6, action=Action.NONE)], Sysctl()))
    assert site.answers(site.left, "fd00:2::2"), "the sentinel follows"
    tap.close()
    site.gw.call(site.loader.remove)
    assert site.gw.run("nft", "list", "tables").stdout == ""


def test_the_sentinel_drops_replaced_originals_and_lets_what_we_sent_pass(site: Site) -> None:
    site.loader.sentinel = site.gw.call(lambda: Sentinel(SETTINGS))
    site.load(policy(1, A4, B4))

    tap = wire(site)

    def flush_while_a_packet_is_in_our_hands(packet: Any) -> None:
        site.gw.run("nft", "flush", "ruleset")
        packet.set_mark(STOLEN)
        packet.accept()  # the kernel dropped it with the hook

    queues(site).answer = flush_while_a_packet_is_in_our_hands
    site.send(site.left, IP(src="10.1.0.2", dst="10.2.0.2") / UDP(dport=9) / Raw(b"this must not be seen"))
    queues(site).take()
    for mark, body in ((STOLEN, b"neither this"), (SETTINGS.mark_done, b"sent by us")):
        with site.gw.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            sock.sendto(body, ("10.2.0.2", 9))
    seen: list[bytes] = []

    def ours() -> bool:
        seen.extend(frames(tap))
        return any(b"sent by us" in frame for frame in seen)

    wait_for(ours, "our own packet")
    assert not [frame for frame in seen if b"this" in frame]
    listing = site.gw.run("nft", "list", "counters").stdout
    assert re.search(r"counter stolen {\s*packets 1 ", listing)
    tap.close()


def test_updates_leave_the_kernel_as_a_fresh_load_of_the_same_policies_would(site: Site) -> None:
    rounds = [
        [policy(1, A4, B4), policy(2, "10.0.0.0/8", B4, action=Action.DISCARD)],
        [policy(3, A4, "10.2.0.2/32", action=Action.NONE, priority=-5), policy(1, A4, B4), policy(4, A6, B6)],
        [policy(1, A4, B4, peer=b"\xcb\0\x71\x09"), policy(4, A6, B6, protocol=17, dport_first=5, dport_last=9)],
        [policy(n, f"10.1.{n}.0/24", B4) for n in range(1, 50)],
        [],
        [policy(7, A4, B4, direction=Direction.IN, protocol=1, sport_first=8, sport_last=8)],
    ]

    def contents() -> list[str]:
        text = site.gw.run("nft", "-s", "list", "table", "inet", SETTINGS.table).stdout
        lines = (line.strip().removesuffix(",").removeprefix("elements = { ") for line in text.splitlines())
        return sorted(line.removesuffix(" }") for line in lines if "comment" in line)

    site.load(listen=False)
    for policies in rounds:
        site.gw.call(lambda policies=policies: site.loader.update(policies, Sysctl()))  # type: ignore[misc]
        updated = contents()
        assert site.gw.call(site.loader.is_loaded)
        site.gw.call(lambda policies=policies: site.loader.replace(policies, Sysctl()))  # type: ignore[misc]
        assert updated == contents()


def test_one_change_among_many_policies_is_applied_at_once(site: Site) -> None:
    many = [
        policy(n + 1, f"10.{100 + (n >> 8)}.{n & 255}.0/24", f"172.16.{n >> 8}.{n & 255}/32") for n in range(10000)
    ]
    site.load(*many, listen=False)
    times = []
    for number in range(1, 6):
        start = time.perf_counter()
        site.gw.call(lambda number=number: site.loader.update(many[number:], Sysctl()))  # type: ignore[misc]
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5  # what grew with the policies would be slow each time


@pytest.mark.parametrize("example", sorted(Path("nftables").glob("*.nft")), ids=lambda path: path.name)
def test_every_example_loads_twice(site: Site, example: Path) -> None:
    for _ in range(2):
        site.gw.run("nft", "-c", "-f", str(example))
        site.gw.run("nft", "-f", str(example))


def test_detect_finds_a_way_to_queue_and_leaves_nothing_behind(site: Site) -> None:
    found = site.gw.call(detect)
    assert found.mechanism
    assert found.egress
    assert found.scratch
    assert site.gw.run("nft", "list", "tables").stdout == ""


def test_doctor_finds_strict_rp_filter_missing_forwarding_and_flowtables(site: Site) -> None:
    def bad() -> set[tuple[Grade, str]]:
        return {(f.grade, f.subject) for f in site.gw.call(lambda: examine(SETTINGS)) if f.grade != Grade.OK}

    assert bad() <= {(Grade.WARN, "clock")}
    site.gw.sysctl("net.ipv4.conf.all.rp_filter", 1)
    site.gw.sysctl("net.ipv4.conf.default.rp_filter", 0)
    site.gw.sysctl("net.ipv4.ip_forward", 0)
    site.gw.nft("table inet x { chain late { type filter hook postrouting priority 200; }; }")
    assert bad() >= {(Grade.FAIL, "rp_filter"), (Grade.WARN, "forwarding"), (Grade.WARN, "hooks")}


def test_a_chain_that_is_not_ours_of_the_same_name_elsewhere_is_no_obstacle(site: Site) -> None:
    site.gw.nft("table ip ipsecq_t { chain prerouting { type filter hook prerouting priority 0; }; }")
    site.load(policy(1, A4, B4), listen=False)
    assert "table ip ipsecq_t" in site.gw.run("nft", "list", "tables").stdout


def test_nft_errors_are_one_line(site: Site) -> None:
    from ipsecq.errors import NetfilterError
    from ipsecq.netfilter.load import run_nft

    with pytest.raises(NetfilterError) as caught:
        site.gw.call(lambda: run_nft("add rule inet nowhere c drop\n"))
    assert "\n" not in str(caught.value)
    assert "No such file" in str(caught.value)
    assert subprocess.run(["nft", "list", "table", "inet", SETTINGS.table], capture_output=True, check=False).returncode
