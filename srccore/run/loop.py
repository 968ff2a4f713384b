"""The whole algorithm on one machine: rounds of search, score, curate, align, evaluate.

`run` is the algorithm; `_Wiring` says which folder feeds which stage. `pipelines/` wires the same
stages on a cluster. Every stage skips itself where its work is done, so the same call goes on
after an interruption, and more rounds can be asked of a finished run.
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
from srccore.files import MANIFEST, write_json
from srccore.models.policy import resolve_model_path
from srccore.stages.candidates import sample_responses, score_candidates, search_candidates
from srccore.stages.checks import check_run
from srccore.stages.data import prepare_data
from srccore.stages.evaluation import evaluate
from srccore.stages.machine import Figures, Machine, Progress
from srccore.stages.preferences import curate_preference, train_dpo
from srccore.stages.rationales import augment_rationales, tune_rationale
from srccore.stages.scorer import annotate_ratings, train_scorer

__all__ = ["Observer", "load_run", "policy_of_round", "run", "set_threads"]


class Observer(Protocol):
    """Is told what the loop does."""

    def stage(self, name: str, round_number: int | None) -> AbstractContextManager[Progress]:
        """Opens a stage; what it yields is told of progress."""
        ...

    def figures(self, figures: list[Figures]) -> None:
        """Is shown the figures of all rounds so far."""
        ...

    def note(self, text: str) -> None:
        """Is told something that the user should know."""
        ...


def run(config: RunConfig, out: Path, observer: Observer) -> list[Figures]:
    """Carries a run from its data to its last round.

    Args:
        config: The run.
        out: The run folder.
        observer: Is told of progress.

    Returns:
        The figures after stage 1 (round 0) and after every round.

    Raises:
        UserError: The folder is another run's, or an input is bad.
    """
    for model in (config.model, config.rating_model):
        resolve_model_path(model.path)
    if not (out / "data" / MANIFEST).exists():
        check_run(config)
    # Whoever asks for fewer rounds than are done loses none.
    config = config.model_copy(update={"rounds": max([config.rounds, *_finished_rounds(out)])})
    _open_run(config, out)
    set_threads(config.threads)
    wiring = _Wiring(config, out, observer)
    wiring.prepare_data()
    wiring.augment_rationales()
    policy = wiring.tune_rationale()
    wiring.evaluate(policy, 0)
    scorer = wiring.train_scorer(policy)
    for number in range(1, config.rounds + 1):
        found = [wiring.search(policy, number, shard) for shard in range(config.shards)]
        rated = [wiring.score(found[shard], scorer, shard) for shard in range(config.shards)]
        preferences = wiring.curate(found, rated, number)
        aligned = wiring.align(preferences, policy, number)
        policy = wiring.keep_or_go_back(policy, aligned, number)
        wiring.evaluate(policy, number)
    return wiring.figures


def load_run(out: Path) -> RunConfig:
    """Reads the configuration of a run folder.

    Raises:
        UserError: It is none.
    """
    path = out / "run.json"
    try:
        return RunConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise UserError(
            f"{out} is no run folder: its run.json is missing or not readable.",
            "Give the folder that srccore run --out made.",
        ) from None


def policy_of_round(out: Path, number: int) -> Path:
    """The ``policy.json`` that a round of a run ended with; 0 is stage 1.

    Raises:
        UserError: The run has not finished that round.
    """
    folder = out / f"round-{number}" / "evaluate"
    kept = out / f"round-{number}" / "kept.json"
    if not (folder / "manifest.json").exists():
        finished = ", ".join(str(each) for each in _finished_rounds(out))
        raise UserError(
            f"The run {out} has not finished round {number}.",
            f"It has finished {finished or 'none'}; srccore run goes on with it.",
        )
    if kept.exists() and not json.loads(kept.read_text(encoding="utf-8"))["aligned"]:
        return policy_of_round(out, number - 1)
    return out / (f"round-{number}/train-dpo" if number else "tune-rationale") / "policy.json"


def _finished_rounds(out: Path) -> list[int]:
    found = (path.parents[1].name for path in out.glob("round-*/evaluate/manifest.json"))
    return sorted(int(name.removeprefix("round-")) for name in found)


def _open_run(config: RunConfig, out: Path) -> None:
    path = out / "run.json"
    try:
        if path.exists():
            wanted, found = identity(config), identity(load_run(out))
            if changed := [name for name in wanted if wanted[name] != found.get(name)]:
                raise UserError(
                    f"The folder {out} holds a run of another configuration: "
                    f"{', '.join(changed)} differ.",
                    "Give another --out, or the same configuration; nothing was changed.",
                )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(
                f"{out} exists and is no run folder.", "Give another --out; nothing was changed."
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, config.model_dump(mode="json"))
    except OSError as error:
        raise UserError(
            f"The folder {out} cannot be written ({error.strerror}).",
            "Give another --out, or make room and see to its permissions.",
        ) from None


def set_threads(threads: int | None) -> None:
    """Binds torch, whether it was imported before or is imported by the first stage that works."""
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
    out: Path
    observer: Observer
    figures: list[Figures] = field(default_factory=list)

    @contextmanager
    def _stage(self, name: str, round_number: int | None) -> Iterator[Machine]:
        with self.observer.stage(name, round_number) as progress:
            yield Machine(self.config.device, progress)

    def _round(self, number: int) -> Path:
        return self.out / f"round-{number}"

    def _split(self, name: str) -> Path:
        return self.out / "data" / f"{name}.parquet"

    def prepare_data(self) -> None:
        with self._stage("prepare-data", None) as machine:
            prepare_data(self.config.data, self.out / "data", machine)

    def _rationales(self, split: str) -> Path:
        return self.out / "augment-rationales" / split

    def augment_rationales(self) -> None:
        """Of the train split for stage 1 to learn, of both for R-Scorer to judge against."""
        for split in ("train", "calibration"):
            with self._stage("augment-rationales", None) as machine:
                augment_rationales(
                    self.config.augmentation,
                    data=self._split(split),
                    out=self._rationales(split),
                    machine=machine,
                )

    def tune_rationale(self) -> Path:
        folder = self.out / "tune-rationale"
        with self._stage("tune-rationale", None) as machine:
            tune_rationale(
                self.config.rationale,
                model=self.config.model,
                data=self._split("train"),
                rationales=self._rationales("train"),
                out=folder,
                seed=self.config.seed,
                machine=machine,
            )
        return folder / "policy.json"

    def train_scorer(self, policy: Path) -> Path:
        """Trained once, before round 1, on responses of the stage-1 policy."""
        annotation = self.config.annotation
        train = self._split("train")
        sampled = self.out / "sample-responses"
        pairs = self.out / "annotate-ratings"
        folder = self.out / "train-scorer"
        with self._stage("sample-responses", None) as machine:
            sample_responses(
                self.config.search,
                annotation=annotation,
                data=train,
                policy=policy,
                out=sampled,
                seed=self.config.seed,
                machine=machine,
            )
        with self._stage("annotate-ratings", None) as machine:
            annotate_ratings(
                annotation,
                data=train,
                candidates=sampled,
                rationales=self._rationales("train"),
                out=pairs,
                seed=self.config.seed,
                machine=machine,
            )
        with self._stage("train-scorer", None) as machine:
            train_scorer(
                self.config.scorer,
                model=self.config.rating_model,
                data=train,
                annotation=annotation,
                labelled_pairs=pairs,
                rationales=self._rationales("train"),
                out=folder,
                seed=self.config.seed,
                machine=machine,
            )
        return folder

    def search(self, policy: Path, number: int, shard: int) -> Path:
        folder = self._round(number) / f"search-candidates-{shard}"
        with self._stage("search-candidates", number) as machine:
            search_candidates(
                self.config.search,
                data=self._split("calibration"),
                policy=policy,
                out=folder,
                seed=self.config.seed,
                round_number=number,
                shard=(shard, self.config.shards),
                machine=machine,
            )
        return folder

    def score(self, candidates: Path, scorer: Path, shard: int) -> Path:
        folder = candidates.with_name(f"score-candidates-{shard}")
        number = int(candidates.parent.name.removeprefix("round-"))
        with self._stage("score-candidates", number) as machine:
            score_candidates(
                self.config.scoring,
                data=self._split("calibration"),
                candidates=candidates,
                scorer=scorer,
                rationales=self._rationales("calibration"),
                out=folder,
                machine=machine,
            )
        return folder

    def curate(self, candidates: list[Path], ratings: list[Path], number: int) -> Path:
        folder = self._round(number) / "curate-preference"
        with self._stage("curate-preference", number) as machine:
            curate_preference(
                self.config.curation,
                data=self._split("calibration"),
                candidates=candidates,
                ratings=ratings,
                out=folder,
                machine=machine,
            )
        return folder

    def align(self, preferences: Path, policy: Path, number: int) -> Path:
        folder = self._round(number) / "train-dpo"
        with self._stage("train-dpo", number) as machine:
            train_dpo(
                self.config.dpo,
                data=self._split("calibration"),
                preferences=preferences,
                policy=policy,
                out=folder,
                seed=self.config.seed,
                machine=machine,
            )
        return folder / "policy.json"

    def keep_or_go_back(self, before: Path, aligned: Path, number: int) -> Path:
        """Under ``keep_previous``, goes back where calibration figures fall (reconstruction)."""
        if self.config.on_regression == "continue":
            return aligned
        earlier = self._check(before, number, "before", None)
        later = self._check(aligned, number, "after", earlier)
        changes = json.loads((later / "figures.json").read_text())["change"]
        name = "aligned accuracy" if "aligned_accuracy" in changes else "accuracy"
        change = changes[name.replace(" ", "_")]
        is_kept = change["interval"][1] >= 0
        write_json(self._round(number) / "kept.json", {"aligned": is_kept, "change": change})
        if not is_kept:
            self.observer.note(
                f"Round {number} lowered {name} on the calibration split by "
                f"{-change['difference']:.1%}: the policy before it is kept."
            )
        return aligned if is_kept else before

    def _check(self, policy: Path, number: int, name: str, previous: Path | None) -> Path:
        folder = self._round(number) / f"check-{name}"
        self._evaluate(policy, number, folder, self._split("calibration"), previous)
        return folder

    def evaluate(self, policy: Path, number: int) -> None:
        previous = self._round(number - 1) / "evaluate" if number else None
        folder = self._round(number) / "evaluate"
        found = self._evaluate(policy, number, folder, self._split("heldout"), previous)
        self.figures.append(found)
        path = self.out / "figures.json"
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
