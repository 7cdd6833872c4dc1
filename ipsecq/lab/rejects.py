"""What it costs to refuse a packet: the inbound engine's time for what an attacker can send, beside that for a good one."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from typing import Final

from ipsecq.counters import Counter
from ipsecq.crypto import cipher
from ipsecq.engine import standalone
from ipsecq.engine.emit import Emissions
from ipsecq.engine.inbound import Inbound
from ipsecq.packet import ipv4
from ipsecq.policy.spd import Spd
from ipsecq.sa.association import Slot
from ipsecq.sa.sad import Sad
from ipsecq.secret import Key
from ipsecq.setkey.apply import apply
from ipsecq.setkey.parser import parse
from ipsecq.transforms.esp import EspTransform

_SRC, _DST = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
_COUNT: Final = 2000
_ROUNDS: Final = 15
_ALGORITHMS: Final = {
    "AES-GCM": ("-E aes-gcm-16 0x" + "11" * 20, ("aes-gcm-16", Key(bytes([0x11]) * 20), None, None)),
    "AES-CBC, HMAC-SHA256": (
        "-E aes-cbc 0x" + "22" * 16 + " -A hmac-sha2-256 0x" + "33" * 32,
        ("aes-cbc", Key(bytes([0x22]) * 16), "hmac-sha2-256", Key(bytes([0x33]) * 32)),
    ),
}


def measure(octets: int) -> Iterator[tuple[str, str, float]]:
    """(algorithm, what comes in, microseconds a packet, the best of several rounds) for inner packets of so many octets."""
    for name, (words, arguments) in _ALGORITHMS.items():
        applied = apply(parse(f"add 192.0.2.1 192.0.2.2 esp 0x1000 -m tunnel -r 32 {words};"), Sad(), Spd(), now=1.0)
        tables = standalone.build(applied.sad.dump(), [], os.urandom)
        inbound, emit = Inbound(tables), Emissions()
        enc, enc_key, auth, auth_key = arguments
        seal = EspTransform(0x1000, cipher.build(enc, enc_key, auth, auth_key)).seal
        inner = ipv4.header(_SRC, _DST, 17, octets - 20) + struct.pack("!HHHH", 1, 2, octets - 20, 0)
        inner = inner.ljust(octets, b"x")
        good = [_outer(seal(inner, 4, n, os.urandom(16) if auth else b"")) for n in range(1, _COUNT + 1)]
        kinds = {
            "good": good,
            "ICV wrong": [packet[:-1] + bytes([packet[-1] ^ 1]) for packet in good],
            "replayed": good,
            "unknown SPI": [packet[:20] + b"\0\0\x99\x99" + packet[24:] for packet in good],
            "cut off": [_outer(packet[20:32]) for packet in good],
        }
        expected = {
            "good": 0, "ICV wrong": Counter.ESP_BADAUTH, "replayed": Counter.ESP_REPLAY,
            "unknown SPI": Counter.ESP_NOTDB, "cut off": 0,
        }  # fmt: skip
        base = applied.sad.dump()[0].slot
        for kind, packets in kinds.items():
            times = []
            for _ in range(_ROUNDS):
                tables.words[base + Slot.SEQUENCE] = 0 if kind != "replayed" else 1 << 20
                for word in range(Slot.WINDOW, Slot.WINDOW + 8):
                    tables.words[base + word] = 0
                before = tables.counters[expected[kind]] if expected[kind] else 0
                started = time.perf_counter()
                for packet in packets:
                    inbound.process(packet, 1.0, emit)
                    emit.clear()
                times.append((time.perf_counter() - started) / len(packets) * 1e6)
                if expected[kind] and tables.counters[expected[kind]] - before != len(packets):
                    raise AssertionError(f"{kind}: not every packet was refused for that")
            yield name, kind, min(times)


def _outer(esp: bytes) -> bytes:
    return ipv4.header(_SRC, _DST, 50, len(esp)) + esp
