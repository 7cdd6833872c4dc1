"""The type of what a packet may lie in."""

from __future__ import annotations

from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Octets of a packet; a memoryview must be flat and of format ``B``."""
