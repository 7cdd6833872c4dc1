"""AES-GCM and ChaCha20-Poly1305 over OpenSSL's EVP, which Cython compiles where it can when ipsecq is installed.

A compiler and OpenSSL's headers have to be there.  The cipher does what :mod:`ipsecq.crypto.aead` does, and the fast path
(:mod:`ipsecq.fastpath`) stands on it; without them everything works, through the engine.  ``IPSECQ_PURE=1`` in the
environment leaves both out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType


def find(names: Sequence[str]) -> tuple[list[ModuleType], str]:
    """Compiled modules by their names; none and why, where one is missing."""
    if os.environ.get("IPSECQ_PURE", "") not in {"", "0"}:
        return [], "IPSECQ_PURE is set"
    try:
        return [import_module(name) for name in names], ""
    except ImportError as error:
        return [], f"not built: {error}"


_found, missing = find(["ipsecq.compiled.aead"])
aead: ModuleType | None = _found[0] if _found else None
"""The module, or None; ``missing`` says why."""
