"""Inner loops that Cython compiles, where a compiler and OpenSSL's headers were there when ipsecq was installed.

They do what :mod:`ipsecq.crypto.aead`, :mod:`ipsecq.packet.segments`, :mod:`ipsecq.packet.rows` and the ``alike`` of the
engine do in numpy and plain Python, and pass the same tests; everything works without them.  ``IPSECQ_PURE=1`` in the
environment leaves them out.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType


def _find(name: str) -> tuple[ModuleType | None, str]:
    if os.environ.get("IPSECQ_PURE", "") not in {"", "0"}:
        return None, "IPSECQ_PURE is set"
    try:
        return import_module(f"ipsecq.compiled.{name}"), ""
    except ImportError as error:
        return None, f"not built: {error}"


aead, missing = _find("aead")
rows, _missing = _find("rows")
alike, _missing = _find("alike")
if aead is None or rows is None or alike is None:
    aead = rows = alike = None
    missing = missing or _missing
# The fast path stands above the engine's rooms: who uses it imports it (see ipsecq.datapath.fast).

active = aead is not None
"""The loops are in use; ``missing`` says why they are not."""
