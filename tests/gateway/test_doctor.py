"""``ipsecq doctor`` on a live gateway: each common fault is made for real, found under its name, and gone when mended.

The faults of one world follow one another and each is undone, but counters stay: what was counted in one fault may
still be reported in the next.
"""

import json
import os
import signal
import socket

import pytest

from ipsecq.cli.examination import findings
from ipsecq.lab.capture import Capture, inject
from ipsecq.lab.netns import wait_for
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root


def examined(gateway, *, probe=False):
    """The findings that are not well: (grade, subject) to the last such message."""
    found = gateway.space.call(lambda: findings(gateway.config, probe=probe))
    assert all(each.mend for each in found if each.grade != "ok")
    return {(str(each.grade), each.subject): each.message for each in found if each.grade != "ok"}


def awaited(gateway, what):
    """The message to a finding, which comes when the packets that show the fault have been counted."""
    return wait_for(lambda: examined(gateway).get(what), f"{what}", 10, every=0.2)


def subjects(gateway):
    return set(examined(gateway))


def setkey(gateway, text):
    gateway.command("setkey", "-c", stdin=text)


@pytest.fixture(scope="module")
def one(tunnel_net):
    return tunnel_net.one


def test_a_healthy_gateway_has_nothing_to_mend(tunnel_net, one):
    sites = tunnel_net.network.sites
    for version in (4, 6):
        assert ping(sites[0].host, sites[1].host_address(version)) == 3
    done = one.command("doctor", "--json")
    assert {each["subject"] for each in json.loads(done.stdout) if each["grade"] != "ok"} <= {"clock"}


def test_esp_eaten_on_the_way_is_told_from_silence(tunnel_net):
    """A fresh pair of SAs, whose packets the router drops in one direction."""
    world, router = tunnel_net, tunnel_net.network.router
    near, far = world.network.sites
    router.nft("table ip eats { chain f { type filter hook forward priority 0; ip daddr 192.0.2.1 ip protocol 50 drop; }; }")
    old = [line for line in world.tunnel.lines if near.wan4 in line and far.wan4 in line]
    spis = [world.tunnel.spi_from(each, 4) for each in (near, far)]
    fresh = [line.replace(f"0x{spi:x}", f"0x{spi + 0x100:x}") for line, spi in zip(old, spis, strict=True)]
    gone = [
        f"delete {a.wan4} {b.wan4} esp 0x{spi:x};" for a, b, spi in ((near, far, spis[0]), (far, near, spis[1]))
    ]  # fmt: skip
    for gateway in world.gateways:
        setkey(gateway, "\n".join(gone + fresh))
    ping(near.host, far.host4, wait=0.2, count=4)
    awaited(world.one, ("warn", "one way"))
    router.run("nft", "delete", "table", "ip", "eats")
    assert ping(near.host, far.host4) == 3
    assert ("warn", "one way") not in subjects(world.one)
    back = [line.replace("add", "delete").split(" -m")[0] + ";" for line in fresh]
    for gateway in world.gateways:
        setkey(gateway, "\n".join(back + old))


SYSCTLS = {
    "strict rp_filter": ("net.ipv4.conf.all.rp_filter", 1, 0, ("fail", "rp_filter")),
    "forwarding off": ("net.ipv4.ip_forward", 0, 1, ("warn", "forwarding")),
}


@pytest.mark.parametrize("fault", SYSCTLS)
def test_a_setting_of_the_kernel_that_is_in_the_way_is_found(tunnel_net, one, fault):
    name, wrong, right, expected = SYSCTLS[fault]
    space = tunnel_net.network.one.gateway
    space.sysctl(name, wrong)
    found = subjects(one)
    space.sysctl(name, right)
    assert expected in found
    assert expected not in subjects(one)


RULES = {
    "source NAT behind the policies": (
        "chain x { type nat hook postrouting priority 200; masquerade;\n}", ("warn", "hooks")),
    "a chain that takes packets before the policies": (
        "chain x { type filter hook prerouting priority -300; ip protocol esp drop;\n}", ("warn", "hooks")),
    "masquerading of everything": (
        'chain x { type nat hook postrouting priority 99; oifname "wan" masquerade;\n}', ("warn", "source NAT")),
    "a filter that knows nothing of enc0": (
        'chain x { type filter hook forward priority 1; policy drop; ct state established,related accept; '
        'iifname "lan" accept;\n}', ("warn", "filter")),
    "ICMP errors dropped": (
        "chain x { type filter hook input priority 1; meta l4proto icmp drop;\n}", ("warn", "icmp")),
}  # fmt: skip


@pytest.mark.parametrize("fault", RULES)
def test_a_foreign_rule_that_is_in_the_way_is_found(tunnel_net, one, fault):
    text, expected = RULES[fault]
    space = tunnel_net.network.one.gateway
    space.nft(f"table inet foreign {{\n{text}\n}}\n")
    found = subjects(one)
    space.run("nft", "delete", "table", "inet", "foreign")
    assert expected in found
    assert expected not in subjects(one)


