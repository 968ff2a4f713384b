"""What a finished stage says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from srccore.errors import UserError
from srccore.files import MANIFEST, STARTED
from srccore.hashing import hash_file

__all__ = ["Manifest", "check_outputs", "parse_manifest", "read_manifest"]


class Manifest(BaseModel):
    """A finished stage: what went in, what came out, and what it took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]
    """Hash of each input."""
    outputs: dict[str, str]
    """Hash of each file written, by its path in the folder."""
    figures: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    gpu_seconds: float = 0.0
    """`seconds` times the GPUs that the stage had to itself, with loading and waiting."""
    peak_memory_mb: float
    """Peak resident memory of the process while the stage ran, in MiB, without its workers; on
    kernels other than Linux, since the process began."""
    peak_gpu_memory_mb: float | None = None
    """Most memory that torch had reserved on the process's GPU while the stage ran, in MiB; None
    without a GPU, or if workers or vLLM used it."""
    address: str = ""
    """Where a step of a pipeline published the stage, below the artifact root."""
    work: dict[str, int] | None = None
    """What was computed on a stage's model (`srccore.method.engine.Work`); in a training, forward.
    Like the time and the memory, of the last attempt: what an interrupted one had made durable is
    not in it."""

    @property
    def measured(self) -> dict[str, Any]:
        """What the stage took: seconds, and what was computed."""
        found: dict[str, Any] = {"seconds": self.seconds, "gpu_seconds": self.gpu_seconds}
        return found | ({"work": self.work} if self.work else {})


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a finished stage.

    Raises:
        UserError: The manifest is missing or unreadable.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    return parse_manifest(text, str(folder))


def check_outputs(path: Path) -> Manifest | None:
    """Checks what a stage wrote against its manifest, before it is used.

    Args:
        path: The folder of a stage, or a file or folder in it.

    Returns:
        The stage's manifest; None if this is not the work of a finished stage.

    Raises:
        UserError: The manifest is unreadable, or an output is missing or has changed.
    """
    path = path.absolute()
    # A stage's files are at most two folders deep: adapter/adapter_model.safetensors.
    for folder in (path, *list(path.parents)[:2]):
        if (folder / STARTED).is_file() and (folder / MANIFEST).is_file():
            manifest = read_manifest(folder)
            for name, sha256 in manifest.outputs.items():
                file = folder / name
                is_wanted = path in (folder, file, *file.parents)
                if is_wanted and not (file.is_file() and hash_file(file) == sha256):
                    raise UserError(
                        f"{file} is missing or has changed since {manifest.stage} wrote it: the "
                        f"SHA-256 in {MANIFEST} differs.",
                        f"Delete {folder}, so that the stage is done again, or restore the file. "
                        "To use a file of your own, keep it in another folder.",
                    )
            return manifest
    return None


def parse_manifest(text: str, folder: str) -> Manifest:
    """Parses the manifest of a finished stage.

    Args:
        text: The file's text; empty if there is none.
        folder: Its folder, for the error.

    Raises:
        UserError: It is not a whole manifest.
    """
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        raise UserError(
            f"{folder} is not the folder of a finished stage: {MANIFEST} is missing or unreadable.",
            "Finish the stage that writes it first.",
        ) from None
