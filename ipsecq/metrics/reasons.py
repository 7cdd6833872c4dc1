"""Every reason for which a packet is dropped, in words for people.

One list for the metrics' reference, ``ipsecq top``, ``ipsecq monitor`` and the status page.
"""

from __future__ import annotations

from typing import Final

from ipsecq.counters import FIRST_DROP, Counter

LAST_DROP: Final = 127

DROPS: Final = tuple(counter for counter in Counter if FIRST_DROP <= counter <= LAST_DROP)
"""Every reason for which a packet is dropped."""

_SA_NEEDED: Final = "no SA for its SPI"
_DISABLED: Final = "the protocol is switched off by its sysctl"
_NUMBERS: Final = "the SA's sequence numbers are used up"
_REFUSED: Final = "the SA may not send: which numbers it used before is not known (ipsecq status says why)"
_KEYS: Final = "ICV failure: another key or algorithm at the other end, or altered on the way"
_REPLAYED: Final = "replay: seen before, or left of the window"
_UNUSED: Final = "netstat's name; ipsecq never counts it"
_EXPIRED: Final = "the SA is at a hard limit of its lifetime"

REASONS: Final[dict[Counter, str]] = {
    Counter.IP_MALFORMED: "malformed IP header",
    Counter.IP_FRAGMENT: "a fragment, which transport mode cannot protect",
    Counter.IP_TOOBIG: "too long for the MTU, and must not be fragmented",
    Counter.OUT_POLVIO: "outbound policy violated",
    Counter.OUT_NOSA: "outbound: the policy wants an SA and none came in time",
    Counter.OUT_NOMEM: _UNUSED,
    Counter.OUT_NOROUTE: _UNUSED,
    Counter.OUT_INVAL: "outbound: a packet that the engine could not handle",
    Counter.OUT_DISCARD: "outbound: the policy says discard",
    Counter.OUT_HELD_OVERFLOW: "outbound: too many packets wait for an SA",
    Counter.IN_POLVIO: "inbound: came in another way than the policy wants (in clear, or by another SA)",
    Counter.IN_NOMEM: _UNUSED,
    Counter.IN_INVAL: "inbound: outer ECN says congestion, inner packet cannot (RFC 6040), or the engine failed",
    Counter.IN_DISCARD: "inbound: the policy says discard",
    Counter.IN_TOODEEP: "inbound: too many headers inside each other",
    Counter.IN_HISTORY: "inbound: its transforms are not those of the policy (check_policy_history)",
    Counter.IN_INTERFACE: "inbound: its SA has the reqid of an interface and other ends, or another mode",
    Counter.ESP_HDROPS: "too short for ESP",
    Counter.ESP_NOTDB: f"ESP: {_SA_NEEDED}",
    Counter.ESP_BADKCR: _UNUSED,
    Counter.ESP_QFULL: _UNUSED,
    Counter.ESP_NOXFORM: _UNUSED,
    Counter.ESP_BADILEN: "ESP: not whole cipher blocks: another algorithm than the SA says, or cut off",
    Counter.ESP_WRAP: f"ESP: {_NUMBERS}",
    Counter.ESP_BADENC: "ESP: padding is wrong after decryption: probably another key or ICV length",
    Counter.ESP_BADAUTH: f"ESP: {_KEYS}",
    Counter.ESP_REPLAY: f"ESP: {_REPLAYED}",
    Counter.ESP_INVALID: "ESP: no IP packet inside the tunnel",
    Counter.ESP_TOOBIG: "longer than 65535 octets with ESP",
    Counter.ESP_PDROPS: f"ESP: {_DISABLED}",
    Counter.ESP_CRYPTO: _UNUSED,
    Counter.ESP_EXPIRED: f"ESP: {_EXPIRED}",
    Counter.ESP_NOSEQ: f"ESP: {_REFUSED}",
    Counter.ESP_NATT: "ESP: in UDP while the SA is plain esp, or plain while the SA is esp-udp",
    Counter.AH_HDROPS: "too short for AH",
    Counter.AH_NOTDB: f"AH: {_SA_NEEDED}",
    Counter.AH_BADKCR: _UNUSED,
    Counter.AH_QFULL: _UNUSED,
    Counter.AH_NOXFORM: _UNUSED,
    Counter.AH_BADAUTHL: "AH: ICV of another length than the SA's algorithm has",
    Counter.AH_WRAP: f"AH: {_NUMBERS}",
    Counter.AH_BADAUTH: f"AH: {_KEYS}",
    Counter.AH_REPLAY: f"AH: {_REPLAYED}",
    Counter.AH_INVALID: "AH: no IP packet inside the tunnel",
    Counter.AH_TOOBIG: "longer than 65535 octets with AH",
    Counter.AH_PDROPS: f"AH: {_DISABLED}",
    Counter.AH_CRYPTO: _UNUSED,
    Counter.AH_EXPIRED: f"AH: {_EXPIRED}",
    Counter.AH_NOSEQ: f"AH: {_REFUSED}",
    Counter.IPCOMP_HDROPS: "too short for IPComp",
    Counter.IPCOMP_NOTDB: "IPComp: no SA for its CPI",
    Counter.IPCOMP_BADKCR: _UNUSED,
    Counter.IPCOMP_QFULL: _UNUSED,
    Counter.IPCOMP_NOXFORM: _UNUSED,
    Counter.IPCOMP_WRAP: _UNUSED,
    Counter.IPCOMP_INVALID: "IPComp: cannot be decompressed",
    Counter.IPCOMP_TOOBIG: "longer than 65535 octets with IPComp",
    Counter.IPCOMP_PDROPS: f"IPComp: {_DISABLED}",
    Counter.IPCOMP_CRYPTO: _UNUSED,
    Counter.IPCOMP_BOMB: "IPComp: longer than 65535 octets when decompressed",
    Counter.IPCOMP_EXPIRED: f"IPComp: {_EXPIRED}",
    Counter.SEND_FAILED: "the kernel refused to send the finished datagram (no route, too long, buffers full)",
    Counter.INJECT_FAILED: "the decapsulated packet did not fit the queue of enc0",
    Counter.OVERLOAD: "a TCP super-packet that could not be cut",
    Counter.INTERFACE_DOWN: "decapsulated for an interface (ipsec0) that is down",
}
"""Every drop, in words."""


def reason(counter: int) -> str:
    """Why a packet was dropped, for people."""
    return REASONS[Counter(counter)]
