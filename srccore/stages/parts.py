"""The parts of a journal in a bucket, from which another pod resumes when one is lost.

A part is a file of whole lines under a name of its own: its number and the hash of its content. Its
first line has the key of the stage, which is a hash of all its inputs and settings, so neither
damaged lines nor those of other work are ever taken over. Nothing replaces a part: two pods that do
the same work add parts side by side, and of two records of the same thing, the one in the first
part counts for all that read them. The stage's manifest seals them; after that they are removed.
"""

from __future__ import annotations

import json
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence

from srccore import storage
from srccore.errors import UserError
from srccore.hashing import hash_text

__all__ = ["PARTS", "Parts"]

PARTS = "parts"
"""The folder for parts below the address of a stage."""
SAMPLES = 64
"""Samples in a part: a lost pod loses fewer."""
SECONDS = 300.0
"""How old the first line of a part is at most when the part is published."""
_NAME = re.compile(r"(\d{5,})-([0-9a-f]{16})\.jsonl")


class Parts:
    """Publishes the lines of a journal while the stage works, in a thread of its own.

    The stage never waits for the store, and does not fail if a part cannot be published: its lines
    become part of the next one.
    """

    def __init__(self, uri: str, key: str) -> None:
        """Does not access the bucket yet.

        Args:
            uri: The folder for the parts.
            key: The key of the stage.
        """
        self.uri = uri
        self._header = json.dumps({"record": "part", "version": 1, "key": key})
        self._number = 0
        # Its `put` may be interrupted by a signal whose handler raises.
        self._queue: queue.SimpleQueue[tuple[Sequence[str], Iterable[str]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._publish_in_time, name="parts", daemon=True)
        self._has_warned = False

    def read(self) -> list[str]:
        """Reads the lines of all parts, in the order of the parts.

        Raises:
            UserError: The bucket cannot be read.
        """
        if not storage.exists(self.uri):
            return []
        lines: list[str] = []
        for file in storage.listing(self.uri):
            if name := _NAME.fullmatch(file.path):
                self._number = max(self._number, int(name[1]) + 1)
                lines += self._lines(storage.join(self.uri, file.path), name[2])
        return lines

    def _lines(self, uri: str, wanted: str) -> list[str]:
        try:
            text = storage.read_text(uri)
        except UserError:
            if storage.exists(uri):
                raise
            # Another pod has finished the work, and is removing the parts.
            return []
        header, *lines = text.split("\n")[:-1] or [""]
        if _hash(text) == wanted and header == self._header:
            return lines
        print(
            f"Ignoring {uri}: it is damaged, or a part of other work. What it should have is done "
            "again.",
            file=sys.stderr,
        )
        return []

    def start(self) -> None:
        """Starts to publish."""
        self._thread.start()

    def add(self, lines: Sequence[str], samples: Iterable[str]) -> None:
        """Adds lines to the next part.

        Args:
            lines: What became known together, which stays together; without their ends.
            samples: The ids of the samples that they are about.
        """
        self._queue.put((lines, samples))

    def close(self) -> None:
        """Publishes what is left, and waits for it."""
        self._queue.put(None)
        self._thread.join()

    def _publish_in_time(self) -> None:
        lines: list[str] = []
        samples: set[str] = set()
        due = float("inf")
        is_open = True
        while is_open:
            try:
                left = due - time.monotonic()
                added = self._queue.get(timeout=max(0.0, left) if lines else None)
            except queue.Empty:
                added = (), ()
            if added is None:
                is_open = False
            elif added[0]:
                due = due if lines else time.monotonic() + SECONDS
                lines += added[0]
                samples.update(added[1])
            is_due = not is_open or len(samples) >= SAMPLES or time.monotonic() >= due
            if lines and is_due:
                if self._has_published(lines):
                    lines = []
                # Otherwise they wait as long as new ones: the store may be busy.
                samples, due = set(), time.monotonic() + SECONDS

    def _has_published(self, lines: Sequence[str]) -> bool:
        text = "".join(f"{line}\n" for line in (self._header, *lines))
        uri = storage.join(self.uri, f"{self._number:05}-{_hash(text)}.jsonl")
        try:
            storage.create(uri, text.encode(), patient=False)
        except Exception as error:  # errors of the store's client, too
            if not self._has_warned:
                print(
                    f"Could not publish {uri}: {error}\nThe work continues, and later parts will "
                    "have these records, too.",
                    file=sys.stderr,
                )
            self._has_warned = True
            return False
        self._number += 1
        return True


def _hash(text: str) -> str:
    return hash_text(text)[:16]
