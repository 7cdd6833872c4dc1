"""Security associations: the SAD, replay windows, ESN, lifetimes, sequence numbers.  Sans I/O."""
