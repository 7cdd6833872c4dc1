"""iked on ipsecq with strongSwan on the Linux kernel's IPsec: other daemon, other stack."""

from types import SimpleNamespace

import pytest
from flow import Flow

from ipsecq.lab import charon, iked
from ipsecq.lab.capture import in_clear, repeated_sequence_numbers
from ipsecq.lab.certificates import Authority
from ipsecq.lab.gateway import Gateway
from ipsecq.lab.interop import FAR_HOST, FAR_LAN, FAR_OUTER, NEAR_HOST, NEAR_LAN, NEAR_OUTER, Bench
from ipsecq.lab.netns import Lab, wait_for
from ipsecq.lab.traffic import ping

WHY = iked.missing() or charon.missing()
pytestmark = [pytest.mark.root, pytest.mark.uml, pytest.mark.skipif(bool(WHY), reason=WHY or "-")]


def iked_conf(version, *, active, authentication):
    mode = "active" if active else "passive"
    return f"""ikev2 "lans" {mode} esp from {NEAR_LAN[version]} to {FAR_LAN[version]} \\
    local {NEAR_OUTER[version]} peer {FAR_OUTER[version]} \\
    ikesa enc aes-256 prf hmac-sha2-512 auth hmac-sha2-512 group modp2048 \\
    {iked.CHILD} srcid gw1 dstid gw2 {authentication}
"""


@pytest.fixture(scope="module")
def machine():
    """A kernel of its own: what other tests have done to the shared one by AF_KEY can leave it without an answer."""
    with Lab() as lab:
        yield Bench(lab)


@pytest.fixture
def world(machine, request):
    """A gateway without a word about IPsec, an iked and a charon; the test says which of both begins."""
    bench = machine
    bench.peer.flush()
    if bench.gateway is not None:
        bench.gateway.stop()
    bench.gateway = Gateway(bench.gateway_space, "", workers=1).start()
    ends = []

    def make(version, *, active, certificates):
        authority = Authority() if certificates else None
        identity = None
        authentication = f'psk "{iked.SECRET}"'
        if authority is not None:
            identity = iked.identity(bench.gateway.directory / "iked", authority, "gw1")
            authentication = iked.CERTIFICATES
        there = charon.PeerCharon(bench, version, authority).start()
        ends.append(there)
        here = iked.Iked(bench.gateway, iked_conf(version, active=active, authentication=authentication), identity)
        ends.append(here.start())
        if not active:
            wait_for(lambda: "pfkey" in here.text() or "config_" in here.text(), "iked to come up")
            there.initiate()
        wait_for(lambda: len(iked.sas(bench.gateway)) == 2, "SAs here", 20, every=0.1)
        wait_for(lambda: bench.gateway.status()["policy_count"] >= 2, "policies here", 20, every=0.1)
        made = SimpleNamespace(bench=bench, here=here, there=there, version=version)
        wait_for(lambda: there.states() == spis(made), "the same SAs there", 10, every=0.1)
        wait_for(lambda: bench.peer.run("ip", "xfrm", "policy").out.count("tmpl") >= 3, "policies there", 10, every=0.1)
        # The first packet of a pair of hosts meets neighbour caches that are empty: not what is tested here.
        wait_for(lambda: ping(bench.host, FAR_HOST[version], count=1, wait=1), "a first packet", 5)
        return made

    yield make
    for end in ends:
        end.stop()
    bench.gateway.stop()
    bench.gateway = None
    bench.peer.flush()


def spis(world):
    return {int(sa["spi"], 16) for sa in iked.sas(world.bench.gateway)}


def check_traffic(world):
    bench, version = world.bench, world.version
    assert ping(bench.host, FAR_HOST[version], count=5, wait=5) == 5
    argv = ("ping", "-n", "-q", "-c", "5", "-l", "5", "-i", "5", "-I", FAR_HOST[version], NEAR_HOST[version])
    assert " 0% packet loss" in bench.peer.run(*argv).out
    ends = SimpleNamespace(mode="tunnel", inner=version, outer=version)
    assert bench.tcp_to_there(ends, 1_000_000)
    assert bench.tcp_from_there(ends, 1_000_000)
    assert spis(world) == world.there.states()


def check_rekeys(world):
    """One after the other replaces the child SA while packets go to and fro; none is lost."""
    bench, version = world.bench, world.version
    first = spis(world)
    with bench.capture() as wire, Flow(bench.host, FAR_HOST[version], interval=0.02) as flow:
        world.there.rekey()
        wait_for(lambda: len(spis(world) - first) >= 2, "charon's new SAs", 10, every=0.1)
        wait_for(lambda: not spis(world) & first, "charon's delete of the old ones", 10, every=0.1)
        second = spis(world)
        iked.hasten(bench.gateway)
        wait_for(lambda: len(spis(world) - second) >= 2, "iked's new SAs", 10, every=0.1)
        wait_for(lambda: not spis(world) & second, "iked's delete of the old ones", 10, every=0.1)
    assert flow.received == flow.sent > 20
    frames = wire.frames()
    assert in_clear(frames, NEAR_LAN[version], FAR_LAN[version]) == []
    assert repeated_sequence_numbers(frames) == []
    assert len({frame.esp[0] for frame in frames if frame.esp}) >= 6
    wait_for(lambda: world.there.states() == spis(world), "both ends to have the same SAs", 10, every=0.1)


def test_charon_begins_with_certificates_both_replace_the_child_sa_and_a_delete_from_there_ends_it(world):
    w = world(4, active=False, certificates=True)
    check_traffic(w)
    check_rekeys(w)
    w.there.swanctl("--terminate", "--ike", "gw")
    wait_for(lambda: not w.bench.gateway.status()["sas"], "no SA left here", 20)
    wait_for(lambda: w.there.states() == set(), "no SA left there", 20)


def test_iked_begins_with_a_key_over_ipv6_and_a_delete_from_here_ends_it(world):
    w = world(6, active=True, certificates=False)
    check_traffic(w)
    old = w.there.states()
    w.here.ctl("reset", "id", "FQDN/gw2")
    wait_for(lambda: not w.there.states() & old, "the old SAs to go there", 20, every=0.1)
    wait_for(lambda: not spis(w) & old, "the old SAs to go here", 20)
