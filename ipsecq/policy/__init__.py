"""Security policies: the SPD, selectors, levels, ipsec_set_policy(3) strings.  Sans I/O."""
