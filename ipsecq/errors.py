"""The exceptions of ipsecq: one root, a stable ``code`` on each class.

The message of every exception holds the offending value and the fix, on one line; the command line prints
it as it is, without a traceback, and exits with ``exit_status``.  Keys never appear in a message.
"""

from __future__ import annotations

import errno


class IpsecqError(Exception):
    """Root of everything that ipsecq raises on purpose."""

    code = "error"
    exit_status = 1


class ConfigError(IpsecqError):
    """A file that an operator wrote is wrong: ``file:line:column: what was expected``.

    ``line`` and ``column`` count from 1; 0 means that the whole file (or line) is meant.
    """

    code = "config"
    exit_status = 2

    def __init__(self, message: str, *, file: str = "", line: int = 0, column: int = 0) -> None:
        self.message, self.file, self.line, self.column = message, file, line, column
        place = ":".join(str(part) for part in (file, line, column) if part)
        super().__init__(f"{place}: {message}" if place else message)


class AlgorithmError(IpsecqError):
    """An algorithm is unknown, a key or salt length is wrong, or a combination is weak or incomplete."""

    code = "algorithm"


class SadError(IpsecqError):
    """An SA cannot be added, changed or found; ``errno`` is what a PF_KEY client is told (RFC 2367)."""

    code = "sad"

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = number


class SpdError(IpsecqError):
    """A policy cannot be added, changed or found; ``errno`` is what a PF_KEY client is told."""

    code = "spd"

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = number


class PolicySyntaxError(IpsecqError):
    """A string of ipsec_set_policy(3) cannot be parsed; ``column`` counts from 1."""

    code = "policy-syntax"
    exit_status = 2

    def __init__(self, message: str, column: int = 0) -> None:
        super().__init__(message)
        self.message, self.column = message, column


class SysctlError(IpsecqError):
    """A sysctl name is unknown or a value out of its range, worded as sysctl(8) words it."""

    code = "sysctl"


class NetfilterError(IpsecqError):
    """nftables or nfnetlink refused something; the message says what and how to mend it."""

    code = "netfilter"


class DaemonError(IpsecqError):
    """The daemon cannot start, or cannot be reached by a command."""

    code = "daemon"


class StateError(IpsecqError):
    """The state directory is unreadable, of another machine or older than what was sent already."""

    code = "state"


class CaptureError(IpsecqError):
    """A capture file is none, is truncated, corrupt or of a kind that is not known: ``file: octet, packet: what``."""

    code = "capture"
    exit_status = 2
