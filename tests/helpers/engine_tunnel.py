"""An ESP tunnel between two engines."""

from __future__ import annotations

from dataclasses import replace

from engine_peers import Peer, address, make_peer, policy

from ipsecq.numbers import Mode, Protocol
from ipsecq.sa.association import SecurityAssociation
from ipsecq.secret import Key

A, B = "192.0.2.1", "192.0.2.2"
A6, B6 = "2001:db8::1", "2001:db8::2"


def esp(spi: int, src: str, dst: str, **more: object) -> SecurityAssociation:
    return replace(
        SecurityAssociation(
            Protocol.ESP, spi, address(src), address(dst), Mode.TUNNEL, encryption="aes-gcm-16",
            encryption_key=Key(bytes(range(spi & 0xFF, (spi & 0xFF) + 20))), replay_window=64,
        ),
        **more,
    )  # fmt: skip


def tunnel(lan_a: str, lan_b: str, a: str, b: str, *, knobs: dict[str, int] | None = None, mtu: int = 1500,
           level: str = "require", **more: object) -> tuple[Peer, Peer]:  # fmt: skip
    sas = [esp(0x1001, a, b, **more), esp(0x1002, b, a, **more)]
    there, back = f"ipsec esp/tunnel/{a}-{b}/{level}", f"ipsec esp/tunnel/{b}-{a}/{level}"
    return (
        make_peer(sas, [policy("out", lan_a, lan_b, there), policy("in", lan_b, lan_a, back)], knobs, mtu),
        make_peer(sas, [policy("out", lan_b, lan_a, back), policy("in", lan_a, lan_b, there)], knobs, mtu),
    )
