"""ESP, AH, IPComp and UDP encapsulation: pure functions over buffers.  Sans I/O."""
