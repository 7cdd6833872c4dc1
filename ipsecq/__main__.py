"""``python -m ipsecq`` is the command ``ipsecq``."""

from ipsecq.cli import main

if __name__ == "__main__":
    main()
