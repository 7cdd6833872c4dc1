"""``make bench-keys``: what key management costs on a real daemon: SAs added a second, a long dump, one ADD to all workers.

    python -m ipsecq.lab.bench_keys [--sas 100000] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ipsecq.lab.gateway import Gateway
from ipsecq.lab.netns import Lab
from ipsecq.pfkey.client import PfkeyClient
from ipsecq.pfkey.constants import MessageType
from ipsecq.pfkey.extensions import Address, KeyExt, Sa
from ipsecq.pfkey.messages import Message, build
from ipsecq.pfkey.xextensions import Sa2
from ipsecq.secret import Key

_AES_GCM_16: Final = 20
_WINDOW: Final = 256
"""Requests under way: a client that does not wait for each reply."""


def _add(spi: int, key: Key, src: bytes, dst: bytes) -> Message:
    return Message(
        MessageType.ADD, 3, seq=spi, pid=1, sa=Sa(spi, 32, 1, 0, _AES_GCM_16), sa2=Sa2(2, 0, 0),
        src=Address(src, 32), dst=Address(dst, 32), key_encrypt=KeyExt(key),
    )  # fmt: skip


def measure(path: Path, count: int) -> dict[str, float]:
    """Seconds and rates over one PF_KEY socket."""
    src, dst = bytes((192, 0, 2, 1)), bytes((192, 0, 2, 2))
    key = Key(secrets.token_bytes(20))
    with PfkeyClient.connect(path, timeout=300.0) as client:
        messages = [build(_add(0x1000 + number, key, src, dst)) for number in range(count)]
        started = time.monotonic()
        answered = 0
        for number, octets in enumerate(messages):
            client.socket.send(octets)
            if number >= _WINDOW:
                answered += _good(client)
        while answered < count:
            answered += _good(client)
        added = time.monotonic() - started

        started = time.monotonic()
        dumped = sum(1 for _ in client.dump())
        dump = time.monotonic() - started
        if dumped != count:
            raise SystemExit(f"bench-keys: {count} SAs added, {dumped} in the dump")

        one = []
        for number in range(200):
            started = time.perf_counter()
            client.request(_add(0x1000 + count + number, key, src, dst))
            one.append(time.perf_counter() - started)
        return {
            "sas": count, "added_per_second": count / added, "dump_seconds": dump,
            "dump_records_per_second": count / dump,
            "all_workers_median_ms": statistics.median(one) * 1e3, "all_workers_worst_ms": max(one) * 1e3,
        }  # fmt: skip


def _good(client: PfkeyClient) -> int:
    octets = client.socket.recv(65536)
    if octets[2]:
        raise SystemExit(f"bench-keys: SADB_ADD was answered with errno {octets[2]}")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a number, and the whole as JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="bench-keys", description=__doc__)
    parser.add_argument("--sas", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    with Lab() as lab:
        gateway = Gateway(lab.namespace("gw"), "", workers=options.workers).start()
        result = measure(gateway.directory / "run" / "pfkey", options.sas)
        gateway.stop()
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"SAs added over PF_KEY        {result['added_per_second']:10.0f} a second ({options.sas} SAs)")
    print(f"dump of all of them          {result['dump_seconds']:10.2f} s")
    print(f"one ADD, until all {options.workers} workers have it: median {result['all_workers_median_ms']:.2f} ms,"
          f" worst of 200 {result['all_workers_worst_ms']:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
