"""Stage prepare-data: the splits of a run."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from srccore.config import DataConfig
from srccore.data import dataset, sampling
from srccore.data.records import Sample
from srccore.stages import inputs as identify
from srccore.stages.folder import StageFolder
from srccore.training.machine import Figures, Machine

__all__ = ["SPLITS", "prepare_data"]

SPLITS = ("train", "calibration", "heldout")


def prepare_data(config: DataConfig, out: Path, machine: Machine = Machine()) -> Figures:
    """Writes the three splits as Parquet: ``train``, ``calibration`` and ``heldout``.

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
    counts = {split: getattr(config, split) for split in SPLITS}
    if config.source == "embedded":
        rows = {split: _embedded_rows(config, split) for split in SPLITS}
    else:
        rows = _source_rows(config, counts)
    done = 0
    written = {}
    for split in SPLITS:
        written[split] = dataset.write_data(out / f"{split}.parquet", rows[split])
        done += written[split]
        machine.progress(done, sum(counts.values()))
    return folder.finish({"samples": written})


def _embedded_rows(config: DataConfig, split: str) -> Iterator[tuple[Sample, bytes]]:
    from srccore.embedded.world import make_item

    for number in range(getattr(config, split)):
        item = make_item(config.seed, split, number)
        buffer = io.BytesIO()
        item.image.save(buffer, "PNG")
        yield item.sample, buffer.getvalue()


def _source_rows(
    config: DataConfig, counts: dict[str, int]
) -> dict[str, Iterator[tuple[Sample, bytes]]]:
    data = identify.open_source(config)
    total = sum(counts.values())
    shares = {split: count / total for split, count in counts.items()}
    parts = sampling.split(data.samples, shares, config.seed)

    def rows(split: str) -> Iterator[tuple[Sample, bytes]]:
        part = parts[split]
        wanted = sampling.draw(part, min(counts[split], len(part)), seed=config.seed)
        for sample in wanted:
            yield sample, data.encoded(sample.id)

    return {split: rows(split) for split in SPLITS}
