"""ipsecq against the Linux kernel's own IPsec: what one seals, the other opens."""

import pytest

from ipsecq.lab.capture import in_clear
from ipsecq.lab.cells import AEAD, Cell, esp
from ipsecq.lab.interop import FAR_LAN, NEAR_LAN

pytestmark = [pytest.mark.root, pytest.mark.uml]

SIZES = (0, 1, 2, 3, 4, 17, 56, 100, 333, 1000, 1300, 1400, 1472, 1600, 3000, 9000)
CELLS = [
    Cell((suite,), "tunnel", outer, inner)
    for suite in (AEAD[0], esp("aes-cbc", "hmac-sha2-256"))
    for outer, inner in ((4, 4), (6, 6), (4, 6), (6, 4))
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_both_ends_understand_each_other(kernel_peer, cell):
    kernel_peer.use(cell)
    with kernel_peer.capture() as wire:
        assert kernel_peer.ping_from_here(cell, SIZES) == []
        assert kernel_peer.ping_from_there(cell, SIZES) == []
        assert kernel_peer.tcp_to_there(cell, 3_000_000)
        assert kernel_peer.tcp_from_there(cell, 3_000_000)
        wire.settle()
    taken = kernel_peer.gateway.metric("ipsecq_events_total", event="fast_path")
    assert taken > 1000 if cell.suites == (AEAD[0],) else taken == 0
    frames = wire.frames()
    assert in_clear(frames, NEAR_LAN[cell.inner], FAR_LAN[cell.inner]) == []
    assert {0x2000, 0x2001} <= {frame.esp[0] for frame in frames if frame.esp}
    assert "XfrmInError" not in kernel_peer.peer.run("sh", "-c", "grep -v '\t0$' /proc/net/xfrm_stat || true").out
