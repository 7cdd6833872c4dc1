"""The algorithm registry over ``cryptography``.  Sans I/O."""
