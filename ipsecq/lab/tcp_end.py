"""One end of a TCP connection as a program: receive or send, print octets and SHA-256.  Standard library only.

It runs where :mod:`ipsecq.lab.traffic` cannot reach, inside User-Mode Linux, and at the host side opposite to it::

    tcp_end.py receive ADDRESS PORT            accept one connection, read to its end
    tcp_end.py send ADDRESS PORT OCTETS SEED   connect, send reproducible octets
"""

from __future__ import annotations

import hashlib
import random
import socket
import sys


def main() -> None:
    """Print ``octets digest`` when done."""
    role, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    digest, total = hashlib.sha256(), 0
    with socket.socket(family, socket.SOCK_STREAM) as end:
        end.settimeout(30)
        if role == "receive":
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.bind((address, port))
            end.listen(1)
            with end.accept()[0] as connection:
                connection.settimeout(30)
                while data := connection.recv(1 << 16):
                    digest.update(data)
                    total += len(data)
        else:
            size, block = int(sys.argv[4]), random.Random(int(sys.argv[5])).randbytes(1 << 16)  # noqa: S311 - not a key
            end.connect((address, port))
            while total < size:
                data = block[: size - total]
                end.sendall(data)
                digest.update(data)
                total += len(data)
            end.shutdown(socket.SHUT_WR)
            end.recv(1)  # until the receiver has closed: everything has arrived
    print(total, digest.hexdigest())


if __name__ == "__main__":
    main()
