"""Times what it takes to publish a journal in parts, beside the journal alone.

    AWS_ENDPOINT_URL=... python benchmarks/parts.py --root s3://BUCKET/PATH

A pod's share of a round of `llava-1.5-7b` in 16 shards: 750 samples with 5 candidates of 600
characters each, and the 30 ratings of each of them. CPU time of the process, with the thread that
publishes and the store's client, but without the model: it is all that a stage pays for its parts,
beside the wait for the last one.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from timing import alternate, report

from srccore import storage
from srccore.data.records import Candidate, CandidateSet, Rating, Record
from srccore.stages.journal import Journal
from srccore.stages.parts import Parts

SAMPLES = 750
PAIRS = [(first, second) for first in "abcdef" for second in "abcdef" if first != second]


def candidates(number: int) -> list[Record]:
    """What a search finds for a sample."""
    draw = random.Random(number)
    texts = ["".join(draw.choices(string.ascii_lowercase + " ", k=600)) for _ in range(5)]
    found = tuple(
        Candidate(id=f"{number}-{place}", text=text, log_probability=-50.0, token_count=150)
        for place, text in enumerate(texts)
    )
    return [CandidateSet(sample_id=f"s{number}", candidates=found)]


def ratings(number: int) -> list[Record]:
    """What R-Scorer finds for a sample."""
    each = (0.1, 0.2, 0.4, 0.2, 0.1)
    return [
        Rating(sample_id=f"s{number}", first=first, second=second, probabilities=each, mass=0.999)
        for first, second in PAIRS
    ]


def keep(found: Sequence[list[Record]], kind: type[Record], root: str) -> None:
    """Appends the records of all samples to a new journal, with parts if there is a root."""
    uri = f"{root}/{uuid.uuid4().hex}/parts"
    parts = Parts(uri, "key") if root else None
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder), kind, parts=parts) as journal,
    ):
        for records in found:
            journal.append(*records)
    if root:
        stored = storage.listing(uri)
        print(json.dumps({"parts": len(stored), "bytes": sum(each.size for each in stored)}))
        storage.remove(uri)


def main() -> None:
    """Times both kinds of record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="a folder in a bucket")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tables = {}
    works: dict[str, tuple[Callable[[int], list[Record]], type[Record]]] = {
        "candidates of 750 samples": (candidates, CandidateSet),
        "ratings of 750 samples": (ratings, Rating),
    }
    for title, (make, kind) in works.items():
        found = [make(number) for number in range(SAMPLES)]
        ways = {
            "journal": lambda found=found, kind=kind: keep(found, kind, ""),
            "journal with parts": lambda found=found, kind=kind: keep(found, kind, given.root),
        }
        tables[title] = alternate(ways, given.repetitions, time.process_time)
    report(tables, given.json)


if __name__ == "__main__":
    main()
