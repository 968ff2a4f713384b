"""Options shared by several commands."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from srccore.kubeflow.connection import Connection

__all__ = [
    "Overrides",
    "Parameters",
    "Preset",
    "TrainingProcesses",
    "repeated",
    "with_connection",
]

Preset = Annotated[
    str,
    typer.Option("--preset", help="The name of a preset (see srccore presets), or a YAML file."),
]
TrainingProcesses = Annotated[
    int | None,
    typer.Option(
        "--training-processes",
        min=1,
        show_default=False,
        help="The processes that train together, at most; one for each GPU if not set. Results "
        "only differ in rounding, and in what a dropout leaves out.",
    ),
]


def repeated(name: str, metavar: str, text: str) -> Any:
    """An option for a list, which is empty without it.

    Args:
        name: The option.
        metavar: What its values look like.
        text: Its help.
    """
    return typer.Option(name, metavar=metavar, default_factory=list, show_default=False, help=text)


Overrides = Annotated[
    list[str],
    repeated("--set", "NAME=VALUE", "Override a setting by its dotted name: --set search.width=6."),
]
Parameters = Annotated[
    list[str],
    repeated("--param", "NAME=VALUE", "Set a pipeline parameter that is not a setting."),
]
CONNECTION: dict[str, Any] = {
    "host": typer.Option(
        envvar=["KFP_HOST", "KF_PIPELINES_ENDPOINT"],
        help="The address of Kubeflow Pipelines. By default, the cluster that this runs in, or "
        "the one in your kubeconfig.",
    ),
    "namespace": typer.Option(
        envvar="KFP_NAMESPACE", help="Your profile's namespace, on multi-user installations."
    ),
    "token_file": typer.Option(
        help="A file with a bearer token. Alternatively, set KFP_TOKEN.", show_default=False
    ),
    "cookies_file": typer.Option(
        help="A file with cookies, as NAME=VALUE; NAME=VALUE. Alternatively, set KFP_COOKIES.",
        show_default=False,
    ),
    "user_header": typer.Option(
        metavar="NAME=VALUE",
        envvar="KFP_USER_HEADER",
        help="The header that identifies the user: kubeflow-userid=ann@example.org.",
    ),
    "ca_bundle": typer.Option(
        help="A PEM file of certificates to trust instead of the public ones."
    ),
    "ui_url": typer.Option(
        envvar="KF_PIPELINES_UI_ENDPOINT",
        help="The address that links to the UI start with; the host by default.",
    ),
}
"""The options that locate Kubeflow Pipelines: the fields of `Connection`, which have the types."""


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `Connection` to a command, after its own.

    Args:
        command: Takes an argument ``connection: Connection``, which is built from the options.

    Returns:
        The function to register with Typer.
    """

    @functools.wraps(command)
    def connected(**arguments: Any) -> None:
        connection = Connection(**{name: arguments.pop(name) for name in CONNECTION})
        command(connection=connection, **arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [each for name, each in signature.parameters.items() if name != "connection"]
    kind, types = inspect.Parameter.KEYWORD_ONLY, get_type_hints(Connection)
    options = [
        inspect.Parameter(name, kind, default=None, annotation=Annotated[types[name], option])
        for name, option in CONNECTION.items()
    ]
    # Typer reads the options from here.
    vars(connected)["__signature__"] = signature.replace(parameters=[*own, *options])
    return connected
