"""``python -m bnntvm`` is the command ``bnntvm``."""

from bnntvm.cli import main

if __name__ == "__main__":
    main()
