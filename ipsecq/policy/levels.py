"""What a transform's level means once the knobs have spoken (ipsec(4): ``*_deflev``; ipsec_set_policy(3): levels)."""

from __future__ import annotations

from ipsecq.numbers import Level, Mode, Protocol
from ipsecq.policy.model import Transform
from ipsecq.sysctl import FamilyKnobs


def resolve_level(transform: Transform, knobs: FamilyKnobs) -> Level:
    """``default`` resolved by the family's knobs: USE or REQUIRE; other levels as they are.

    IPComp has no knob: its default is USE.  Mode ``any`` counts as transport.
    """
    if transform.level is not Level.DEFAULT:
        return transform.level
    tunnel = transform.mode is Mode.TUNNEL
    if transform.protocol is Protocol.ESP:
        value = knobs.esp_net_deflev if tunnel else knobs.esp_trans_deflev
    elif transform.protocol is Protocol.AH:
        value = knobs.ah_net_deflev if tunnel else knobs.ah_trans_deflev
    else:
        return Level.USE
    return Level.REQUIRE if value == 2 else Level.USE


def enforced_inbound(transform: Transform, knobs: FamilyKnobs) -> bool:
    """True when an inbound packet must have had this transform: ESP and AH under require or unique.

    ``use`` is a wish of the sender's side, and a packet that was not worth compressing carries no sign of IPComp, so
    neither is enforced.
    """
    return transform.protocol is not Protocol.IPCOMP and resolve_level(transform, knobs) >= Level.REQUIRE
