"""What an unfinished stage has done so far."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Union

from pydantic import TypeAdapter, ValidationError

from srccore.data.records import Record
from srccore.files import JOURNAL, atomically
from srccore.stages.parts import Parts

__all__ = ["Journal"]

R = TypeVar("R", bound=Record)


class Journal(Generic[R]):
    """Records that are kept as soon as they are appended; a later attempt reads them back.

    They are lines of a file in the stage's folder, which `StageFolder.finish` deletes. If that
    folder may be lost with its pod, a bucket gets the lines, too, in parts. Use it as a context
    manager: opening it reads the parts, and closing it publishes the last one, also after an error.
    """

    def __init__(self, folder: Path, *kinds: type[R], parts: Parts | None = None) -> None:
        """Opens a stage's journal, which need not exist.

        Args:
            folder: The stage's folder.
            kinds: The classes of its records; no two have the same fields.
            parts: Where its lines are published; None if the folder is durable.
        """
        self.path = folder / JOURNAL
        # One adapter for all kinds: `|` cannot join classes that are only known when it runs.
        self._read: TypeAdapter[R] = TypeAdapter(Union[kinds])  # type: ignore[arg-type]  # noqa: UP007
        self._parts = parts

    def __enter__(self) -> Self:
        """Takes over what was published, and publishes what was not.

        Raises:
            UserError: The bucket cannot be read.
        """
        if self._parts is not None:
            published = self._parts.read()
            known = set(published)
            left = [line for line, _ in self._readable() if line not in known]
            if published:
                with atomically(self.path) as temporary:
                    temporary.write_text(_joined([*published, *left]), encoding="utf-8")
            self._parts.start()
            self._parts.add(left, ())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publishes what is not published yet."""
        if self._parts is not None:
            self._parts.close()

    def append(self, *records: R) -> None:
        """Adds records."""
        lines = [record.model_dump_json() for record in records]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_joined(lines))
        if self._parts is not None:
            self._parts.add(lines, {_about(record)[1] for record in records})

    def records(self) -> list[R]:
        """Reads all whole lines, and drops a last one that an interruption cut.

        Of several records of the same thing, the first counts: two pods may have done the same
        work. Lines that cannot be read are left out, and their work is done again.
        """
        found: dict[tuple[Any, ...], R] = {}
        for _, record in self._readable():
            found.setdefault(_about(record), record)
        return list(found.values())

    def _readable(self) -> list[tuple[str, R]]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            self.path.write_bytes(whole)
        found = []
        lines = whole.split(b"\n")[:-1]
        for line in lines:
            with contextlib.suppress(ValidationError):
                record = self._read.validate_json(line)
                found.append((line.decode(), record))
        if unreadable := len(lines) - len(found):
            print(
                f"Ignoring unreadable lines of {self.path} ({unreadable} of {len(lines)}): what "
                "they should have is done again.",
                file=sys.stderr,
            )
        return found


def _joined(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _about(record: Record) -> tuple[Any, ...]:
    """What identifies a record: its kind, its sample and, if it is about a pair, the pair."""
    return type(record), *(getattr(record, each, None) for each in ("sample_id", "first", "second"))
