"""Stage prepare-data: the splits of a run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

from srccore.config import DataConfig
from srccore.data import dataset, parquet, sampling
from srccore.data.records import Sample
from srccore.stages import inputs as identify
from srccore.stages.folder import StageFolder
from srccore.training.machine import Figures, Machine

__all__ = ["SPLITS", "prepare_data"]

SPLITS = ("train", "calibration", "heldout")

_Rows = Iterator[tuple[str, Sample, bytes]]


def prepare_data(config: DataConfig, out: Path, machine: Machine = Machine()) -> Figures:
    """Writes the three splits as Parquet: ``train``, ``calibration`` and ``heldout``.

    Your own data set is copied in one pass, in the order of its rows.

    Args:
        config: The data's settings.
        out: The output folder.
        machine: How the work is done; progress counts samples written.

    Returns:
        The number of samples of each split.
    """
    source = {"source": identify.data_source(config)}
    folder = StageFolder("prepare-data", out, config=config, sources=source)
    if folder.figures is not None:
        return folder.figures
    total = sum(getattr(config, split) for split in SPLITS)
    rows = _embedded_rows(config) if config.source == "embedded" else _source_rows(config)
    with contextlib.ExitStack() as files:
        writers = {
            split: files.enter_context(parquet.parquet_writer(out / f"{split}.parquet"))
            for split in SPLITS
        }
        for done, (split, sample, encoded) in enumerate(rows, start=1):
            writers[split].add(sample, encoded)
            machine.progress(done, total)
    return folder.finish({"samples": {split: writers[split].count for split in SPLITS}})


def _embedded_rows(config: DataConfig) -> _Rows:
    from srccore.embedded.world import make_item

    for split in SPLITS:
        for number in range(getattr(config, split)):
            item = make_item(config.seed, split, number)
            buffer = io.BytesIO()
            item.image.save(buffer, "PNG")
            yield split, item.sample, buffer.getvalue()


def _source_rows(config: DataConfig) -> _Rows:
    counts = {split: getattr(config, split) for split in SPLITS}
    shares = {split: count / sum(counts.values()) for split, count in counts.items()}
    parts = sampling.split(identify.source_samples(config), shares, config.seed)
    split_of = {
        sample.id: split
        for split, part in parts.items()
        for sample in sampling.draw(part, min(counts[split], len(part)), seed=config.seed)
    }
    for sample, encoded in dataset.stream_data(identify.fetch_source(config)):
        if split := split_of.get(sample.id):
            yield split, sample, encoded()
