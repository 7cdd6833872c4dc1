"""Gateways with thousands of SAs: what each further flow keeps in a worker's memory."""

import gc
import tracemalloc

from ipsecq.lab import stages

FLOWS = 1000


def flows(first: int) -> list[bytes]:
    plain = stages.datagram(100)
    return [plain[:20] + port.to_bytes(2, "big") + plain[22:] for port in range(first, first + FLOWS)]


def test_flows_of_one_sa_share_all_but_their_place_in_the_flow_cache():
    side = stages.engine(udp=False)
    for packet in flows(1000):
        side.outbound.process(packet, stages.NOW, side.emit)
    side.emit.clear()
    packets = flows(10_000)
    gc.collect()
    tracemalloc.start()
    try:
        for packet in packets:
            side.outbound.process(packet, stages.NOW, side.emit)
            side.emit.clear()
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] / FLOWS
    finally:
        tracemalloc.stop()
    assert kept < 450, f"{kept:.0f} octets a flow"  # the key is 280, the dictionary's part 100
