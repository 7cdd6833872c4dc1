"""``make bench-scrape``: what a scrape costs on a real daemon with many SAs, each with series of its own.

    python -m ipsecq.lab.bench_scrape [--sas 10000] [--peers 5000] [--sa-limit N]
"""

from __future__ import annotations

import argparse
import http.client
import json
import secrets
import statistics
import sys
import time
from collections.abc import Sequence

from ipsecq.daemon.control import ask
from ipsecq.lab.gateway import METRICS_PORT, Gateway
from ipsecq.lab.netns import Lab


def setkey(sas: int, peers: int) -> str:
    """SAs in pairs between this gateway and its peers."""
    lines = []
    for number in range(sas):
        peer = f"10.{number // 2 % peers >> 8 & 255}.{number // 2 % peers & 255}.1"
        ends = f"192.0.2.1 {peer}" if number % 2 else f"{peer} 192.0.2.1"
        lines.append(f"add {ends} esp {0x1000 + number} -m tunnel -r 32 -E aes-gcm-16 0x{secrets.token_hex(20)};\n")
    return "".join(lines)


def fetch(path: str) -> tuple[float, int, int]:
    """(seconds, octets on the wire, status) of one GET, as Prometheus asks."""
    connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=60)
    started = time.perf_counter()
    try:
        connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        octets = len(answer.read())
        return time.perf_counter() - started, octets, answer.status
    finally:
        connection.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a figure, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="bench-scrape", description=__doc__)
    parser.add_argument("--sas", type=int, default=10_000)
    parser.add_argument("--peers", type=int, default=5_000)
    parser.add_argument("--sa-limit", type=int, default=10_000)
    parser.add_argument("--peer-limit", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    limits = f"sa_limit = {options.sa_limit}\npeer_limit = {options.peer_limit}\n"
    with Lab() as lab:
        space = lab.namespace("gw")
        space.run("ip", "addr", "add", "192.0.2.1/24", "dev", "lo")
        gateway = Gateway(space, setkey(options.sas, options.peers), workers=1, metrics=limits).start()
        runs = space.call(lambda: [fetch("/metrics") for _ in range(options.rounds)])
        started = time.perf_counter()
        ask(gateway.directory / "run" / "control", "sample")
        sample = time.perf_counter() - started
        series = sum(not line.startswith("#") for line in gateway.metrics_text().splitlines())
        gateway.stop()
    seconds = [run[0] for run in runs]
    result = {
        "sas": options.sas, "series": series, "octets": runs[-1][1], "first_seconds": seconds[0],
        "median_seconds": statistics.median(seconds), "worst_seconds": max(seconds),
        "top_seconds": sample,
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{options.sas} SAs, {series} series, {runs[-1][1] / 1e6:.2f} MB packed")
    print(f"a scrape: median {result['median_seconds']:.3f} s, worst of {options.rounds} {result['worst_seconds']:.3f} s")
    print(f"what ipsecq top asks for: {result['top_seconds']:.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
