"""What identifies an input of a stage: one function per kind.

A stage's folder and a pipeline's step both ask here, so that the two cannot disagree on whether
work has been done. On a disk everything is identified by its content; in a bucket by its listing
(names, sizes and ETags), which is its content as far as the store knows it. An endpoint is
identified by its settings: the model's name, and not the address that serves it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from srccore import storage
from srccore.config import DataConfig, TextModelConfig
from srccore.data import dataset
from srccore.data.index import index_of, is_indexed
from srccore.data.records import Sample
from srccore.errors import UserError
from srccore.files import STARTED
from srccore.hashing import hash_file, hash_text
from srccore.models.policy import Policy, read_policy, resolve_model_path
from srccore.stages import splits
from srccore.stages.manifest import check_outputs, read_manifest

__all__ = [
    "checkpoint",
    "content",
    "data_source",
    "fetch_source",
    "policy",
    "policy_at",
    "setting",
    "source_samples",
]


def content(name: str, address: Path | str) -> str:
    """Identifies a file or folder: a data set, the output of a stage, an adapter.

    Args:
        name: What it is, for the error.
        address: A path or ``s3://...``.

    Returns:
        A hash: of a finished stage's outputs, of other files' bytes, of a bucket's listing.

    Raises:
        UserError: There is no such file or folder, or it is a stage's that has not finished, or
            that has changed since.
    """
    if isinstance(address, str) and storage.is_remote(address):
        return _listing(address)
    path = storage.local_path(address) if isinstance(address, str) else address
    if is_indexed(path):
        # It has the texts and the hashes of the images, and may be all that is on this machine.
        path = Path(index_of(str(path)))
    manifest = check_outputs(path)
    if path.is_file():
        return hash_file(path)
    if (path / STARTED).is_file():
        outputs = (manifest or read_manifest(path)).outputs
        return hash_text(json.dumps(outputs, sort_keys=True))
    if path.is_dir():
        # A checkpoint is the same whatever its card says.
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "README.md")
        return hash_text("\n".join(f"{p.relative_to(path)} {hash_file(p)}" for p in files))
    raise UserError(f"Input {name} does not exist: {path}.", "Check the path.")


def _listing(uri: str) -> str:
    """Identifies what is in a bucket, and the index beside it, which has the texts."""
    found = storage.fingerprint(uri)
    if uri.endswith(".parquet") and storage.exists(index := index_of(uri)):
        found = hash_text(f"{found} {storage.fingerprint(index)}")
    return found


def fetch_source(config: DataConfig) -> Path:
    """Brings the data set that a run starts from to this machine.

    Raises:
        UserError: It does not exist.
    """
    if not storage.exists(config.source):
        raise UserError(f"Input data.source does not exist: {config.source}.", "Check the path.")
    splits.fetch_index(config.source)
    return storage.fetch(config.source)


def source_samples(config: DataConfig) -> list[Sample]:
    """Reads the samples that a run starts from, without their images.

    Raises:
        UserError: The data set does not exist, has no rows or a bad one, or is not a data set.
    """
    samples = dataset.read_samples(fetch_source(config))
    if not samples:
        raise UserError(f"The data set {config.source} has no rows.", "Check data.source.")
    return samples


def data_source(config: DataConfig) -> str:
    """Identifies the data set that a run starts from, with the images that its rows name."""
    if config.source == "embedded":
        return config.source
    if storage.is_remote(config.source):
        return _listing(config.source)
    return dataset.content_hash(fetch_source(config))


def checkpoint(path: str) -> str:
    """Identifies a checkpoint.

    Args:
        path: As `srccore.config.TextModelConfig` names it.

    Returns:
        A hash of its content, without its card; a hub id as it is.

    Raises:
        UserError: It is not a checkpoint with safetensors weights.
    """
    if storage.is_remote(path):
        return storage.fingerprint(path)
    found = resolve_model_path(path)
    return content("model", Path(found)) if Path(found).is_dir() else found


def policy(
    value: Policy,
    adapter: Callable[[str], str] = lambda each: content("adapter", storage.fetch(each)),
) -> str:
    """Identifies a policy: its base model and its adapters, in order.

    Args:
        value: The policy; adapters are absolute or URIs.
        adapter: What identifies an adapter.

    Returns:
        JSON of the base, its content and the adapters.
    """
    base = value.base.model_dump(mode="json")
    adapters = [adapter(each) for each in value.adapters]
    return json.dumps([base, checkpoint(value.base.path), adapters])


def policy_at(path: Path) -> str:
    """Identifies the policy of a ``policy.json``, or of the folder that has one."""
    return hash_text(policy(read_policy(path)))


def setting(value: object) -> str | None:
    """Identifies what a section of the configuration names; None if it names nothing."""
    if isinstance(value, TextModelConfig):
        return checkpoint(value.path)
    return data_source(value) if isinstance(value, DataConfig) else None
