"""Options that many commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["Overrides", "Parameters", "Preset"]

Preset = Annotated[
    str, typer.Option("--preset", help="A preset's name (see srccore presets) or a YAML file.")
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        default_factory=list,
        show_default=False,
        help="Override a setting by its dotted name: --set search.width=6.",
    ),
]
Parameters = Annotated[
    list[str],
    typer.Option(
        "--param",
        metavar="NAME=VALUE",
        default_factory=list,
        show_default=False,
        help="Give a parameter of the pipeline that is no setting.",
    ),
]
