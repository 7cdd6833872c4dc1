"""Put one Ethernet frame on a device as fast as one process can: ``python -m ipsecq.lab.forge DEVICE SECONDS HEX``."""

from __future__ import annotations

import socket
import sys
import time


def main() -> None:
    """Send, then print how many frames went out."""
    device, seconds, frame = sys.argv[1], float(sys.argv[2]), bytes.fromhex(sys.argv[3])
    sent = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as out:
        out.bind((device, 0))
        send, deadline = out.send, time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(64):
                try:
                    send(frame)
                    sent += 1
                except OSError:
                    pass  # no buffer space
    print(sent)


if __name__ == "__main__":
    main()
