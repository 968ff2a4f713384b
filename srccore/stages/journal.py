"""What an unfinished stage has done so far."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar, Union

from pydantic import TypeAdapter

from srccore.data.records import Record
from srccore.files import JOURNAL

__all__ = ["Journal"]

R = TypeVar("R", bound=Record)


class Journal(Generic[R]):
    """Records that are durable as soon as they are appended; a later attempt reads them back.

    `StageFolder.finish` deletes it.
    """

    def __init__(self, folder: Path, *kinds: type[R]) -> None:
        """Opens a stage's journal, which need not exist.

        Args:
            folder: The stage's folder.
            kinds: The classes of its records; no two have the same fields.
        """
        self.path = folder / JOURNAL
        # One adapter for all kinds: `|` cannot join classes that are only known when it runs.
        self._read: TypeAdapter[R] = TypeAdapter(Union[kinds])  # type: ignore[arg-type]  # noqa: UP007

    def append(self, *records: R) -> None:
        """Adds records."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(record.model_dump_json() + "\n" for record in records))

    def records(self) -> list[R]:
        """Reads all whole lines, and drops a last one that an interruption cut."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.path.write_bytes(whole)
        return [self._read.validate_json(line) for line in whole.split(b"\n")[:-1]]
