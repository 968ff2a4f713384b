"""How long commands take before they do anything, against importing their libraries.

python benchmarks/startup.py --json startup.json
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from timing import alternate, arguments, report

BIN = Path(sys.executable).parent
WAYS = {
    "import torch, transformers, peft, trl": [
        sys.executable,
        "-c",
        "import torch, transformers, peft; from trl import DPOTrainer",
    ],
    "import kfp": [sys.executable, "-c", "import kfp"],
    "srccore --version": [str(BIN / "srccore"), "--version"],
    "srccore --help": [str(BIN / "srccore"), "--help"],
    "srccore stage search-candidates --help": [
        str(BIN / "srccore"),
        "stage",
        "search-candidates",
        "--help",
    ],
    "import the engine on transformers": [
        sys.executable,
        "-c",
        "import srccore.models.transformers",
    ],
    "import the DPO training": [
        sys.executable,
        "-c",
        "import srccore.training.dpo; from trl import DPOTrainer",
    ],
}


def main() -> None:
    """Runs the benchmark."""
    given = arguments(__doc__)
    ways = {
        name: partial(subprocess.run, command, check=True, capture_output=True)
        for name, command in WAYS.items()
    }
    report({"Start of a process": alternate(ways, given.repetitions)}, given.json)


if __name__ == "__main__":
    main()
