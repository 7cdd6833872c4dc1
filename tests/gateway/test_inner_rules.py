"""filtertunnel: the operator's rules for what came out of IPsec, the SA in the mark, and variables over a reload."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from world import open_world

from ipsecq.daemon.control import ask
from ipsecq.lab.gateway import Tunnel
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.traffic import ping

pytestmark = pytest.mark.root

EXAMPLES = Path(__file__).parents[2] / "nftables" / "inner.d"
REQIDS = {4: 7, 6: 9}
MARK = 0x0000FF00


class UniqueTunnel(Tunnel):
    """Each IP version has SAs and policies with a reqid of its own."""

    def setkey(self, near):
        text = super().setkey(near)
        lines = []
        for line in text.splitlines():
            reqid = REQIDS[6 if ":" in line else 4]
            lines.append(line.replace("-m tunnel", f"-m tunnel -u {reqid}").replace("/require", f"/unique:{reqid}"))
        return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        yield open_world(lab, tunnel=UniqueTunnel, settings=f"\n[nftables]\nreqid_mark = {MARK}\n")


@pytest.fixture
def rules(world):
    """``rules(name=text, …)`` puts files into inner.d and reloads; afterwards there are none, and knobs are as before."""
    directory = world.one.directory / "inner.d"
    directory.mkdir(exist_ok=True)
    config = world.one.config.read_text()

    def load(*examples, **files):
        for name in examples:
            shutil.copy(EXAMPLES / name, directory)
        for name, text in files.items():
            (directory / f"{name}.nft").write_text(text)
        world.one.command("reload")

    yield load
    for file in directory.iterdir():
        file.unlink()
    world.one.config.write_text(config)
    world.one.command("reload")
    names = ("net.inet.ipsec.filtertunnel=0", "net.inet6.ipsec6.filtertunnel=0", "net.enc.in.ipsec_filter_mask=1")
    world.one.command("sysctl", *names)


def connects(client, server, address, port, patience=5.0):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with server.socket(family, socket.SOCK_STREAM) as listener, client.socket(family, socket.SOCK_STREAM) as caller:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        caller.settimeout(patience)
        try:
            caller.connect((address, port))
        except TimeoutError:
            return False
        return True


def counted(world, name):
    listing = world.network.one.gateway.run("nft", "-j", "list", "counter", "inet", "ipsecq_inner", name).stdout
    return next(each["counter"]["packets"] for each in json.loads(listing)["nftables"] if "counter" in each)


def test_https_from_the_peers_network_is_let_in_and_nothing_else(world, rules):
    one, two = world.network.sites
    rules("20-allow-https.nft")
    assert connects(two.host, one.host, one.host4, 80)
    world.one.command("sysctl", "net.inet.ipsec.filtertunnel=1")
    assert connects(two.host, one.host, one.host4, 443)
    assert not connects(two.host, one.host, one.host4, 80, patience=0.6)
    assert ping(two.host, one.host4, count=1, wait=0.6) == 0
    # Answers to what this side asks are not the peer's idea.
    assert connects(one.host, two.host, two.host4, 80)
    assert counted(world, "https_in") in {1, 2}  # the SYN, and once more when late; with ACK and FIN it were three
    wait_for(lambda: counted(world, "https_refused") >= 2, "what was refused")
    # A family of its own: IPv6 has its own knob.
    assert connects(two.host, one.host, one.host6, 80)


def test_peers_are_counted_each(world, rules):
    one, two = world.network.sites
    rules("10-count-per-peer.nft")
    assert ping(two.host, one.host4, count=3) == 3
    assert counted(world, "branch") == 0
    world.one.command("sysctl", "net.inet.ipsec.filtertunnel=1", "net.inet6.ipsec6.filtertunnel=1")
    assert ping(two.host, one.host4, count=3) == 3
    assert ping(two.host, one.host6, count=2) == 2
    assert ping(one.host, two.host4, count=1) == 1
    assert (counted(world, "branch"), counted(world, "branch6")) == (4, 2)
    sources = one.gateway.run("nft", "list", "set", "inet", "ipsecq_inner", "sources").stdout
    assert f"{two.host4} " in sources


def test_what_no_file_accepts_is_logged_and_dropped(world, rules):
    one, two = world.network.sites
    rules("20-allow-https.nft", "90-log-and-drop.nft")
    world.one.command("sysctl", "net.inet6.ipsec6.filtertunnel=1")
    assert ping(two.host, one.host6, count=1) == 1
    assert not connects(two.host, one.host, one.host6, 443, patience=0.6)
    wait_for(lambda: counted(world, "refused") >= 1, "what was refused")
    assert connects(two.host, one.host, one.host4, 443)
    world.one.command("sysctl", "net.enc.in.ipsec_filter_mask=0")
    assert connects(two.host, one.host, one.host6, 443)


def test_the_mark_tells_the_reqid_of_the_sa(world, rules):
    one, two = world.network.sites
    rules(marks=f"""
