"""Collects the data of a report from a run folder, finished or still in progress."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import yaml
from PIL import Image

from srccore.config import RunConfig
from srccore.data import dataset
from srccore.data.records import REFERENCE, Preference, Rating, read_records
from srccore.files import atomically, writable
from srccore.method import evaluation
from srccore.run.folder import RunFolder
from srccore.run.loop import load_run
from srccore.run.report import page
from srccore.stages.evaluation import read_outcomes
from srccore.stages.manifest import Manifest, read_manifest
from srccore.stages.splits import open_split
from srccore.stages.table import STAGES

__all__ = ["collect", "overall_change", "write_report"]

CARDS = 6
"""Sample cards per round: those with the largest margins, shared out over the categories."""
THUMBNAIL = 240
"""Pixels of the longer side of a card's image: twice its size on the page."""
TINY_NOTE = (
    "The flaws in the embedded model's rationales are built in, to imitate those of real models. "
    "The size of the gain shows that the machinery works, not what a real model would gain."
)


def write_report(run: Path) -> Path:
    """Writes ``report.html`` into a run folder.

    Args:
        run: The run folder.

    Returns:
        The page's path.

    Raises:
        UserError: It is not a run folder, or cannot be written.
    """
    path = RunFolder(run).report
    text = page.render(collect(run))
    with writable(path, "folder"), atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def collect(run: Path) -> page.ReportData:
    """Reads what the stages of a run have finished.

    Args:
        run: The run folder.

    Returns:
        The report's data; what the run has not reached yet is empty.
    """
    config = load_run(run)
    folder = RunFolder(run)
    manifests = dict(_manifests(folder))
    rounds = folder.known_figures()
    scorer = manifests.get(folder.output("train-scorer"))
    return page.ReportData(
        title=config.name,
        created=datetime.now(UTC),
        finished=len(rounds) == config.rounds + 1,
        rounds_planned=config.rounds,
        rounds=tuple(evaluation.Figures.model_validate(figures) for figures in rounds),
        overall_change=overall_change(run, config, len(rounds) - 1) if len(rounds) > 1 else {},
        folding={
            folder.round_of(output) or 0: page.Folded.model_validate(manifest.figures["folding"])
            for output, manifest in manifests.items()
            if "folding" in manifest.figures
        },
        curation=tuple(_curation(folder, manifests)),
        scorer=scorer.figures["validation"] if scorer else None,
        search=tuple(_search(folder, manifests)),
        scoring=tuple(_scoring(folder, manifests)),
        samples=tuple(_cards(folder, manifests)),
        stages=tuple(
            page.StageTime(
                name=output.name,
                round=folder.round_of(output),
                seconds=manifest.seconds,
                peak_memory_mb=manifest.peak_memory_mb,
                peak_gpu_memory_mb=manifest.peak_gpu_memory_mb,
                gpu_seconds=manifest.gpu_seconds,
                work=manifest.work,
            )
            for output, manifest in manifests.items()
        ),
        versions={
            name: version
            for manifest in manifests.values()
            for name, version in manifest.versions.items()
        },
        hashes={
            str(output.relative_to(run)): manifest.key for output, manifest in manifests.items()
        },
        config_yaml=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        notes=tuple(_notes(folder, config, manifests)),
    )


def _manifests(run: RunFolder) -> Iterator[tuple[Path, Manifest]]:
    """Finished stages with their manifests, in the order in which a run executes them."""
    found = {output: read_manifest(output) for output in run.finished_stages()}
    order = list(STAGES)

    def place(output: Path) -> tuple[int, int, str]:
        return run.round_of(output) or 0, order.index(found[output].stage), str(output)

    for output in sorted(found, key=place):
        yield output, found[output]


def overall_change(run: Path, config: RunConfig, last: int) -> dict[str, evaluation.Change]:
    """Compares the policy of a round with the one after stage 1 by the paired bootstrap.

    Args:
        run: The run folder.
        config: The run's configuration.
        last: The round, at least 1.

    Returns:
        The change by figure.
    """
    folder = RunFolder(run)
    samples = dataset.read_samples(folder.split("heldout"))
    before, after = (
        read_outcomes(samples, folder.output("evaluate", number)) for number in (0, last)
    )
    return evaluation.paired_change(before, after, config.evaluation.resamples, config.seed)


def _curation(run: RunFolder, manifests: dict[Path, Manifest]) -> Iterator[page.RoundCuration]:
    for output, manifest in manifests.items():
        number = run.round_of(output)
        if manifest.stage == "curate-preference" and number is not None:
            yield page.RoundCuration.model_validate({"round": number, **manifest.figures})


