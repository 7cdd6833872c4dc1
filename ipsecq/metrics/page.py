"""The status page: one file with everything in it, drawn by its own script from the data of :mod:`ipsecq.metrics.live`.

The browser is told to load and run nothing else (Content-Security-Policy with the hashes of the one script and the one
style sheet), and the page writes what it shows as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Final

TEMPLATE: Final = Path(__file__).with_name("status.html").read_text("utf-8")
_MARK: Final = "@DATA@"


def _hash(pattern: str) -> str:
    found = re.search(pattern, TEMPLATE, re.DOTALL)
    if found is None:
        raise ValueError(f"status.html has no {pattern}")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


POLICY: Final = (
    f"default-src 'none'; script-src {_hash('<script>(.*?)</script>')}; style-src {_hash('<style>(.*?)</style>')}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The header Content-Security-Policy."""


def render(data: dict[str, Any]) -> bytes:
    """The page with its first data, so that it shows something before it asks for more."""
    # No "<" in the data: it could end the element that the data stands in.
    return TEMPLATE.replace(_MARK, json.dumps(data).replace("<", "\\u003c")).encode()
