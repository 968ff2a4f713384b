"""Arranges the outputs of a pipeline as a run folder, like the one that `srccore run` writes.

A pipeline writes ``<artifact root>/<stage>/<key>``. Which output belongs to which round is found by
following the inputs of the steps back from the last evaluation. On the run folder, `srccore report`
and `srccore export` work as they do after a local run.

A report may come from somebody else, and what its steps say about their inputs is not trusted.
Nothing outside the artifact root is read, not even through a symbolic link, and rounds must count
down: no lineage can pull other files of this machine into a run folder, or go round in circles.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

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
        UserError: An output is missing, was not written by a pipeline, or is outside the root.
    """
    root = _Root(artifact_root.rstrip("/"))
    run = RunFolder(out)
    places = dict(_places(run, root, evaluation))
    for uri, folder in places.items():
        _bring(root, uri, folder, whole)
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
    root = _Root(storage.join(uri, "../.."))
    advice = "Collect it with the version of srccore that ran it."
    try:
        values = json.loads(storage.read_text(root.inside(storage.join(uri, CONFIG))))
    except (ValueError, RecursionError):
        raise UserError(f"The {CONFIG} of {uri} is not JSON.", advice) from None
    config = validate_config(values, f"configuration ({uri})", advice)
    collect_run(root.uri, _Step(root, uri).one("last_evaluation"), config, out, whole=True)


class _Root:
    """An artifact root, whose folders are not trusted."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def has(self, uri: str) -> bool:
        """Whether an address is below the root, wherever symbolic links lead."""
        if storage.is_remote(self.uri):
            return uri.startswith(f"{self.uri}/")
        if storage.is_remote(uri):
            return False
        root = storage.local_path(self.uri).resolve()
        return storage.local_path(uri).resolve().is_relative_to(root)

    def inside(self, uri: str) -> str:
        """Returns an address that is below the root.

        Raises:
            UserError: It is not.
        """
        if not self.has(uri):
            raise UserError(
                f"{uri} is outside the artifact root {self.uri}, or a link that leads out of it.",
                "Only what is below the root is collected: copy the whole run below one root.",
            )
        return uri


def _places(run: RunFolder, root: _Root, evaluation: str) -> Iterator[tuple[str, Path]]:
    """The URIs of the outputs, each with its place in the run folder."""
    current: str | None = evaluation
    later: int | None = None
    while current is not None:
        found = _Step(root, current)
        if later is not None and found.round >= later:
            raise UserError(
                f"{current}, of round {found.round}, cannot come before one of round {later}.",
                f"{STEP} there was changed: collect another run, or run the pipeline again.",
            )
        later = found.round
        yield current, run.output("evaluate", found.round)
        yield storage.join(found.one("data"), ".."), run.data
        policy = found.input("policy")
        if policy and found.round == 0:
            yield policy, run.output("tune-rationale")
            yield from _rationales(run, root, _Step(root, policy), "train")
        elif policy:
            yield from _alignment(run, root, policy, found.round)
        current = found.input("previous")


def _alignment(run: RunFolder, root: _Root, policy: str, number: int) -> Iterator[tuple[str, Path]]:
    training = _Step(root, policy)
    yield policy, run.output("train-dpo", number)
    preferences = training.one("preferences")
    yield preferences, run.output("curate-preference", number)
    curation = _Step(root, preferences)
    for shard, uri in enumerate(curation.inputs("candidates")):
        yield uri, run.output("search-candidates", number, shard)
    ratings = curation.inputs("ratings")
    for shard, uri in enumerate(ratings):
        yield uri, run.output("score-candidates", number, shard)
    for uri in ratings[:1]:  # all shards share one R-Scorer and one set of rationales
        rating = _Step(root, uri)
        yield from _scorer(run, root, rating.one("scorer"))
        yield from _rationales(run, root, rating, "calibration")


def _scorer(run: RunFolder, root: _Root, uri: str) -> Iterator[tuple[str, Path]]:
    if not root.has(uri):
        return  # it was given, and so may be the pairs that it was trained on
    yield uri, run.output("train-scorer")
    pairs = _Step(root, uri).input("labelled_pairs")
    if pairs and root.has(pairs):
        yield pairs, run.output("annotate-ratings")
        if sampled := _Step(root, pairs).input("candidates"):
            yield sampled, run.output("sample-responses")


def _rationales(run: RunFolder, root: _Root, step: _Step, split: str) -> Iterator[tuple[str, Path]]:
    """Rationales that a step wrote; those that come with the data are in the data already."""
    uri = step.input("rationales")
    if uri and root.has(uri) and _Step(root, uri).lineage:
        yield uri, run.rationales(split)


class _Step:
    """The step that wrote a folder; a folder that no step wrote has no inputs."""

    def __init__(self, root: _Root, uri: str) -> None:
        self.root = root
        self.uri = root.inside(uri)
        file = root.inside(storage.join(uri, STEP))
        try:
            self.lineage = (
                Lineage.model_validate_json(storage.read_text(file))
                if storage.exists(file)
                else None
            )
        except ValidationError:
            raise UserError(
                f"{file} does not say which step wrote it.",
                "Collect it with the version of srccore that ran it.",
            ) from None

    def inputs(self, name: str) -> list[str]:
        found = self.lineage.inputs.get(name, []) if self.lineage else []
        return [storage.resolve(self.root.uri, uri) for uri in found]

    def input(self, name: str) -> str | None:
        return next(iter(self.inputs(name)), None)

    def one(self, name: str) -> str:
        found = self.inputs(name)
        if len(found) != 1:
            raise UserError(
                f"{self.uri} was not written by the step of a pipeline: it does not name its one "
                f"input {name}.",
                "Pass the folder <artifact root>/report/<key> shown in the log of the pipeline's "
                "last step.",
            )
        return found[0]

    @property
    def round(self) -> int:
        if self.lineage is None or self.lineage.round is None or self.lineage.round < 0:
            raise UserError(
                f"{self.uri} is not an evaluation of a pipeline.",
                "Pass the folder that the pipeline's last evaluate step wrote.",
            )
        return self.lineage.round


def _bring(root: _Root, uri: str, folder: Path, whole: bool) -> None:
    """Copies an output into a run folder; for a report alone, links to it are enough."""
    for file in storage.listing(root.inside(uri)):
        if _UNREAD.search(file.path) and not whole:
            continue
        source, target = root.inside(storage.join(uri, file.path)), folder / file.path
        if target.exists() or target.is_symlink():
            continue
        found = storage.fetch(source) if whole else splits.fetch(source)
        with writable(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if whole:
                # A link would be to a file that others write to, or to the cache.
                shutil.copyfile(found, target)
            else:
                # A report shows a few images of a split; they are fetched from where it points.
                target.symlink_to(found.absolute())


def _move_policy(uri: str, file: Path, places: dict[str, Path]) -> None:
    policy = parse_policy(file.read_text(encoding="utf-8"), str(file))
    adapters = []
    for name in policy.adapters:
        source, _, folder = storage.resolve(uri, name).rpartition("/")
        if source not in places:
            raise UserError(
                f"The policy {uri} has an adapter that no training of the run wrote: {name}.",
                "Collect a run whose policies start from a base model.",
            )
        adapters.append(str(places[source] / folder))
    file.unlink()
    write_policy(file, policy.model_copy(update={"adapters": tuple(adapters)}))