counter seven {{ }}
counter nine {{ }}
counter other {{ }}
chain inner {{
    meta mark & {MARK:#x} == {7 << 8:#x} counter name seven return
    meta mark & {MARK:#x} == {9 << 8:#x} counter name nine return
    counter name other
}}
""")
    world.one.command("sysctl", "net.inet.ipsec.filtertunnel=1", "net.inet6.ipsec6.filtertunnel=1")
    assert ping(two.host, one.host4, count=3) == 3
    assert ping(two.host, one.host6, count=2) == 2
    assert [counted(world, name) for name in ("seven", "nine", "other")] == [3, 2, 0]


def test_a_bad_file_is_refused_with_its_line_and_the_old_rules_stay(world, rules):
    one, two = world.network.sites
    rules("20-allow-https.nft")
    world.one.command("sysctl", "net.inet.ipsec.filtertunnel=1")
    bad = world.one.directory / "inner.d" / "50-bad.nft"
    bad.write_text("# comment\nchain inner {\n\tip saddr 10.0.0.0/8 acept\n}\n")
    refused = world.one.command("reload", check=False)
    assert refused.returncode
    assert f"{bad}:3:" in refused.stderr
    assert "syntax error" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not connects(two.host, one.host, one.host4, 80, patience=0.6)
    assert connects(two.host, one.host, one.host4, 443)
    assert not world.one.status()["reload"]["success"]
    # The main rules are mended though the file is still bad, and the operator's with them, as they were.
    one.gateway.run("nft", "delete", "table", "inet", "ipsecq_inner")
    wait_for(lambda: "ipsecq_inner" in one.gateway.run("nft", "list", "tables").stdout, "the table again")
    wait_for(lambda: ping(one.host, two.host4, count=1, wait=1), "the tunnel")
    assert not connects(two.host, one.host, one.host4, 80, patience=0.6)


def test_a_variable_that_was_set_by_hand_survives_a_reload_unless_the_file_says_otherwise(world, rules):
    gateway = world.one
    config = gateway.config

    def value(name):
        return int(gateway.command("sysctl", "-n", name).stdout)

    gateway.command("sysctl", "net.inet.ipsec.dfbit=2", "net.inet.ipsec.ecn=1")
    gateway.command("reload")
    assert (value("net.inet.ipsec.dfbit"), value("net.inet.ipsec.ecn")) == (2, 1)
    before = config.read_text()
    config.write_text(before + '\n[sysctl]\n"net.inet.ipsec.dfbit" = 1\n')
    gateway.command("reload")
    assert (value("net.inet.ipsec.dfbit"), value("net.inet.ipsec.ecn")) == (1, 1)
    config.write_text(before)
    gateway.command("reload")
    assert (value("net.inet.ipsec.dfbit"), value("net.inet.ipsec.ecn")) == (0, 1)
    gateway.command("sysctl", "net.inet.ipsec.ecn=0")


def test_explain_asks_the_running_daemon(world, rules):
    gateway = world.one
    one, two = world.network.sites
    words = ("explain", one.host4, two.host4, "tcp", "40000", "443", "--live")
    told = json.loads(gateway.command(*words, "--json").stdout)
    assert (told["source"], told["verdict"], told["path_mtu"]) == ("daemon", "protected", 1500)
    assert told["kernel"][0] == "postrouting"
    assert told["kernel"][2].startswith("out_ipv4_map_")
    gateway.command("sysctl", "net.inet.esp.esp_enable=0")
    told = json.loads(gateway.command(*words, "--json").stdout)
    assert told["verdict"] == "dropped"
    assert {"name": "net.inet.esp.esp_enable", "value": 0, "meaning": "ESP is off, both ways"} in told["sysctl"]
    assert "protected" in gateway.command(*words[:-1]).stdout  # --config alone: the files
    gateway.command("sysctl", "net.inet.esp.esp_enable=1")
    # What key management changes is there at once, and so is a link's new MTU.
    spi = world.tunnel.spi_from(one, 4)
    ask(gateway.directory / "run" / "control", "setkey",
        text=f"delete {one.wan4} {two.wan4} esp 0x{spi:x};", atomic=True)  # fmt: skip
    told = json.loads(gateway.command(*words, "--json").stdout)
    assert told["verdict"] == "held"
    inbound = gateway.command("explain", two.host4, one.host4, "tcp", "1", "2", "--in", "--live").stdout
    assert "enters only after esp/tunnel" in inbound
    gateway.command("reload")
    assert json.loads(gateway.command(*words, "--json").stdout)["verdict"] == "protected"
