"""Send small UDP datagrams: ``python -m ipsecq.lab.blast ADDRESS PORT SECONDS OCTETS [PER_SECOND]``.

As fast as one process can, or so many a second, sixteen at a time.
"""

from __future__ import annotations

import socket
import sys
import time

BURST = 16


def main() -> None:
    """Send, then print how many datagrams went out."""
    address, port, seconds, size = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    rate = float(sys.argv[5]) if len(sys.argv) > 5 else 0.0
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sent, data = 0, bytes(size)
    with socket.socket(family, socket.SOCK_DGRAM) as out:
        out.connect((address, port))
        send, start = out.send, time.monotonic()
        while (now := time.monotonic() - start) < seconds:
            if rate and sent > now * rate:
                time.sleep(BURST / rate / 2)  # the processors belong to what is measured
                continue
            for _ in range(BURST if rate else 64):
                try:
                    send(data)
                    sent += 1
                except OSError:
                    pass  # no buffer space, or an ICMP error: the receiver's counter is what counts
    print(sent)


if __name__ == "__main__":
    main()
