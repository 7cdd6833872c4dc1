"""Packed addresses as people read them."""

from __future__ import annotations

import socket


def text(packed: bytes) -> str:
    """``192.0.2.1`` or ``2001:db8::1`` of 4 or 16 octets; ValueError for another length."""
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
