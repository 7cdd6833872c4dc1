"""The SPD compiled to an nftables ruleset; loading; capability detection."""
