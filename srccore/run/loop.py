"""The whole algorithm on one machine: rounds of search, score, curate, align, evaluate.

`run` is the algorithm; `_Wiring` says which folder feeds which stage. `pipelines/` wires the same
stages on a cluster. Every stage skips work that is already done, so the same call resumes an
interrupted run and adds rounds to a finished one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from srccore.config import RunConfig, identity
from srccore.errors import UserError
from srccore.files import MANIFEST, writable, write_json
from srccore.method.evaluation import HEADLINE
from srccore.models.policy import resolve_model_path
from srccore.run.folder import RunFolder
from srccore.stages.candidates import sample_responses, score_candidates, search_candidates
from srccore.stages.checks import check_run
from srccore.stages.data import prepare_data
from srccore.stages.evaluation import evaluate
from srccore.stages.machine import Figures, Machine, Progress
from srccore.stages.preferences import curate_preference, train_dpo
from srccore.stages.rationales import augment_rationales, tune_rationale
from srccore.stages.scorer import annotate_ratings, train_scorer

__all__ = ["Observer", "load_run", "run", "set_threads"]


class Observer(Protocol):
    """Receives progress events from the loop."""

    def stage(self, name: str, round_number: int | None) -> AbstractContextManager[Progress]:
        """Opens a stage and yields the function that its progress is reported to."""
        ...

    def figures(self, figures: list[Figures]) -> None:
        """Receives the figures of all rounds so far, after each round."""
        ...

    def note(self, text: str) -> None:
        """Receives a message for the user."""
        ...


def run(config: RunConfig, out: Path, observer: Observer) -> list[Figures]:
    """Runs all stages and rounds, or resumes an interrupted run.

    Args:
        config: The run's configuration.
        out: The run folder; created if missing.
        observer: Receives progress events.

    Returns:
        The figures after stage 1 (round 0) and after every round.

    Raises:
        UserError: The folder belongs to a different run, or an input is invalid.
    """
    for model in (config.model, config.rating_model):
        resolve_model_path(model.path)
    folder = RunFolder(out)
    if not (folder.data / MANIFEST).exists():
        check_run(config)
    # Asking for fewer rounds than are finished must not drop any.
    config = config.model_copy(update={"rounds": max([config.rounds, *folder.finished_rounds()])})
    _open_run(config, folder)
    set_threads(config.threads)
    wiring = _Wiring(config, folder, observer)
    wiring.prepare_data()
    wiring.augment_rationales()
    policy = wiring.tune_rationale()
    wiring.evaluate(policy, 0)
    scorer = wiring.train_scorer(policy)
    shards = range(config.shards)
    for number in range(1, config.rounds + 1):
        found = [wiring.search(policy, number, shard) for shard in shards]
        rated = [wiring.score(found[shard], scorer, number, shard) for shard in shards]
        preferences = wiring.curate(found, rated, number)
        aligned = wiring.align(preferences, policy, number)
        policy = wiring.keep_or_revert(policy, aligned, number)
        wiring.evaluate(policy, number)
    return wiring.figures


def load_run(out: Path) -> RunConfig:
    """Reads the configuration of a run folder.

    Raises:
        UserError: It is not a run folder.
    """
    path = RunFolder(out).config
    try:
        return RunConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UserError(
            f"{out} is not a run folder: its {path.name} is missing or unreadable.",
            "Pass a folder that srccore run --out created.",
        ) from None


def _open_run(config: RunConfig, folder: RunFolder) -> None:
    out = folder.path
    with writable(out):
        if folder.config.exists():
            wanted, found = identity(config), identity(load_run(out))
            if changed := [name for name in wanted if wanted[name] != found.get(name)]:
                raise UserError(
                    f"{out} already holds a run with a different configuration: "
                    f"{', '.join(changed)} differ.",
                    "Choose another --out or pass the same configuration; nothing was changed.",
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"{out} exists but is not a run folder.",
                "Choose another --out; nothing was changed.",
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(folder.config, config.model_dump(mode="json"))


def set_threads(threads: int | None) -> None:
    """Limits the threads of torch, whether it is imported already or by a later stage."""
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


@dataclass
class _Wiring:
    """Which folder feeds which stage."""

    config: RunConfig
    out: RunFolder
    observer: Observer
    figures: list[Figures] = field(default_factory=list)

    @contextmanager
    def _stage(self, name: str, round_number: int | None) -> Iterator[Machine]:
        with self.observer.stage(name, round_number) as progress:
            yield Machine(self.config.device, progress)

    def prepare_data(self) -> None:
        with self._stage("prepare-data", None) as machine:
            prepare_data(self.config.data, self.out.data, machine)

    def augment_rationales(self) -> None:
        """Stage 1 learns those of the train split; R-Scorer compares with those of both splits."""
        for split in ("train", "calibration"):
            with self._stage("augment-rationales", None) as machine:
                augment_rationales(
                    self.config.augmentation,
                    data=self.out.split(split),
                    out=self.out.rationales(split),
                    machine=machine,
                )

    def tune_rationale(self) -> Path:
        with self._stage("tune-rationale", None) as machine:
            tune_rationale(
                self.config.rationale,
                model=self.config.model,
                data=self.out.split("train"),
                rationales=self.out.rationales("train"),
                out=self.out.tuning,
                seed=self.config.seed,
                machine=machine,
            )
        return self.out.trained_policy(0)

    def train_scorer(self, policy: Path) -> Path:
        """Trains R-Scorer once, before round 1, on responses of the stage-1 policy."""
        annotation = self.config.annotation
        train, rationales = self.out.split("train"), self.out.rationales("train")
        with self._stage("sample-responses", None) as machine:
            sample_responses(
                self.config.search,
                annotation=annotation,
                data=train,
                policy=policy,
                out=self.out.responses,
                seed=self.config.seed,
                machine=machine,
            )
        with self._stage("annotate-ratings", None) as machine:
            annotate_ratings(
                annotation,
                data=train,
                candidates=self.out.responses,
                rationales=rationales,
                out=self.out.labelled_pairs,
                seed=self.config.seed,
                machine=machine,
            )
        with self._stage("train-scorer", None) as machine:
            train_scorer(
                self.config.scorer,
                model=self.config.rating_model,
                data=train,
                annotation=annotation,
                labelled_pairs=self.out.labelled_pairs,
                rationales=rationales,
                out=self.out.scorer,
                seed=self.config.seed,
                machine=machine,
            )
        return self.out.scorer

    def search(self, policy: Path, number: int, shard: int) -> Path:
        folder = self.out.candidates(number, shard)
        with self._stage("search-candidates", number) as machine:
            search_candidates(
                self.config.search,
                data=self.out.split("calibration"),
                policy=policy,
                out=folder,
                seed=self.config.seed,
                round_number=number,
                shard=(shard, self.config.shards),
                machine=machine,
            )
        return folder

    def score(self, candidates: Path, scorer: Path, number: int, shard: int) -> Path:
        folder = self.out.ratings(number, shard)
        with self._stage("score-candidates", number) as machine:
            score_candidates(
                self.config.scoring,
                data=self.out.split("calibration"),
                candidates=candidates,
                scorer=scorer,
                rationales=self.out.rationales("calibration"),
                out=folder,
                machine=machine,
            )
        return folder

    def curate(self, candidates: list[Path], ratings: list[Path], number: int) -> Path:
        folder = self.out.preferences(number)
        with self._stage("curate-preference", number) as machine:
            curate_preference(
                self.config.curation,
                data=self.out.split("calibration"),
                candidates=candidates,
                ratings=ratings,
                out=folder,
                machine=machine,
            )
        return folder

    def align(self, preferences: Path, policy: Path, number: int) -> Path:
        with self._stage("train-dpo", number) as machine:
            train_dpo(
                self.config.dpo,
                data=self.out.split("calibration"),
                preferences=preferences,
                policy=policy,
                out=self.out.training(number),
                seed=self.config.seed,
                machine=machine,
            )
        return self.out.trained_policy(number)

    def keep_or_revert(self, before: Path, aligned: Path, number: int) -> Path:
        """Under ``keep_previous``, rejects a policy that is worse on the calibration split.

        Not described in the paper (reconstruction).
        """
        if self.config.on_regression == "continue":
            return aligned
        split = self.out.split("calibration")
        earlier, later = self.out.check(number, "before"), self.out.check(number, "after")
        self._evaluate(before, number, earlier, split, None)
        changes = self._evaluate(aligned, number, later, split, earlier)["change"]
        figure = HEADLINE if HEADLINE in changes else "accuracy"
        change = changes[figure]
        is_kept = change["interval"][1] >= 0
        write_json(self.out.kept(number), {"aligned": is_kept, "change": change})
        if not is_kept:
            self.observer.note(
                f"Round {number} lowered {figure.replace('_', ' ')} on the calibration split by "
                f"{-100 * change['difference']:.1f} points: keeping the previous policy."
            )
        return aligned if is_kept else before

    def evaluate(self, policy: Path, number: int) -> None:
        previous = self.out.evaluation(number - 1) if number else None
        split = self.out.split("heldout")
        found = self._evaluate(policy, number, self.out.evaluation(number), split, previous)
        self.figures.append(found)
        path = self.out.figures
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        if known[: len(self.figures)] != self.figures:
            write_json(path, self.figures)
        self.observer.figures(self.figures)

    def _evaluate(
        self, policy: Path, number: int, folder: Path, data: Path, previous: Path | None
    ) -> Figures:
        with self._stage("evaluate", number) as machine:
            return evaluate(
                self.config.evaluation,
                data=data,
                policy=policy,
                out=folder,
                seed=self.config.seed,
                round_number=number,
                previous=previous,
                machine=machine,
            )
