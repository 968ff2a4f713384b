"""Arranges the outputs of a pipeline as a run folder, like the one that `srccore run` writes.

A pipeline writes ``<artifact root>/<stage>/<key>``. Which output belongs to which round is found by
following the inputs of the steps back from the last evaluation. On the run folder, `srccore report`
and `srccore export` work as they do after a local run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from srccore import storage
from srccore.config import RunConfig, validate_config
from srccore.errors import UserError
from srccore.files import writable, write_json
from srccore.models.policy import POLICY_FILE, parse_policy, write_policy
from srccore.run.folder import CONFIG, RunFolder
from srccore.stages import splits
from srccore.stages.manifest import read_manifest
from srccore.steps.step import STEP, Lineage

__all__ = ["collect_report", "collect_run"]

_UNREAD = re.compile(r"\.safetensors$|^train\.(parquet|index\.jsonl)$")
"""Files that reports do not read: weights, and the split for stage 1."""


def collect_run(
    artifact_root: str, evaluation: str, config: RunConfig, out: Path, *, whole: bool = False
) -> None:
    """Creates a run folder from the outputs of a pipeline.

    Args:
        artifact_root: The pipeline's artifact root.
        evaluation: The URI of the output of its last `evaluate`.
        config: The run's configuration.
        out: The folder to create.
        whole: Include the weights and the train split, which `srccore report` does not need.

    Raises:
        UserError: An output is missing, or was not written by a pipeline.
    """
    root = artifact_root.rstrip("/")
    run = RunFolder(out)
    places = dict(_places(run, root, evaluation))
    for uri, folder in places.items():
        _bring(uri, folder, whole)
    for uri, folder in places.items():
        if whole and (folder / POLICY_FILE).exists():
            _move_policy(uri, folder / POLICY_FILE, places)
    # The search goes back from evaluation to evaluation, so every round found has one.
    found = {run.round_of(folder) for folder in places.values()}
    rounds = sorted(number for number in found if number is not None)
    evaluations = [run.output("evaluate", number) for number in rounds]
    write_json(run.figures, [read_manifest(folder).figures for folder in evaluations])
    done = config.model_copy(update={"rounds": max(1, len(evaluations) - 1)})
    write_json(run.config, done.model_dump(mode="json"))


def collect_report(uri: str, out: Path) -> None:
    """Creates a complete run folder of the run that a report covers.

    Args:
        uri: The folder that the pipeline's last step wrote, ``<artifact root>/report/<key>``.
        out: The folder to create.

    Raises:
        UserError: It is not such a folder, or part of the run is missing.
    """
    uri = uri.rstrip("/")
    if not storage.exists(storage.join(uri, CONFIG)):
        raise UserError(
            f"{uri} is not the report of a pipeline: it has no {CONFIG}.",
            "Pass the folder <artifact root>/report/<key> shown in the log of the pipeline's "
            "last step.",
        )
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
        is_empty = not any(out.iterdir())
    if not is_empty:
        raise UserError(f"{out} is not empty.", "Choose another --out; nothing was changed.")
    root = storage.join(uri, "../..")
    config = validate_config(
        json.loads(storage.read_text(storage.join(uri, CONFIG))),
        f"configuration ({uri})",
        "Collect it with the version of srccore that ran it.",
    )
    (evaluation,) = _Step(root, uri).inputs("last_evaluation")
    collect_run(root, evaluation, config, out, whole=True)


def _places(run: RunFolder, root: str, evaluation: str) -> Iterator[tuple[str, Path]]:
    """The URIs of the outputs, each with its place in the run folder."""
    current: str | None = evaluation
    while current is not None:
        found = _Step(root, current)
        yield current, run.output("evaluate", found.round)
        yield found.parent("data"), run.data
        policy = found.input("policy")
        if policy and found.round == 0:
            yield policy, run.output("tune-rationale")
            yield from _rationales(run, root, _Step(root, policy), "train")
        elif policy:
            yield from _alignment(run, root, policy, found.round)
        current = found.input("previous")


def _alignment(run: RunFolder, root: str, policy: str, number: int) -> Iterator[tuple[str, Path]]:
    training = _Step(root, policy)
    yield policy, run.output("train-dpo", number)
    preferences = training.inputs("preferences")[0]
    yield preferences, run.output("curate-preference", number)
    curation = _Step(root, preferences)
    for shard, uri in enumerate(curation.inputs("candidates")):
        yield uri, run.output("search-candidates", number, shard)
    ratings = curation.inputs("ratings")
    for shard, uri in enumerate(ratings):
        yield uri, run.output("score-candidates", number, shard)
    for uri in ratings[:1]:  # all shards share one R-Scorer and one set of rationales
        rating = _Step(root, uri)
        yield from _scorer(run, root, rating.inputs("scorer")[0])
        yield from _rationales(run, root, rating, "calibration")


def _scorer(run: RunFolder, root: str, uri: str) -> Iterator[tuple[str, Path]]:
    yield uri, run.output("train-scorer")
    pairs = _Step(root, uri).input("labelled_pairs")
    if pairs:
        yield pairs, run.output("annotate-ratings")
        if sampled := _Step(root, pairs).input("candidates"):
            yield sampled, run.output("sample-responses")


def _rationales(run: RunFolder, root: str, step: _Step, split: str) -> Iterator[tuple[str, Path]]:
    """Rationales that a step wrote; those that come with the data are in the data already."""
    uri = step.input("rationales")
    if uri and _Step(root, uri).lineage:
        yield uri, run.rationales(split)


class _Step:
    """The step that wrote a folder; a folder that no step wrote has no inputs."""

    def __init__(self, root: str, uri: str) -> None:
        self.root = root
        self.uri = uri
        file = storage.join(uri, STEP)
        self.lineage = (
            Lineage.model_validate_json(storage.read_text(file)) if storage.exists(file) else None
        )

    def inputs(self, name: str) -> list[str]:
        found = self.lineage.inputs.get(name, []) if self.lineage else []
        return [storage.resolve(self.root, uri) for uri in found]

    def input(self, name: str) -> str | None:
        return next(iter(self.inputs(name)), None)

    def parent(self, name: str) -> str:
        return storage.join(self.inputs(name)[0], "..")

    @property
    def round(self) -> int:
        if self.lineage is None or self.lineage.round is None:
            raise UserError(
                f"{self.uri} is not an evaluation of a pipeline.",
                "Pass the folder that the pipeline's last evaluate step wrote.",
            )
        return self.lineage.round


def _bring(uri: str, folder: Path, whole: bool) -> None:
    for file in storage.listing(uri):
        if _UNREAD.search(file.path) and not whole:
            continue
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() or target.is_symlink():
            continue
        source = storage.join(uri, file.path)
        if whole:
            _link(storage.fetch(source), target)
        elif (found := splits.fetch(source)).exists():
            _link(found, target)
        else:
            # A report shows a few images of a split; they are fetched from where the link points.
            target.symlink_to(found)


def _link(source: Path, target: Path) -> None:
    """Creates a hard link where the file system can: neither file is written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _move_policy(uri: str, file: Path, places: dict[str, Path]) -> None:
    policy = parse_policy(file.read_text(encoding="utf-8"), str(file))
    folders = [storage.resolve(uri, name).rpartition("/") for name in policy.adapters]
    adapters = tuple(str(places[folder] / name) for folder, _, name in folders)
    file.unlink()
    write_policy(file, policy.model_copy(update={"adapters": adapters}))
