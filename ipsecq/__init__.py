"""ipsecq: IPsec for Linux gateways in user space, with the semantics of BSD's ipsec(4)."""

__version__ = "0.1.0"
