"""Send small UDP datagrams: ``python -m ipsecq.lab.blast ADDRESS PORT SECONDS OCTETS [PER_SECOND]``.

As fast as one process can, or so many a second, sixteen at a time.
"""

from __future__ import annotations

import socket
import sys
import time

from ipsecq.datapath.mmsg import SendVector

BURST = 16
MANY = 64
"""Datagrams of one sendmmsg(2): the processors belong to what is measured."""


def main() -> None:
    """Send, then print how many datagrams went out."""
    address, port, seconds, size = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    rate = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sent = 0
    with socket.socket(family, socket.SOCK_DGRAM) as out:
        out.connect((address, port))
        vector, many = SendVector(MANY), BURST if rate else MANY
        vector.load([bytes(size)] * MANY, [0] * MANY, 0)
        start = time.monotonic()
        while (now := time.monotonic() - start) < seconds:
            if rate and sent > now * rate:
                time.sleep(BURST / rate / 2)
                continue
            # No buffer space, or an ICMP error, is no reason to stop: the receiver's counter is what counts.
            sent += max(vector.send(out.fileno(), 0, many), 0)
    print(sent)


if __name__ == "__main__":
    main()
