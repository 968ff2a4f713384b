"""Options that many commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from srccore.kubeflow.connection import Connection

__all__ = ["Overrides", "Parameters", "Preset", "with_connection"]

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
CONNECTION: dict[str, Any] = {
    "host": Annotated[
        str | None,
        typer.Option(
            envvar=["KFP_HOST", "KF_PIPELINES_ENDPOINT"],
            help="Address of Kubeflow Pipelines. Without it: the cluster that this runs in, or the "
            "kubeconfig's.",
        ),
    ],
    "namespace": Annotated[
        str | None,
        typer.Option(
            envvar="KFP_NAMESPACE", help="Your profile's namespace, in multi-user installs."
        ),
    ],
    "token_file": Annotated[
        Path | None,
        typer.Option(help="A file with a bearer token; or set KFP_TOKEN.", show_default=False),
    ],
    "cookies_file": Annotated[
        Path | None,
        typer.Option(
            help="A file with cookies as NAME=VALUE; NAME=VALUE; or set KFP_COOKIES.",
            show_default=False,
        ),
    ],
    "user_header": Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE",
            envvar="KFP_USER_HEADER",
            help="A header that names the user: kubeflow-userid=ann@example.org.",
        ),
    ],
    "ca_bundle": Annotated[
        Path | None, typer.Option(help="Certificates to trust, in PEM; the public ones otherwise.")
    ],
    "ui_url": Annotated[
        str | None,
        typer.Option(
            envvar="KF_PIPELINES_UI_ENDPOINT", help="What links begin with; the host otherwise."
        ),
    ],
}
"""The options that find Kubeflow Pipelines: the fields of `Connection`."""


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `Connection` to a command, after its own.

    Args:
        command: Takes an argument ``connection: Connection``, which is made from the options.

    Returns:
        The function to register with Typer.
    """

    @functools.wraps(command)
    def connected(**arguments: Any) -> None:
        connection = Connection(**{name: arguments.pop(name) for name in CONNECTION})
        command(connection=connection, **arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [each for name, each in signature.parameters.items() if name != "connection"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in CONNECTION.items()
    ]
    # Typer reads the options from here.
    vars(connected)["__signature__"] = signature.replace(parameters=[*own, *options])
    return connected
