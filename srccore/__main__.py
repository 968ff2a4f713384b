"""``python -m srccore`` is ``srccore``."""

from srccore.cli.main import main

# vLLM's processes import this module, too.
if __name__ == "__main__":
    main()
