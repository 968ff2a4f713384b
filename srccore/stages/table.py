"""Every stage, declared once: what it reads and writes, and what running it takes.

Images, components' pages, ``srccore stage`` commands, the checks before a run and the names that a
stage's folder may use for its inputs all follow from this table. A test holds it together with the
stage functions and the components. Imports the standard library only, since importing a component
must need no more than kfp.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["STAGES", "Input", "Stage"]

Base = Literal["light", "models"]


@dataclass(frozen=True)
class Input:
    """A file or folder that a stage reads.

    Attributes:
        name: The argument of the stage function and of the component.
        made_by: The stage whose output it usually is.
        output: That stage's output; the same name if empty.
        optional: Whether the stage runs without it.
        many: Whether it takes one for each shard.
        kind: A data set, the folder of a stage, or a policy.
    """

    name: str
    made_by: str
    output: str = ""
    optional: bool = False
    many: bool = False
    kind: Literal["data", "folder", "policy"] = "folder"


@dataclass(frozen=True)
class Stage:
    """A stage, as all that runs it needs to know it.

    Attributes:
        name: ``search-candidates``; the same in code, component, image, command and docs.
        summary: What it does, in one line for ``--help``.
        base: What its image is built on: ``models`` has torch, transformers and TRL.
        module: The module of its function; empty if it has none.
        sections: Arguments of the function that are sections of `srccore.config.RunConfig`.
        inputs: What it reads.
        sources: What else it is identified by: a data set, a checkpoint or an adapter that its
            configuration or its policy names.
        settings: Further arguments, which `srccore.config.RunConfig` or the caller gives.
        outputs: What its component passes on, beside metrics.
        engine: The section with its `srccore.config.EngineConfig`; with vLLM, it runs in another
            image.
        trains: Whether several processes can run it together, and resume from its checkpoints.
        teacher: The setting that may choose an endpoint for it to ask.
        without_teacher: How to do without that endpoint.
        version: Part of the stage's key. Raised when its code computes something else from the
            same inputs and settings, so that earlier work is not taken over.
    """

    name: str
    summary: str
    base: Base
    module: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    sources: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    engine: str = ""
    trains: bool = False
    teacher: str = ""
    without_teacher: str = ""
    version: int = 1

    @property
    def has_journal(self) -> bool:
        """Whether it keeps what it has done so far, sample by sample."""
        return bool(self.engine or self.teacher)

    @property
    def python_name(self) -> str:
        """The name of its function and of its component."""
        return self.name.replace("-", "_")

    def function(self) -> Callable[..., dict[str, Any]]:
        """Imports the stage function."""
        module = importlib.import_module(f"srccore.stages.{self.module}")
        function: Callable[..., dict[str, Any]] = getattr(module, self.python_name)
        return function

    def run(self, config: Any, **given: Any) -> dict[str, Any]:
        """Runs the stage function with the settings of a run.

        Args:
            config: A `srccore.config.RunConfig`: gives the sections and the seed.
            given: All other arguments of the function.

        Returns:
            The stage's figures.
        """
        given |= {name: getattr(config, section) for name, section in self.sections.items()}
        if "seed" in self.settings:
            given["seed"] = config.seed
        return self.function()(**given)


_POLICY = Input("policy", "tune-rationale", kind="policy")
_RATIONALES = Input("rationales", "augment-rationales", optional=True)


def _data(split: str) -> Input:
    return Input("data", "prepare-data", split, kind="data")


_TABLE = (
    Stage(
        "import-output",
        "Refer to a file or folder that exists already.",
        base="light",
        settings=("uri",),
        outputs=("output",),
    ),
    Stage(
        "prepare-data",
        "Write the splits train, calibration and heldout.",
        base="light",
        module="data",
        sections={"config": "data"},
        sources=("source",),
        outputs=("train", "calibration", "heldout"),
    ),
    Stage(
        "augment-rationales",
        "Ask a teacher for missing rationales.",
        base="light",
        module="rationales",
        sections={"config": "augmentation"},
        inputs=(_data("train"),),
        outputs=("rationales",),
        teacher="augmentation.teacher",
        without_teacher="augmentation.teacher=facts, or augment: false in a pipeline's profile",
    ),
    Stage(
        "tune-rationale",
        "Stage 1: teach the model to reason first.",
        base="models",
        module="rationales",
        sections={"config": "rationale", "model": "model"},
        inputs=(_data("train"), _RATIONALES),
        sources=("model",),
        settings=("seed",),
        outputs=("policy",),
        trains=True,
    ),
    Stage(
        "sample-responses",
        "Sample whole responses for R-Scorer's training.",
        base="models",
        module="candidates",
        sections={"config": "search", "annotation": "annotation"},
        inputs=(_data("train"), _POLICY),
        settings=("seed",),
        outputs=("candidates",),
        engine="search",
    ),
    Stage(
        "annotate-ratings",
        "Ask a teacher to rate pairs of responses.",
        base="light",
        module="scorer",
        sections={"config": "annotation"},
        inputs=(_data("train"), Input("candidates", "sample-responses"), _RATIONALES),
        settings=("seed",),
        outputs=("labelled_pairs",),
        teacher="annotation.teacher",
        without_teacher="annotation.teacher=facts, or another scorer in a pipeline's profile",
    ),
    Stage(
        "train-scorer",
        "Train R-Scorer and validate it.",
        base="models",
        module="scorer",
        sections={"config": "scorer", "annotation": "annotation", "model": "rating_model"},
        inputs=(_data("train"), Input("labelled_pairs", "annotate-ratings"), _RATIONALES),
        sources=("model",),
        settings=("seed",),
        outputs=("scorer",),
        trains=True,
    ),
    Stage(
        "search-candidates",
        "Stage 2: search candidate responses.",
        base="models",
        module="candidates",
        sections={"config": "search"},
        inputs=(_data("calibration"), _POLICY),
        settings=("seed", "round_number", "shard"),
        outputs=("candidates",),
        engine="search",
    ),
    Stage(
        "score-candidates",
        "Stage 3: rate all ordered pairs of candidates.",
        base="models",
        module="candidates",
        sections={"config": "scoring"},
        inputs=(
            _data("calibration"),
            Input("candidates", "search-candidates"),
            Input("scorer", "train-scorer"),
            _RATIONALES,
        ),
        outputs=("ratings",),
        engine="scoring",
    ),
    Stage(
        "curate-preference",
        "Stage 4: choose preferences from the ratings.",
        base="light",
        module="preferences",
        sections={"config": "curation"},
        inputs=(
            _data("calibration"),
            Input("candidates", "search-candidates", many=True),
            Input("ratings", "score-candidates", many=True),
        ),
        outputs=("preferences",),
    ),
    Stage(
        "train-dpo",
        "Stage 5: align the policy to the preferences.",
        base="models",
        module="preferences",
        sections={"config": "dpo"},
        inputs=(_data("calibration"), Input("preferences", "curate-preference"), _POLICY),
        settings=("seed",),
        outputs=("aligned",),
        trains=True,
    ),
    Stage(
        "evaluate",
        "Answer a split and judge the responses.",
        base="models",
        module="evaluation",
        sections={"config": "evaluation"},
        inputs=(
            _data("heldout"),
            _POLICY,
            Input("previous", "evaluate", "evaluation", optional=True),
        ),
        settings=("seed", "round_number"),
        outputs=("evaluation",),
        engine="evaluation",
        teacher="evaluation.judge",
        without_teacher="evaluation.judge=none",
    ),
    Stage(
        "report",
        "Write the report of a run.",
        base="light",
        inputs=(Input("last_evaluation", "evaluate", "evaluation"),),
        outputs=("page",),
    ),
)

STAGES: Mapping[str, Stage] = {stage.name: stage for stage in _TABLE}
"""The stages by name, in the order of the method."""
