"""``ipsecq doctor``: the faults that gateways have, each with the way to mend it.

:mod:`machine` looks at kernel and sysctls, :mod:`rules` at SAs and policies, :mod:`running` at what the daemon counts,
:mod:`routes` at routes and the way to the peers, :mod:`firewall` at other people's rules.
"""
