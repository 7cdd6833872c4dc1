"""What a capture of days or minutes proves: no (key, IV) pair twice, nothing of a protected network in clear.

One pass over the file, a few dozen octets of memory for each packet.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ipsecq.lab.capture import read
from ipsecq.lab.traffic import MARKER

_SHOWN: Final = 20
_ADD: Final = re.compile(r"add \S+ (\S+) esp (0x[0-9a-f]+) .*-E (\S+) (0x[0-9a-f]+)")
_IV_OCTETS: Final = {"aes-gcm-16": 8, "chacha20-poly1305": 8, "aes-cbc": 16}


@dataclass(frozen=True)
class EspKey:
    """A key by what was configured, and how long its IV is."""

    key: str
    iv_octets: int


Keys = Mapping[tuple[bytes, int], EspKey]
"""(destination, SPI) → key."""


def keys_of(lines: Iterable[str]) -> dict[tuple[bytes, int], EspKey]:
    """The keys in lines of setkey.conf of the form ``add SRC DST esp SPI … -E ALGORITHM KEY …``."""
    keys: dict[tuple[bytes, int], EspKey] = {}
    for line in lines:
        if match := _ADD.match(line):
            destination = ipaddress.ip_address(match[1]).packed
            keys[destination, int(match[2], 16)] = EspKey(f"{match[3]} {match[4]}", _IV_OCTETS[match[3]])
    return keys


@dataclass
class Findings:
    """Counts, and descriptions of the first few violations."""

    packets: int = 0
    esp: int = 0
    pairs: int = 0
    """Different (key, IV) pairs."""
    reused: int = 0
    clear: int = 0
    unknown: int = 0
    """ESP under an SPI that nobody configured."""
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remember a violation, if there is room."""
        if len(self.notes) < _SHOWN:
            self.notes.append(text)


class WireCheck:
    """``read`` captures one after the other; pairs are compared over all of them."""

    def __init__(self, keys: Keys, networks: Iterable[str]) -> None:
        self.findings = Findings()
        self._keys = keys
        self._networks = [
            (net.version, int(net.network_address) >> net.max_prefixlen - net.prefixlen, net.max_prefixlen - net.prefixlen)
            for net in map(ipaddress.ip_network, networks)
        ]
        self._seen: dict[EspKey, dict[int, int]] = {}

    def read(self, path: Path) -> None:
        """Look at every frame of a capture.  Frames may be cut off behind the first octets of the ciphertext."""
        findings = self.findings
        for number, frame in enumerate(read(path), 1):
            data = frame.data
            version = frame.version
            if not version:
                continue
            findings.packets += 1
            source, destination = (data[26:30], data[30:34]) if version == 4 else (data[22:38], data[38:54])
            if self._protected(version, source) or self._protected(version, destination) or MARKER in data:
                findings.clear += 1
                findings.note(f"{path.name} frame {number} at {frame.time:.6f}: in clear: {frame}")
            elif frame.protocol == 50 and not frame.fragment_offset:
                self._esp(path, number, destination, frame.payload)

    def _protected(self, version: int, address: bytes) -> bool:
        value = int.from_bytes(address, "big")
        return any(version == family and value >> shift == prefix for family, prefix, shift in self._networks)

    def _esp(self, path: Path, number: int, destination: bytes, payload: bytes) -> None:
        findings = self.findings
        findings.esp += 1
        spi = int.from_bytes(payload[:4], "big")
        key = self._keys.get((destination, spi))
        if key is None:
            findings.unknown += 1
            findings.note(f"{path.name} frame {number}: nobody configured SPI 0x{spi:08x}")
            return
        iv = int.from_bytes(payload[8 : 8 + key.iv_octets], "big")
        before = self._seen.setdefault(key, {}).setdefault(iv, content := hash(payload))
        if before != content:
            findings.reused += 1
            findings.note(f"{path.name} frame {number}: SPI 0x{spi:08x}: IV 0x{iv:x} a second time, other content")

    def result(self) -> Findings:
        """The findings so far."""
        self.findings.pairs = sum(map(len, self._seen.values()))
        return self.findings
