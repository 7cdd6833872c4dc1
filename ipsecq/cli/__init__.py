"""The command ``ipsecq``: reads arguments, calls the rooms below, prints what they say.  Computes nothing."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

from ipsecq.errors import IpsecqError


def main() -> None:
    """Entry point.  An error that ipsecq raises on purpose is one line on stderr and an exit status; no traceback."""
    from ipsecq.cli.app import app  # noqa: PLC0415  (imports are half of what a short command costs)

    try:
        try:
            app()
        except SystemExit:
            _flush()  # not while Python ends: nobody could say any more what went wrong
            raise
    except IpsecqError as error:
        print(f"ipsecq: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        # ``ipsecq … | head``: the reader has seen enough.
        _drop_output()
        sys.exit(141)
    except OSError as error:
        print(f"ipsecq: {_where(error)}{error.strerror or error}", file=sys.stderr)
        _drop_output()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Without a file's name these come from ``print``."""


def _where(error: OSError) -> str:
    """What could not be read or written, with a colon; empty when nobody knows."""
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: "
    return "standard output: " if error.errno in _FULL else ""


def _flush() -> None:
    if sys.stdout is not None:  # closed by who started us
        sys.stdout.flush()


def _drop_output() -> None:
    """Python would try once more to write the output while it ends, and complain."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
