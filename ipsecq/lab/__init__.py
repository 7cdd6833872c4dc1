"""Gateways in network namespaces: the floor of ``make demo``, ``make bench`` and the tests that need real packets."""
