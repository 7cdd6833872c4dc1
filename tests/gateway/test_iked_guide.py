"""docs/iked.md, block by block: what it tells to write is written, what it tells to run is run."""

import re
import socket
import subprocess
from pathlib import Path

import pytest

from ipsecq.lab import iked
from ipsecq.lab.capture import Capture, in_clear
from ipsecq.lab.gateway import Gateway, start_all
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.topology import build, firewall
from ipsecq.lab.traffic import ping

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(iked.missing()), reason=iked.missing() or "-")]
GUIDE = Path(__file__).parents[2] / "docs" / "iked.md"


def block(title, after=""):
    """The indented block that begins with ``# title``, below the heading ``after``."""
    text = GUIDE.read_text()
    text = text[text.index(after) :]
    lines = text[text.index(f"    # {title}\n") :].splitlines()[1:]
    found = []
    for line in lines:
        if (line and not line.startswith("    ")) or line.startswith(("    # /etc/iked.conf", "    # setkey.conf")):
            break
        found.append(line[4:])
    return "\n".join(found).rstrip() + "\n"


@pytest.fixture
def world():
    with Lab() as lab:
        network = build(lab, router=True)
        gateways = []
        for site in network.sites:
            firewall(site)
            gateways.append(Gateway(site.gateway, "", workers=1, settings="\n" + block("ipsecq.toml")))
        start_all(gateways)
        yield network, gateways


def established(gateways):
    wait_for(lambda: all(len(iked.sas(gateway)) == 2 for gateway in gateways), "SAs at both ends", 20)
    wait_for(lambda: all(gateway.status()["policy_count"] >= 2 for gateway in gateways), "policies at both ends", 10)


def test_site_to_site_with_a_key_and_a_restart_of_each_part(world):
    """A restart of ipsecq ends iked, which its unit starts again; the far end takes the new tunnel for the old one."""
    network, gateways = world
    section = "## Site to site"
    two = iked.Iked(gateways[1], block("/etc/iked.conf on gw2", section)).start()
    one = iked.Iked(gateways[0], block("/etc/iked.conf on gw1", section)).start()
    established(gateways)

    def crosses(wait=5.0):
        return ping(network.one.host, network.two.host4, count=3, wait=wait) == 3

    wait_for(lambda: crosses(0.5), "the rules at both ends", 10)
    before = gateways[0].status()["sas"]
    one.ctl("reload")
    two.ctl("reload")
    assert crosses()
    assert {sa["spi"] for sa in gateways[0].status()["sas"]} == {sa["spi"] for sa in before}

    one.stop()
    one.start()
    wait_for(lambda: crosses(0.5), "a tunnel after iked's restart", 20)

    gateways[0].stop()
    wait_for(lambda: one.process.poll() is not None, "the end of iked, whose daemon has gone", 5)
    gateways[0].start()
    one.start()
    wait_for(lambda: crosses(0.5), "a tunnel after the daemon's restart", 20)
    established(gateways)


def test_road_warrior_with_certificates_behind_nat(world, tmp_path):
    network, gateways = world
    network.router.nft("""table ip nat {
        chain postrouting { type nat hook postrouting priority srcnat; ip saddr 192.0.2.1 oifname right masquerade; }
    }""")
    subprocess.run(["sh", "-ec", block("on the machine with the CA")], cwd=tmp_path, check=True, capture_output=True)
    section = "## Road warrior"
    names = ("laptop", "gw2")
    ends = []
    for name, gateway in zip(names, gateways, strict=True):
        place = gateway.directory / "iked"
        for below in ("ca", "certs", "crls", "private", "pubkeys/fqdn"):
            (place / below).mkdir(parents=True)
        script = block("on each machine, with its own name").replace("/etc/iked/", f"{place}/")
        subprocess.run(["sh", "-ec", f"name={name}\n{script}"], cwd=tmp_path, check=True)
        ends.append(iked.Iked(gateway, block(f"/etc/iked.conf on {name}", section), place))
    network.one.gateway.run("sh", "-ec", block("on the laptop"))
    for end in reversed(ends):
        end.start()
    established(gateways)
    address = wait_for(
        lambda: re.search(r"inet (10\.9\.0\.\d+)", network.one.gateway.run("ip", "addr", "show", "vpn0").stdout),
        "the laptop's address", 5,
    )[1]  # fmt: skip
    laptop, server = network.one.gateway, network.two.host4
    wait_for(lambda: ping(laptop, server, source=address, count=20, wait=1, enough=1), "the rules at both ends", 10)
    assert ping(laptop, server, source=address) == 3
    assert all(sa["natt"] for gateway in gateways for sa in iked.sas(gateway))


def test_two_blocks_for_the_same_networks_share_their_flows_and_neither_end_falls_back_to_clear():
    section = "## Several SAs for the same networks"
    with Lab() as lab:
        network = build(lab, router=True)
        one, two = network.sites
        gateways = [
            Gateway(
                site.gateway, block(f"setkey.conf on gw{site.number}", section), daemon="parallel_sas = true",
                settings="\n" + block("ipsecq.toml"),
            )
            for site in network.sites
        ]  # fmt: skip
        start_all(gateways)
        daemons = [
            iked.Iked(gateways[site.number - 1], block(f"/etc/iked.conf on gw{site.number}", section)).start()
            for site in (two, one)
        ]
        wait_for(lambda: all(len(iked.sas(gateway)) == 4 for gateway in gateways), "two SAs each way at both ends", 20)
        wait_for(lambda: ping(one.host, two.host4, count=20, wait=1, enough=1), "the rules at both ends", 10)
        for port in range(24):
            with one.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((one.host4, 20000 + port))
                sender.sendto(b"a flow of its own", (two.host4, 9))
        for gateway in gateways:
            wait_for(
                lambda gateway=gateway: all(sa["packets"] for sa in iked.sas(gateway) if sa["src"] == one.wan4),
                "a share of the flows for each SA", 5,
            )  # fmt: skip
        with Capture(network.router, "left") as wire:
            daemons[1].ctl("reset", "id", "FQDN/gw2b")
            daemons[1].ctl("reset", "id", "FQDN/gw2a")
            wait_for(lambda: all(gateway.status()["policy_count"] == 2 for gateway in gateways), "no policy of iked's", 10)
            assert ping(one.host, two.host4, count=2, wait=0.2) == 0
            assert ping(two.host, one.host4, count=2, wait=0.2) == 0
            wire.settle()
        assert in_clear(wire.frames(), one.lan4, two.lan4) == []
