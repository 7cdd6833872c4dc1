"""Send small UDP datagrams as fast as one process can: ``python -m ipsecq.lab.blast ADDRESS PORT SECONDS OCTETS``."""

from __future__ import annotations

import socket
import sys
import time


def main() -> None:
    """Send, then print how many datagrams went out."""
    address, port, seconds, size = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sent, data = 0, bytes(size)
    with socket.socket(family, socket.SOCK_DGRAM) as out:
        out.connect((address, port))
        send, deadline = out.send, time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(64):
                try:
                    send(data)
                    sent += 1
                except OSError:
                    pass  # no buffer space, or an ICMP error: the receiver's counter is what counts
    print(sent)


if __name__ == "__main__":
    main()
