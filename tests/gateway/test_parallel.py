"""Several SAs for one policy, on the wire: flows share them, each keeps to one, both workers of the far end open."""

from collections import defaultdict

import pytest
from world import open_world

from ipsecq.daemon.control import ask
from ipsecq.lab.capture import Capture, repeated_sequence_numbers
from ipsecq.lab.gateway import AES_GCM
from ipsecq.lab.netns import Lab

pytestmark = pytest.mark.root

SAS, FLOWS, EACH, PORT, REQID = 4, 24, 40, 5300, 7


class Tunnel:
    """Four SAs for each direction, with one reqid, and one policy for each direction."""

    def __init__(self, network):
        self.network = network
        self.spis = {site: [0x1000 * site.number + n for n in range(SAS)] for site in network.sites}
        self.adds = [
            f"add {near.wan4} {far.wan4} esp {spi:#x} -m tunnel -u {REQID} -r 32 {AES_GCM.keys()};"
            for near, far in (network.sites, network.sites[::-1])
            for spi in self.spis[near]
        ]

    def setkey(self, near):
        far = self.network.two if near is self.network.one else self.network.one
        out, back = (f"esp/tunnel/{a.wan4}-{b.wan4}/unique:{REQID}" for a, b in ((near, far), (far, near)))
        return "\n".join([
            *self.adds,
            f"spdadd {near.lan4} {far.lan4} any -P out ipsec {out};",
            f"spdadd {far.lan4} {near.lan4} any -P in ipsec {back};",
        ])  # fmt: skip


@pytest.fixture(scope="module")
def world():
    with Lab() as lab:
        yield open_world(lab, tunnel=Tunnel, daemon="parallel_sas = true")


def crossing(near, far):
    """Send every flow's packets in turn; the wire's frames, and the numbers of each flow as they arrived."""
    got = defaultdict(list)
    receiver = far.host.socket(2, 2)
    receiver.bind((far.host4, PORT))
    receiver.settimeout(5)
    senders = [near.host.socket(2, 2) for _ in range(FLOWS)]
    try:
        with Capture(near.gateway, "wan") as wire:
            for flow, sender in enumerate(senders):
                sender.bind((near.host4, 20000 + flow))
            for number in range(EACH):
                for flow, sender in enumerate(senders):
                    # A flow's packets have a length of their own: seen on the wire, too.
                    sender.sendto(number.to_bytes(4, "big") + bytes(100 + 16 * flow), (far.host4, PORT))
                for _ in senders:
                    data, (_, port) = receiver.recvfrom(2000)
                    got[port - 20000].append(int.from_bytes(data[:4], "big"))
            wire.settle()
            return [frame for frame in wire.frames() if frame.esp and frame.src == near.wan4], got
    finally:
        for each in (receiver, *senders):
            each.close()


def sas_of_flows(frames):
    """The SPIs that each flow's packets had, by their length."""
    lengths = sorted({len(frame.payload) for frame in frames})
    assert len(lengths) == FLOWS
    return [{frame.esp[0] for frame in frames if len(frame.payload) == length} for length in lengths]


def explained(world, gateway, near, far, flow):
    told = ask(gateway.directory / "run" / "control", "explain", src=near.host4, dst=far.host4, protocol="udp",
               sport=20000 + flow, dport=PORT, mtu=0)  # fmt: skip
    return told["data"]["transforms"][0]["spi"]


@pytest.mark.parametrize("way", [0, 1], ids=["from one", "from two"])
def test_flows_share_all_sas_and_each_keeps_its_order_in_one(world, way):
    near, far = world.network.sites if way == 0 else world.network.sites[::-1]
    sender, receiver = world.gateways if way == 0 else world.gateways[::-1]

    def opened(worker):
        return receiver.metric("ipsecq_worker_packets_total", worker=worker, direction="in")

    before = [opened(worker) for worker in "01"]
    frames, got = crossing(near, far)
    assert got == {flow: list(range(EACH)) for flow in range(FLOWS)}
    assert len(frames) == FLOWS * EACH
    used = sas_of_flows(frames)
    assert all(len(spis) == 1 for spis in used)
    assert set.union(*used) == set(world.tunnel.spis[near])
    for flow, spis in enumerate(used):
        assert {explained(world, sender, near, far, flow)} == spis
    for spi in world.tunnel.spis[near]:
        numbers = [frame.esp[1] for frame in frames if frame.esp[0] == spi]
        assert numbers == sorted(set(numbers)), "an SA's numbers leave in order"
        counted = {gateway.metric("ipsecq_sa_packets_total", spi=f"0x{spi:08x}") for gateway in world.gateways}
        assert counted == {float(len(numbers))}
    assert receiver.metric("ipsecq_sa_replays_total") == 0
    assert repeated_sequence_numbers(frames) == []
    assert all(opened(worker) > was for worker, was in zip("01", before, strict=True))


def test_an_sa_that_is_deleted_leaves_its_flows_to_the_others(world):
    near, far = world.network.sites
    gone, *rest = world.tunnel.spis[near]
    before = [explained(world, world.one, near, far, flow) for flow in range(FLOWS)]
    ask(world.one.directory / "run" / "control", "setkey", text=f"delete {near.wan4} {far.wan4} esp {gone:#x};", atomic=True)
    frames, got = crossing(near, far)
    assert got == {flow: list(range(EACH)) for flow in range(FLOWS)}
    used = sas_of_flows(frames)
    assert set.union(*used) == set(rest)
    assert all(spis == ({old} if old != gone else spis & set(rest)) for spis, old in zip(used, before, strict=True))
