"""``srccore stage <name>``: every stage alone, as a container runs it.

The commands follow from the table of stages. Settings come from a preset and ``--set``, as in
``srccore run``; files come from the options. Each command writes the stage's output folder and
prints its figures as JSON.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from srccore.cli.options import Overrides, Preset, TrainingProcesses
from srccore.errors import UserError
from srccore.stages.table import STAGES, Input, Stage

__all__ = ["app", "report"]

app = typer.Typer(
    help="Run one stage alone.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Example: srccore stage search-candidates --preset tiny --data calibration.parquet "
    "--policy tune-rationale/policy.json --round 1 --out found",
)

Out = Annotated[Path, typer.Option("--out", metavar="PATH", help="The output folder.")]
Round = Annotated[int, typer.Option("--round", help="The round; 0 is the policy after stage 1.")]
Shard = Annotated[
    str, typer.Option("--shard", help="INDEX/COUNT: the part of the samples to work on, from 0.")
]


def _command(stage: Stage) -> Callable[..., None]:
    """Makes the command of a stage."""

    def run(preset: str, overrides: list[str], **given: Any) -> None:
        from srccore.config import load_config
        from srccore.run.console import ConsoleObserver, quiet_libraries
        from srccore.run.loop import set_threads
        from srccore.stages.checks import (
            check_device,
            check_settings,
            check_training_processes,
        )
        from srccore.stages.together import train
        from srccore.training.machine import Machine

        quiet_libraries()
        config = load_config(preset, overrides)
        set_threads(config.threads)
        check_settings([stage.name], dict(config))
        asked = given.pop("training_processes", None)
        check_training_processes(asked, config.device)
        check_device(stage.name, given["out"], config.device)
        if "shard" in stage.settings:
            given["shard"] = _shard(given["shard"])
        console = ConsoleObserver.on_stderr()
        with console.stage(stage.name, None) as progress:
            machine = Machine(config.device, progress)
            if stage.trains:
                given |= {"machine": machine, "note": console.note}
                figures = train(stage.name, config, asked, **given)
            else:
                figures = stage.run(config, machine=machine, **given)
        typer.echo(json.dumps(figures, indent=2))

    # Typer reads a command's options from its signature.
    vars(run)["__signature__"] = inspect.Signature(list(_parameters(stage)))
    return run


def _parameters(stage: Stage) -> Iterator[inspect.Parameter]:
    def option(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> Any:
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=default, annotation=annotation)

    for each in stage.inputs:
        yield option(each.name, _type(each), None if each.optional else inspect.Parameter.empty)
    yield option("out", Out)
    if "round_number" in stage.settings:
        yield option("round_number", Round)
    if "shard" in stage.settings:
        yield option("shard", Shard, "0/1")
    yield option("preset", Preset, "tiny")
    yield option("overrides", Overrides)
    if stage.trains:
        yield option("training_processes", TrainingProcesses, None)


def _type(given: Input) -> Any:
    if given.kind == "data":
        text = "The data set: a .parquet or .jsonl file, or a folder of one kind."
    elif given.kind == "policy":
        text = "A policy.json, or the folder of a training stage."
    elif given.many:
        text = f"The folder of {given.made_by}; repeat it for every shard."
    elif given.name == "previous":
        text = f"The folder of {given.made_by} for the policy before."
    else:
        text = f"The folder of {given.made_by}."
    name = given.name.replace("_", "-")
    option = typer.Option(f"--{name}", metavar="PATH", help=text, show_default=False)
    if given.many:
        return Annotated[list[Path], option]
    return Annotated[Path | None, option] if given.optional else Annotated[Path, option]


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(
            f"--shard {text} is not INDEX/COUNT with INDEX below COUNT.", "Write --shard 0/4."
        )
    return int(index), int(count)


for _stage in STAGES.values():
    if _stage.module:
        app.command(_stage.name, help=_stage.summary)(_command(_stage))


@app.command("report")
def report(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")]) -> None:
    """Write the report of a run, finished or not."""
    from srccore.run.report.gather import write_report

    typer.echo(write_report(run))
