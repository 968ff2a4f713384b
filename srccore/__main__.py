"""``python -m srccore`` is ``srccore``."""

from srccore.cli import main

main()
