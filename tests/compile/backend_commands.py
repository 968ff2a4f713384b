"""Calls the commands that talk to a backend, as the command line does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shallow import shallow
from typer.testing import CliRunner

from srccore.cli.main import app
from srccore.errors import UserError

NO_BACKEND = dict.fromkeys(
    [
        "KFP_HOST",
        "KFP_NAMESPACE",
        "KFP_TOKEN",
        "KFP_COOKIES",
        "KFP_USER_HEADER",
        "KF_PIPELINES_ENDPOINT",
        "KF_PIPELINES_UI_ENDPOINT",
        "KUBERNETES_SERVICE_HOST",
    ]
)
"""An environment without a backend."""
ROOT = "--artifact-root=s3://bucket/runs"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str


def call(*arguments: object, **environment: str | Path) -> Outcome:
    """Calls a command; a `UserError` has exit code 2, as in `srccore.cli.main.main`."""
    given = {name: str(value) for name, value in environment.items()}
    words = [str(each) for each in arguments]
    result = shallow(CliRunner().invoke, app, words, env=NO_BACKEND | given)
    if isinstance(result.exception, UserError):
        return Outcome(2, f"{result.output}{result.exception}")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.output)
