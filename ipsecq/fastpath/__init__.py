"""The fast path: packets whose flows the engine has decided about, in compiled code from the queue to the socket.

A packet is parsed, looked up, sealed or opened, counted and handed on without a Python object for it.  These modules are
Cython in Python's own syntax and exist only where they were compiled (:mod:`ipsecq.compiled`); without them every packet
is the engine's.  :mod:`ipsecq.datapath.fast` tells them what they may do.
"""

from __future__ import annotations

from typing import Final

from ipsecq.compiled import find

NAMES: Final = ("known", "sealer", "opener", "ring", "reader")

modules, missing = find([f"ipsecq.fastpath.{name}" for name in NAMES])
active: Final = bool(modules)
"""It is here; ``missing`` says why it is not."""