def _shards(
    run: RunFolder, manifests: dict[Path, Manifest], stage: str
) -> Iterator[tuple[int, list[Manifest]]]:
    """The manifests of all shards of a stage, by round."""
    by_round: dict[int, list[Manifest]] = {}
    for output, manifest in manifests.items():
        number = run.round_of(output)
        if manifest.stage == stage and number is not None:
            by_round.setdefault(number, []).append(manifest)
    yield from sorted(by_round.items())


def _search(run: RunFolder, manifests: dict[Path, Manifest]) -> Iterator[page.RoundSearch]:
    """One row per round: the sums over its shards."""
    for number, shards in _shards(run, manifests, "search-candidates"):
        counts = {
            name: sum(shard.figures[name] for shard in shards)
            for name in page.RoundSearch.model_fields
            if name != "round"
        }
        yield page.RoundSearch(round=number, **counts)


def _scoring(run: RunFolder, manifests: dict[Path, Manifest]) -> Iterator[page.RoundScoring]:
    """One row per round: the mean over its shards, weighted by their number of ratings."""
    for number, found in _shards(run, manifests, "score-candidates"):
        # A shard whose samples have no reference has no ratings.
        shards = [shard for shard in found if shard.figures["ratings"]]
        total = sum(shard.figures["ratings"] for shard in shards)
        means = {
            name: sum(shard.figures[name] * shard.figures["ratings"] for shard in shards) / total
            for name in ("swap_consistency", "rating_mass")
            if total and all(shard.figures[name] is not None for shard in shards)
        }
        yield page.RoundScoring.model_validate({"round": number, **means})


def _cards(run: RunFolder, manifests: dict[Path, Manifest]) -> Iterator[page.SampleCard]:
    rounds = [
        run.round_of(output) or 0
        for output, manifest in manifests.items()
        if manifest.stage == "curate-preference"
    ]
    if not rounds:
        return
    data = open_split(run.split("calibration"))
    for number in rounds:
        file = run.output("curate-preference", number) / "preferences.jsonl"
        preferences = list(read_records(file, Preference))
        ratings = {
            (rating.sample_id, rating.first, rating.second): rating
            for shard in run.all_ratings(number)
            for rating in read_records(shard / "ratings.jsonl", Rating)
        }
        for preference in _some(preferences, data):
            ids = {
                "chosen": preference.chosen.id,
                "rejected": preference.rejected.id,
                "reference": REFERENCE,
            }
            orders = (
                (first, second, ratings.get((preference.sample_id, ids[first], ids[second])))
                for pair in (("chosen", "rejected"), ("chosen", "reference"))
                for first, second in (pair, pair[::-1])
            )
            yield page.SampleCard(
                round=number,
                sample=data.sample(preference.sample_id),
                image_png=_thumbnail(data.image(preference.sample_id)),
                preference=preference,
                ratings=tuple(
                    page.RatingRow(first=first, second=second, probabilities=rating.probabilities)
                    for first, second, rating in orders
                    if rating
                ),
            )


def _thumbnail(image: Image.Image) -> bytes:
    """A small PNG, whatever the format in the data set: the page embeds its images."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _some(preferences: list[Preference], data: dataset.DataSet) -> list[Preference]:
    by_category: dict[str, list[Preference]] = {}
    for preference in sorted(preferences, key=lambda p: (-p.margin * p.confidence, p.sample_id)):
        by_category.setdefault(data.sample(preference.sample_id).category, []).append(preference)
    share = max(1, CARDS // max(1, len(by_category)))
    return [preference for _, found in sorted(by_category.items()) for preference in found[:share]]


def _notes(run: RunFolder, config: RunConfig, manifests: dict[Path, Manifest]) -> Iterator[str]:
    if config.data.source == "embedded":
        yield TINY_NOTE
    tuned = manifests.get(run.output("tune-rationale"))
    if tuned and (rate := tuned.figures.get("format_rate")) is not None:
        yield (
            f"Stage 1: {rate:.0%} of the responses to some samples of the train split "
            "have a rationale and an answer line."
        )
    sampled = manifests.get(run.output("sample-responses"))
    if sampled and (again := sampled.figures.get("trained_on")):
        yield (
            f"R-Scorer: stage 1 was trained on {again} of the {sampled.figures['samples']} samples "
            "whose responses it learned from."
        )
    for number in range(1, config.rounds + 1):
        if not run.is_kept(number):
            yield f"Round {number}: the previous policy was kept (on_regression: keep_previous)."