def test_missing_and_misled_routes_are_found(tunnel_net, one):
    near, far = tunnel_net.network.sites
    space = near.gateway
    space.run("ip", "route", "add", far.lan4, "dev", "enc0")
    assert ("fail", "route") in subjects(one)
    space.run("ip", "route", "del", far.lan4)
    space.run("ip", "route", "del", "default")
    messages = examined(one)
    assert "no route to" in messages["fail", "route"]
    space.run("ip", "route", "add", "default", "via", "192.0.2.254")
    assert ("fail", "route") not in subjects(one)


def test_a_black_hole_for_large_packets_is_found_with_its_size(tunnel_net, one):
    router = tunnel_net.network.router
    router.nft(
        "table inet hole { chain f { type filter hook forward priority 0; ip daddr 198.51.100.1 ip length > 1300 drop; }; }"
    )
    found = examined(one, probe=True)
    router.run("nft", "delete", "table", "inet", "hole")
    assert "black hole" in found["fail", "mtu"]
    size = int(found["fail", "mtu"].split(" octets")[0].rsplit(" ", 1)[1])
    assert 1290 <= size <= 1300


def test_a_peer_that_does_not_answer_is_named(tunnel_net, one):
    space = tunnel_net.network.two.gateway
    space.nft("table inet silent { chain i { type filter hook input priority 0; meta l4proto icmp drop; }; }")
    found = examined(one, probe=True)
    space.run("nft", "delete", "table", "inet", "silent")
    assert tunnel_net.network.two.wan4 in found["warn", "peer"]


def test_offloads_that_are_off_are_found(tunnel_net, one):
    space = tunnel_net.network.one.gateway
    space.run("ethtool", "-K", "wan", "gso", "off")
    found = subjects(one)
    space.run("ethtool", "-K", "wan", "gso", "on")
    assert ("warn", "offload") in found
    assert ("warn", "offload") not in subjects(one)


def test_wrong_keys_in_one_direction_are_told_from_damage(tunnel_net):
    """Gateway 2 sends with a key that gateway 1 doesn't have; a single damaged packet later is no such thing."""
    world = tunnel_net
    near, far = world.network.sites
    spi = world.tunnel.spi_from(far, 4)
    line = next(each for each in world.tunnel.lines if f"0x{spi:x} " in each)
    fresh = line.replace(f"0x{spi:x} ", f"0x{spi + 0x200:x} ")
    wrong = fresh[: fresh.rindex("0x")] + "0x" + "ab" * 20 + ";"
    delete = f"delete {far.wan4} {near.wan4} esp 0x{spi:x};"
    setkey(world.one, delete + fresh)
    setkey(world.two, delete + wrong)
    ping(far.host, near.host4, wait=0.2)
    assert "not one packet is authentic" in awaited(world.one, ("fail", "keys"))
    again = f"delete {far.wan4} {near.wan4} esp 0x{spi + 0x200:x};" + line
    for gateway in world.gateways:
        setkey(gateway, again)
    assert ("fail", "keys") not in subjects(world.one)


def test_replayed_packets_are_reported_with_the_window(tunnel_net):
    world = tunnel_net
    near, far = world.network.sites
    with Capture(world.network.router, "left") as wire:
        assert ping(near.host, far.host6, count=1) == 1
        wire.settle()
    frame = next(each for each in wire.frames() if each.esp and each.dst == near.wan6)
    inject(world.network.router, "left", frame.data)
    assert "256 packets" in awaited(world.one, ("warn", "replay"))


def test_missing_sas_are_found_at_both_ends(tunnel_net):
    world = tunnel_net
    near, far = world.network.sites
    spi = world.tunnel.spi_from(far, 4)
    line = next(each for each in world.tunnel.lines if f"0x{spi:x} " in each)
    setkey(world.one, f"delete {far.wan4} {near.wan4} esp 0x{spi:x};")
    ping(far.host, near.host4, wait=0.2)
    awaited(world.one, ("warn", "unknown SPI"))
    setkey(world.two, f"delete {far.wan4} {near.wan4} esp 0x{spi:x};")
    assert ("warn", "no SA") in subjects(world.two)  # nobody has needed it yet
    ping(far.host, near.host4, wait=0.2, count=1)
    awaited(world.two, ("fail", "no SA"))
    for gateway in world.gateways:
        setkey(gateway, line)
    assert ping(far.host, near.host4) == 3
    assert not {("warn", "no SA"), ("fail", "no SA")} & subjects(world.two)


