"""``python -m vaelib`` is the command ``vaelib``."""

from vaelib.cli import main

main()
