"""Capture files through the engine: ``ipsecq pcap decrypt`` and ``ipsecq pcap encrypt``.  Needs no root and no daemon."""
