"""``srccore stage <name>``: every stage alone, as a container runs it.

Settings come from a preset and ``--set``, as in ``srccore run``; files from the options. Each
command prints the stage's figures as JSON and writes its output folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srccore.cli.options import Overrides, Preset
from srccore.errors import UserError

if TYPE_CHECKING:
    from srccore.config import RunConfig
    from srccore.stages import Progress

__all__ = ["app"]

app = typer.Typer(
    help="Run one stage alone.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: srccore stage search-candidates --preset tiny --data calibration.parquet "
    "--policy tune-rationale/policy.json --round 1 --out found",
)

Out = Annotated[Path, typer.Option("--out", help="The output folder.")]
Data = Annotated[Path, typer.Option("--data", help="The data set that is read.")]
Rationales = Annotated[
    Path | None, typer.Option("--rationales", help="The folder of augment-rationales on the data.")
]
Policy = Annotated[Path, typer.Option("--policy", help="A policy.json.")]
Round = Annotated[int, typer.Option("--round", help="The round; 0 is before the first.")]
Shard = Annotated[str, typer.Option("--shard", help="INDEX/COUNT of the samples, from 0.")]


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    from rich.console import Console

    from srccore.run.console import ConsoleObserver

    with ConsoleObserver(Console(stderr=True, highlight=False)).stage(name, None) as progress:
        yield progress


def _config(preset: str, overrides: list[str]) -> RunConfig:
    from srccore.config import load_config
    from srccore.run.console import quiet_libraries
    from srccore.run.loop import set_threads

    quiet_libraries()
    config = load_config(preset, overrides)
    set_threads(config.threads)
    return config


def _tell(figures: dict[str, Any]) -> None:
    typer.echo(json.dumps(figures, indent=2))


@app.command("prepare-data")
def prepare_data(out: Out, overrides: Overrides, preset: Preset = "tiny") -> None:
    """Write the splits train, calibration and heldout as Parquet."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("prepare-data") as progress:
        _tell(stages.prepare_data(config.data, out, progress))


@app.command("augment-rationales")
def augment_rationales(
    data: Data,
    out: Out,
    overrides: Overrides,
    preset: Preset = "tiny",
) -> None:
    """Have a teacher write the rationales that a data set lacks."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("augment-rationales") as progress:
        _tell(stages.augment_rationales(config.augmentation, data=data, out=out, progress=progress))


@app.command("tune-rationale")
def tune_rationale(
    data: Data,
    rationales: Annotated[Path, typer.Option(help="The folder of augment-rationales.")],
    out: Out,
    overrides: Overrides,
    preset: Preset = "tiny",
) -> None:
    """Stage 1: teach the model to write a rationale before its answer."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("tune-rationale") as progress:
        _tell(
            stages.tune_rationale(
                config.rationale,
                model=config.model,
                data=data,
                rationales=rationales,
                out=out,
                seed=config.seed,
                device=config.device,
                progress=progress,
            )
        )


@app.command("search-candidates")
def search_candidates(
    data: Data,
    policy: Policy,
    out: Out,
    round_number: Round,
    overrides: Overrides,
    shard: Shard = "0/1",
    preset: Preset = "tiny",
) -> None:
    """Stage 2: search candidate responses."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("search-candidates") as progress:
        _tell(
            stages.search_candidates(
                config.search,
                data=data,
                policy=policy,
                out=out,
                seed=config.seed,
                round_number=round_number,
                shard=_shard(shard),
                device=config.device,
                progress=progress,
            )
        )


@app.command("sample-responses")
def sample_responses(
    data: Data,
    policy: Policy,
    out: Out,
    overrides: Overrides,
    preset: Preset = "tiny",
) -> None:
    """Sample whole responses, for R-Scorer to learn from."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("sample-responses") as progress:
        _tell(
            stages.sample_responses(
                config.search,
                annotation=config.annotation,
                data=data,
                policy=policy,
                out=out,
                seed=config.seed,
                device=config.device,
                progress=progress,
            )
        )


