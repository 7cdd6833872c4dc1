"""The command ``ipsecq``: reads arguments, calls the rooms below, prints what they say.  Computes nothing."""

from __future__ import annotations

import os
import sys

from ipsecq.errors import IpsecqError


def main() -> None:
    """Entry point.  An error that ipsecq raises on purpose is one line on stderr and an exit status; no traceback."""
    from ipsecq.cli.app import app  # noqa: PLC0415  (imports are half of what a short command costs)

    try:
        app()
    except IpsecqError as error:
        print(f"ipsecq: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # ``ipsecq … | head``: the reader has seen enough.  Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
