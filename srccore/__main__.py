"""``python -m srccore`` is ``srccore``."""

from srccore.cli.main import main

main()
