"""ipsecq."""