def test_udp_encapsulation_at_one_end_only_is_found(tunnel_net):
    world = tunnel_net
    near, far = world.network.sites
    spi = world.tunnel.spi_from(far, 4)
    line = next(each for each in world.tunnel.lines if f"0x{spi:x} " in each)
    delete = f"delete {far.wan4} {near.wan4} esp 0x{spi:x};"
    in_udp = line.replace(" -m tunnel", f" -m tunnel -natt {far.wan4}[4500] {near.wan4}[4500]")
    setkey(world.two, delete + in_udp)
    ping(far.host, near.host4, wait=0.2)
    awaited(world.one, ("fail", "NAT-T"))
    setkey(world.two, delete + line)


def test_a_protocol_that_is_switched_off_is_found(tunnel_net):
    world = tunnel_net
    near, far = world.network.sites
    world.one.command("sysctl", "net.inet.esp.esp_enable=0")
    ping(near.host, far.host4, wait=0.2, count=1)
    found = subjects(world.one)
    world.one.command("sysctl", "net.inet.esp.esp_enable=1")
    assert ("fail", "switched off") in found
    assert ("fail", "switched off") not in subjects(world.one)


def test_policies_that_do_not_mirror_and_ends_that_are_not_here_are_found(tunnel_net, one):
    setkey(one, "spdadd 10.1.0.0/24 10.9.0.0/24 any -P out ipsec esp/tunnel/192.0.2.1-198.51.100.1/require;")
    found = examined(one)
    assert "10.9.0.0/24" in found["warn", "mirror"]
    setkey(one, "spddelete 10.1.0.0/24 10.9.0.0/24 any -P out;")
    setkey(one, "spdadd 10.1.0.0/24 10.9.0.0/24 any -P out ipsec esp/tunnel/192.0.2.77-198.51.100.1/require;"
                "spdadd 10.9.0.0/24 10.1.0.0/24 any -P in ipsec esp/tunnel/192.0.2.77-198.51.100.1/require;")  # fmt: skip
    found = examined(one)
    assert "192.0.2.77" in found["fail", "tunnel ends"]
    assert ("fail", "mirror") in found
    setkey(one, "spddelete 10.1.0.0/24 10.9.0.0/24 any -P out; spddelete 10.9.0.0/24 10.1.0.0/24 any -P in;")
    assert not {subject for _, subject in subjects(one)} & {"mirror", "tunnel ends"}


def test_another_sa_than_policy_wants_is_found(tunnel_net):
    world = tunnel_net
    near, far = world.network.sites
    rule = f"{far.lan4} {near.lan4} icmp -P in"
    setkey(world.one, f"spdadd {rule} prio high ipsec ah/tunnel/{far.wan4}-{near.wan4}/require;")
    ping(far.host, near.host4, wait=0.2, count=1)
    awaited(world.one, ("warn", "policy"))
    setkey(world.one, f"spddelete {rule};")


def test_a_lifetime_that_ends_without_successor_is_found(tunnel_net, one):
    key = "0x" + "17" * 20
    setkey(one, f"add 192.0.2.1 203.0.113.9 esp 0x7777 -m tunnel -ls 1 -lh 600 -E aes-gcm-16 {key};")
    wait_for(lambda: ("warn", "expiry") in subjects(one), "the soft lifetime to be found", 15, every=0.5)
    setkey(one, "delete 192.0.2.1 203.0.113.9 esp 0x7777;")


def test_files_that_were_refused_and_keys_that_are_shared_are_found(tunnel_net, one):
    right = one.policy.read_text()
    key = "-m tunnel -E aes-gcm-16 0x" + "18" * 20
    try:
        pair = f"add 192.0.2.1 198.51.100.1 esp 0x8001 {key}; add 198.51.100.1 192.0.2.1 esp 0x8002 {key};"
        one.policy.write_text(right + pair)
        assert ("fail", "shared key") in subjects(one)
        one.policy.write_text("spdadd nonsense;")
        done = one.command("doctor", check=False)
        assert done.returncode == 2
        assert f"{one.policy}:1:" in done.stderr
        one.reload()
        wait_for(lambda: not one.status()["reload"]["success"], "the reload to be refused", 10)
    finally:
        one.policy.write_text(right)
    assert ("warn", "reload") in subjects(one)
    one.command("reload")
    assert ("warn", "reload") not in subjects(one)


def test_a_worker_that_died_and_a_queue_that_overflowed_are_found(tunnel_net):
    world = tunnel_net
    near, far = world.network.sites
    os.kill(world.one.workers()[0], signal.SIGKILL)
    wait_for(lambda: any(w["restarts"] and w["up"] for w in world.one.status()["workers"]), "the restart", 10)
    assert ("warn", "worker") in subjects(world.one)
    stopped = world.one.workers()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)

    def flood():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(40_000):
                sender.sendto(b"x", (far.host4, 9))

    near.host.call(flood)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    awaited(world.one, ("warn", "queue"))


def test_without_a_daemon_doctor_says_so(tunnel_net):
    tunnel_net.two.stop()
    assert ("warn", "daemon") in subjects(tunnel_net.two)
