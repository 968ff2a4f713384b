"""The whole algorithm on one machine: rounds of search, score, curate, align, evaluate.

`run` is the algorithm; `_Wiring` says which folder feeds which stage. `pipelines/` wires the same
stages on a cluster. Every stage skips work that is already done, so the same call resumes an
interrupted run and adds rounds to a finished one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from srccore.config import RunConfig, identity
from srccore.errors import UserError
from srccore.files import MANIFEST, Hold, hold, is_leftover, writable, write_json
from srccore.method.evaluation import HEADLINE
from srccore.models.engines import check_installed
from srccore.models.policy import load_processor, resolve_model_path, response_text
from srccore.run.folder import CONFIG, RunFolder
from srccore.stages.checks import (
    check_data,
    check_device,
    check_gpus,
    check_settings,
    check_training_processes,
)
from srccore.stages.manifest import read_manifest
from srccore.stages.table import STAGES
from srccore.stages.together import train
from srccore.stages.trained import free_training_memory
from srccore.stages.workers import stop_workers, visible_gpus
from srccore.training.machine import Figures, Machine, Progress

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


def run(
    config: RunConfig,
    out: Path,
    observer: Observer,
    workers: int = 1,
    processes: int | None = None,
) -> list[Figures]:
    """Runs all stages and rounds, or resumes an interrupted run.

    Args:
        config: The run's configuration.
        out: The run folder; created if missing.
        observer: Receives progress events; with several workers, those of an evaluation may come
            from another thread than those of the training beside it.
        workers: Processes among which the samples of a stage are divided. Results do not depend on
            it.
        processes: Processes that train together, at most; None is one for each GPU, or one without
            a GPU. Results do not depend on it, apart from rounding.

    Returns:
        The figures after stage 1 (round 0) and after every round.

    Raises:
        UserError: The folder belongs to a different run, another process works on it, or an input
            is invalid. The figures of the rounds before are known then.
    """
    for model in (config.model, config.rating_model):
        resolve_model_path(model.path)
    folder = RunFolder(out)
    # Asking for fewer rounds than are finished must not drop any.
    config = config.model_copy(update={"rounds": max([config.rounds, *folder.finished_rounds()])})
    # First what costs nothing: the checks below may fetch a checkpoint or a data set.
    for stage in STAGES.values():
        if stage.engine:
            check_installed(getattr(config, stage.engine).engine)
    check_gpus(config, workers)
    check_training_processes(processes, config.device)
    if not (folder.output("tune-rationale") / MANIFEST).exists():
        # Its family, padding and chat template, too, before a teacher is paid.
        response_text(load_processor(config.model), "Yes.")
    check_settings(_asking(folder, config.rounds), dict(config))
    if not (folder.data / MANIFEST).exists():
        check_data(config)
    if config.device == "cuda":
        # Before a teacher is asked for tens of thousands of rationales.
        check_device("evaluate", folder.output("evaluate", config.rounds), config.device)
    held = _open_run(config, folder)
    set_threads(config.threads)
    numbers = tuple(range(workers)) if workers > 1 else ()
    wiring = _Wiring(config, folder, observer, numbers, processes)
    try:
        _run_rounds(wiring)
    except UserError:
        # What is wrong with this round is to be fixed; the figures of the one before may help.
        with suppress(UserError):
            wiring.evaluate_waiting(numbers)
        raise
    wiring.evaluate_waiting(numbers)
    del held
    return wiring.figures


def _run_rounds(wiring: _Wiring) -> None:
    """The algorithm; the policy of the last round may be left to evaluate."""
    config = wiring.config
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


def _asking(folder: RunFolder, rounds: int) -> list[str]:
    """Lists the stages that may ask an endpoint and still have work to do."""
    outputs = {
        "augment-rationales": [folder.rationales(split) for split in ("train", "calibration")],
        "annotate-ratings": [folder.output("annotate-ratings")],
        "evaluate": [folder.output("evaluate", number) for number in range(rounds + 1)],
    }
    finished = set(folder.finished_stages())
    return [stage for stage, wanted in outputs.items() if not finished.issuperset(wanted)]


def load_run(out: Path) -> RunConfig:
    """Reads the configuration of a run folder.

    Raises:
        UserError: It is not a run folder.
    """
    path = RunFolder(out).config
    try:
        return RunConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{out} is not a run folder: its {path.name} is missing or unreadable.",
            "Pass a folder that srccore run --out created.",
        ) from None


def _open_run(config: RunConfig, folder: RunFolder) -> Hold:
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
        elif out.exists() and not (
            out.is_dir() and all(is_leftover(path, CONFIG) for path in out.iterdir())
        ):
            raise UserError(
                f"{out} exists but is not a run folder.",
                "Choose another --out; nothing was changed.",
            )
        out.mkdir(parents=True, exist_ok=True)
        held = hold(out, wait=False)
        for path in out.glob("*.tmp"):
            path.unlink(missing_ok=True)
        write_json(folder.config, config.model_dump(mode="json"))
        return held


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
    workers: tuple[int, ...] = ()
    processes: int | None = None
    """As `run` has it."""
    figures: list[Figures] = field(default_factory=list)
    waiting: list[tuple[Path, int]] = field(default_factory=list)
    """Policies to evaluate, each with its round."""
    noted: set[str] = field(default_factory=set)
    """Messages that were shown; once is enough."""

    def _do(
        self,
        stage: str,
        number: int | None = None,
        shard: int | None = None,
        *,
        out: Path | None = None,
        workers: tuple[int, ...] | None = None,
        **given: Any,
    ) -> Path:
        """Runs a stage and returns its output."""
        folder = out or self.out.output(stage, number, shard)
        if "round_number" in STAGES[stage].settings:
            given["round_number"] = number
        if "shard" in STAGES[stage].settings:
            given["shard"] = (shard, self.config.shards)
        check_device(stage, folder, self.config.device)
        divided = self.divided(stage, self.workers if workers is None else workers)
        with self.observer.stage(stage, number) as progress:
            machine = Machine(self.config.device, progress, workers=divided)
            if STAGES[stage].trains:
                given |= {"machine": machine, "note": self._note_once}
                train(stage, self.config, self.processes, out=folder, **given)
            else:
                STAGES[stage].run(self.config, out=folder, machine=machine, **given)
        if not divided and "torch" in sys.modules:
            # Of a GPU that the next stage may use in another process.
            free_training_memory()
        return folder

    def _note_once(self, text: str) -> None:
        if text not in self.noted:
            self.noted.add(text)
            self.observer.note(text)

    def divided(self, stage: str, workers: tuple[int, ...]) -> tuple[int, ...]:
        """The workers of a stage: always one at least on vLLM, which keeps its memory to the end.

        Args:
            stage: The stage.
            workers: Those that are free for it.
        """
        section = STAGES[stage].engine
        if not section:
            return ()
        on_vllm = getattr(self.config, section).engine.name == "vllm"
        return workers or ((0,) if on_vllm else ())

    def _known(self, split: str) -> dict[str, Any]:
        return {"data": self.out.split(split), "rationales": self.out.rationales(split)}

    def prepare_data(self) -> None:
        self._do("prepare-data", out=self.out.data)

    def augment_rationales(self) -> None:
        """Stage 1 learns those of the train split; R-Scorer compares with those of both splits."""
        for split in ("train", "calibration"):
            data = self.out.split(split)
            self._do("augment-rationales", out=self.out.rationales(split), data=data)

    def tune_rationale(self) -> Path:
        self._do("tune-rationale", **self._known("train"))
        return self.out.trained_policy(0)

    def train_scorer(self, policy: Path) -> Path:
        """Trains R-Scorer once, before round 1, on responses of the stage-1 policy."""
        known = self._known("train")
        responses = self._do("sample-responses", data=known["data"], policy=policy)
        pairs = self._do("annotate-ratings", candidates=responses, **known)
        with self._evaluating():
            return self._do("train-scorer", labelled_pairs=pairs, **known)

    def search(self, policy: Path, number: int, shard: int) -> Path:
        data = self.out.split("calibration")
        return self._do("search-candidates", number, shard, data=data, policy=policy)

    def score(self, candidates: Path, scorer: Path, number: int, shard: int) -> Path:
        known = self._known("calibration")
        read = {"candidates": candidates, "scorer": scorer, **known}
        return self._do("score-candidates", number, shard, **read)

    def curate(self, candidates: list[Path], ratings: list[Path], number: int) -> Path:
        read: dict[str, Any] = {"candidates": candidates, "ratings": ratings}
        return self._do("curate-preference", number, data=self.out.split("calibration"), **read)

    def align(self, preferences: Path, policy: Path, number: int) -> Path:
        data = self.out.split("calibration")
        with self._evaluating():
            self._do("train-dpo", number, data=data, preferences=preferences, policy=policy)
        return self.out.trained_policy(number)

    def keep_or_revert(self, before: Path, aligned: Path, number: int) -> Path:
        """Under ``keep_previous``, rejects a policy that is worse on the calibration split.

        Not described in the paper (reconstruction).
        """
        if self.config.on_regression == "continue":
            return aligned
        split = self.out.split("calibration")
        earlier, later = self.out.check(number, "before"), self.out.check(number, "after")
        read: dict[str, Any] = {"data": split, "policy": before}
        self._do("evaluate", number, out=earlier, **read)
        read |= {"policy": aligned, "previous": earlier}
        self._do("evaluate", number, out=later, **read)
        changes = read_manifest(later).figures["change"]
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
        """Evaluates a policy, or leaves that to the workers that the next training does not use."""
        self.waiting.append((policy, number))
        if not self.is_evaluated_beside_training:
            self.evaluate_waiting(self.workers)

    @property
    def is_evaluated_beside_training(self) -> bool:
        """Whether a training leaves cores to other workers; all GPUs train, and then evaluate."""
        is_alone = self.processes in (None, 1) and not visible_gpus(self.config.device)
        return is_alone and len(self.workers) > 1

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluates what is waiting while this process trains."""
        failures: list[BaseException] = []
        waiting, self.waiting = self.waiting, []

        def evaluate() -> None:
            try:
                for policy, number in waiting:
                    self._evaluate(policy, number, self.workers[1:])
            except BaseException as failure:
                failures.append(failure)

        # A daemon, since an interrupted run must not wait for a judge's answer.
        thread = threading.Thread(target=evaluate, daemon=True)
        try:
            if waiting:
                thread.start()
            yield
            if waiting:
                thread.join()
        except BaseException:
            # The user waits for the error; the journal keeps what the evaluation has so far.
            stop_workers()
            raise
        if failures:
            raise failures[0]

    def evaluate_waiting(self, workers: tuple[int, ...]) -> None:
        """Evaluates what is waiting.

        Args:
            workers: The workers to use.
        """
        waiting, self.waiting = self.waiting, []
        for policy, number in waiting:
            self._evaluate(policy, number, workers)

    def _evaluate(self, policy: Path, number: int, workers: tuple[int, ...]) -> None:
        previous = self.out.output("evaluate", number - 1) if number else None
        data = self.out.split("heldout")
        read: dict[str, Any] = {"data": data, "policy": policy, "previous": previous}
        done = self._do("evaluate", number, workers=workers, **read)
        self.figures.append(read_manifest(done).figures)
        if self.out.known_figures()[: len(self.figures)] != self.figures:
            write_json(self.out.figures, self.figures)
        self.observer.figures(self.figures)
