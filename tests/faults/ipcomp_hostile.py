"""Millions of random, damaged and hostile buffers for IPComp: no exception, no octet over the limit, bounded time.

    python tests/faults/ipcomp_hostile.py [BUFFERS, default 1000000] [SEED]

setkey's manual page has a BUGS entry about zlib errors in IPComp; this shows that no input whatever gets past the
reasons of :meth:`IpcompTransform.open`.  Prints how often each reason came up, and the slowest buffer.
"""

import random
import sys
import time
import zlib
from collections import Counter as Tally

from ipsecq.counters import Counter
from ipsecq.transforms.ipcomp import IpcompTransform

LIMIT = 65535
HEADER = b"\x06\0\0\x02"


def deflate(payload: bytes, level: int, strategy: int) -> bytes:
    compressor = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    return compressor.compress(payload) + compressor.flush()


def corpus(rng: random.Random) -> list[bytes]:
    """Good streams of every kind of block, bombs among them."""
    texts = [bytes(rng.choices(range(n), k=size)) for n in (2, 20, 256) for size in (1, 90, 1400, 9000)]
    texts += [bytes(100_000), bytes(5_000_000)]
    return [deflate(text, level, strategy) for text in texts for level in (0, 1, 9) for strategy in (0, 2, 3, 4)]


def buffers(rng: random.Random, count: int):
    """Random octets, damaged, cut, spliced and prolonged streams, in turn."""
    good = [stream for stream in corpus(rng) if len(stream) <= LIMIT]
    small = [stream for stream in good if len(stream) < 2000]
    for number in range(count):
        kind = number % 8
        if kind == 0:
            yield rng.randbytes(rng.randrange(1500))
            continue
        body = bytearray(rng.choice(good if kind == 1 else small))
        if kind < 5 and body:
            for _ in range(rng.randint(1, 6)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        elif kind == 5:
            del body[rng.randrange(len(body) + 1) :]
        elif kind == 6:
            body += rng.randbytes(rng.randint(1, 9))
        else:
            other = rng.choice(small)
            body = body[: rng.randrange(len(body) + 1)] + other[rng.randrange(len(other) + 1) :]
        yield bytes(body)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    sa = IpcompTransform(2)
    tally: Tally[int] = Tally()
    slowest, culprit = 0.0, b""
    began = time.perf_counter()
    for body in buffers(random.Random(seed), count):
        before = time.perf_counter()
        reason, _, payload = sa.open(HEADER + body, LIMIT)
        taken = time.perf_counter() - before
        assert len(payload) <= LIMIT
        if taken > slowest:
            slowest, culprit = taken, body
        tally[reason] += 1
    names = {reason: Counter(reason).name if reason else "decompressed" for reason in tally}
    print(f"{count} buffers, seed {seed}, {time.perf_counter() - began:.0f} s")
    for reason, times in tally.most_common():
        print(f"  {names[reason]:16} {times}")
    print(f"  slowest {slowest * 1e3:.2f} ms, {len(culprit)} octets in")


if __name__ == "__main__":
    main()
