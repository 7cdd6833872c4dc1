"""The one exception of the PF_KEY room: an errno for the client."""

from __future__ import annotations

import errno

from ipsecq.errors import IpsecqError


class PfkeyError(IpsecqError):
    """A message is refused; ``errno`` goes into ``sadb_msg_errno`` of the reply (RFC 2367 section 2.1)."""

    code = "pfkey"

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = number
