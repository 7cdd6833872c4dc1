"""With all offloads, and with each of them off: the same traffic arrives, and the wire shows the same."""

import pytest

from ipsecq.lab.capture import Capture, in_clear, other_than_esp, repeated_sequence_numbers
from ipsecq.lab.gateway import Tunnel
from ipsecq.lab.traffic import MARKER, ping, tcp, udp_echo

pytestmark = pytest.mark.root

SWITCHES = ["gso", "coalesce", "udp_segment", "compiled", "ring"]
OFF = {
    None: set(), **{name: {name} for name in SWITCHES}, "coalesce": {"coalesce", "coalesce_udp"},
    "compiled": {"compiled", "ring"},
}  # fmt: skip


@pytest.mark.parametrize("off", [None, *SWITCHES])
def test_traffic_crosses_and_arrives_unharmed(make_world, off):
    settings = f"[offload]\n{off} = false\n" if off else ""
    world = make_world(router=True, lan_mtu=1400, tunnel=lambda network: Tunnel(network, udp=True), settings=settings)
    one, two = world.network.sites
    for switch in SWITCHES:
        assert world.one.metric("ipsecq_offload_active", offload=switch, worker="0") == (switch not in OFF[off])
    shown = {each["name"]: each for each in world.one.status()["offloads"]}
    assert {name for name, each in shown.items() if not each["active"]} == OFF[off]
    assert all(f"[offload] {off} = false" in shown[name]["why"] for name in OFF[off])
    assert "udp_segment" in world.one.command("status").stdout
    with Capture(world.network.router, "left", bulk=True) as wire:
        for version in (4, 6):
            assert ping(one.host, two.host_address(version)) == 3
            for reverse in (False, True):
                transfer = tcp(one.host, two.host, two.host_address(version), 10_000_000, reverse=reverse)
                assert transfer.digest_matches
            sizes = [1, 100, *[700] * 40, 1300]
            echoes = udp_echo(one.host, two.host, two.host_address(version), sizes)
            assert (echoes.damaged, echoes.lost) == ([], [])
        wire.settle()
    frames = wire.frames()
    assert not wire.contains(MARKER)
    assert in_clear(frames, *(site.lan(version) for site in (one, two) for version in (4, 6))) == []
    assert other_than_esp(frames) == []
    assert repeated_sequence_numbers(frames) == []
    ports = {(frame.data[34:36], frame.data[36:38]) for frame in frames if frame.version == 4 and frame.esp}
    assert ports == {((4500).to_bytes(2), (4500).to_bytes(2))}
    longest = max(len(frame.ip) for frame in frames if frame.esp)
    assert (longest > 20_000) == (off != "udp_segment")
    for gateway in world.gateways:
        assert gateway.metric("ipsecq_drops_total", reason="esp_badauth") == 0
        assert gateway.metric("ipsecq_drops_total", reason="esp_replay") == 0
        taken = gateway.metric("ipsecq_events_total", event="fast_path")
        assert taken > 10_000 if off != "compiled" else taken == 0
        joined = gateway.metric("ipsecq_events_total", event="coalesced")
        assert (joined > 1000) == (off != "coalesce")