@app.command("annotate-ratings")
def annotate_ratings(
    data: Data,
    candidates: Annotated[Path, typer.Option(help="The folder of search-candidates.")],
    out: Out,
    overrides: Overrides,
    rationales: Rationales = None,
    preset: Preset = "tiny",
) -> None:
    """Have a teacher rate pairs of responses, for R-Scorer to learn from."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("annotate-ratings") as progress:
        _tell(
            stages.annotate_ratings(
                config.annotation,
                data=data,
                candidates=candidates,
                out=out,
                rationales=rationales,
                seed=config.seed,
                progress=progress,
            )
        )


@app.command("train-scorer")
def train_scorer(
    data: Data,
    labelled_pairs: Annotated[Path, typer.Option(help="The folder of annotate-ratings.")],
    out: Out,
    overrides: Overrides,
    rationales: Rationales = None,
    preset: Preset = "tiny",
) -> None:
    """Train R-Scorer and validate it."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("train-scorer") as progress:
        _tell(
            stages.train_scorer(
                config.scorer,
                model=config.rating_model,
                data=data,
                annotation=config.annotation,
                labelled_pairs=labelled_pairs,
                out=out,
                rationales=rationales,
                seed=config.seed,
                device=config.device,
                progress=progress,
            )
        )


@app.command("score-candidates")
def score_candidates(
    data: Data,
    candidates: Annotated[Path, typer.Option(help="The folder of search-candidates.")],
    scorer: Annotated[Path, typer.Option(help="The folder of train-scorer.")],
    out: Out,
    overrides: Overrides,
    rationales: Rationales = None,
    preset: Preset = "tiny",
) -> None:
    """Stage 3: have R-Scorer rate every ordered pair of candidates."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("score-candidates") as progress:
        _tell(
            stages.score_candidates(
                config.scoring,
                data=data,
                candidates=candidates,
                scorer=scorer,
                out=out,
                rationales=rationales,
                device=config.device,
                progress=progress,
            )
        )


@app.command("curate-preference")
def curate_preference(
    data: Data,
    candidates: Annotated[list[Path], typer.Option(help="A folder of search-candidates.")],
    ratings: Annotated[list[Path], typer.Option(help="A folder of score-candidates.")],
    out: Out,
    overrides: Overrides,
    preset: Preset = "tiny",
) -> None:
    """Stage 4: pick preferences from the ratings; give every shard's folders."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("curate-preference") as progress:
        _tell(
            stages.curate_preference(
                config.curation,
                data=data,
                candidates=candidates,
                ratings=ratings,
                out=out,
                progress=progress,
            )
        )


@app.command("train-dpo")
def train_dpo(
    data: Data,
    preferences: Annotated[Path, typer.Option(help="The folder of curate-preference.")],
    policy: Policy,
    out: Out,
    overrides: Overrides,
    preset: Preset = "tiny",
) -> None:
    """Stage 5: align the policy to the preferences."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("train-dpo") as progress:
        _tell(
            stages.train_dpo(
                config.dpo,
                data=data,
                preferences=preferences,
                policy=policy,
                out=out,
                seed=config.seed,
                device=config.device,
                progress=progress,
            )
        )


@app.command("evaluate")
def evaluate(
    data: Data,
    policy: Policy,
    out: Out,
    round_number: Round,
    overrides: Overrides,
    previous: Annotated[Path | None, typer.Option(help="The evaluation before.")] = None,
    preset: Preset = "tiny",
) -> None:
    """Answer a split greedily and judge rationale and answer."""
    from srccore import stages

    config = _config(preset, overrides)
    with _progress("evaluate") as progress:
        _tell(
            stages.evaluate(
                config.evaluation,
                data=data,
                policy=policy,
                out=out,
                seed=config.seed,
                round_number=round_number,
                previous=previous,
                device=config.device,
                progress=progress,
            )
        )


@app.command("report")
def report(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Write the report of a run anew."""
    from srccore.run.report.gather import write_report

    typer.echo(write_report(run))


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UserError(f"--shard {text} is not of the form INDEX/COUNT.", "Write --shard 0/4.")
    return int(index), int(count)
