"""The gateway that one writes in an afternoon: NetfilterQueue, one packet at a time through ``scapy.layers.ipsec``.

It is the benchmark's yardstick, nothing more: no policy look-up, no replay window, no fragments, no MTU discovery, one
process.  Run in a gateway's namespace::

    python -m ipsecq.lab.naive --near 192.0.2.1 --far 192.0.2.2 --lan 10.2.0.0/24 --out KEY --in KEY

Outbound packets are replaced in FORWARD (the next hop of the peer and of the far LAN is the same here), inbound ones in
PREROUTING, both by the verdict.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
from typing import Any

from netfilterqueue import NetfilterQueue


def main() -> None:
    """Parse the command line, divert with iptables, loop until killed."""
    parser = argparse.ArgumentParser(description="naive ESP gateway: NFQUEUE and scapy")
    for name in ("near", "far", "lan", "out", "in"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    logging.getLogger("scapy").setLevel(logging.ERROR)
    from scapy.layers.inet import IP  # noqa: PLC0415 - half a second, and after the log level
    from scapy.layers.ipsec import ESP, SecurityAssociation  # noqa: PLC0415

    def association(source: str, destination: str, key: str, spi: int) -> Any:
        return SecurityAssociation(  # type: ignore[no-untyped-call]
            ESP, spi=spi, crypt_algo="AES-GCM", crypt_key=bytes.fromhex(key),
            tunnel_header=IP(src=source, dst=destination),
        )  # fmt: skip

    # The key says the direction, so both ends agree on SPIs without a table.
    outbound = association(options.near, options.far, options.out, int(options.out[:6], 16) + 256)
    inbound = association(options.far, options.near, getattr(options, "in"), int(getattr(options, "in")[:6], 16) + 256)

    def process(packet: Any) -> None:
        try:
            ip = IP(packet.get_payload())
            changed = inbound.decrypt(ip) if ip.proto == 50 else outbound.encrypt(ip)
        except Exception:  # scapy raises many kinds, and a bad packet is a dropped packet
            packet.drop()
            return
        packet.set_payload(bytes(changed))
        packet.accept()

    for chain, match in (("FORWARD", ["-d", options.lan]), ("PREROUTING", ["-p", "esp", "-d", options.near])):
        subprocess.run(
            ["iptables-nft", "-t", "mangle", "-A", chain, *match, "-j", "NFQUEUE", "--queue-num", "0"], check=True
        )
    queue = NetfilterQueue()
    queue.bind(0, process, max_len=4096)
    print("ready", flush=True)
    queue.run()


if __name__ == "__main__":
    main()
