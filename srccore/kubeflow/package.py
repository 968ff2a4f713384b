"""A compiled pipeline file, and the arguments of a run of it.

The file is in Kubeflow's own format, two YAML documents: the pipeline, and the settings that are
specific to Kubernetes. Its description starts with ``srccore <version>``; since the images contain
that version, files of other versions are refused. Its parameters are fields and sections of
`RunConfig` with the preset's values as defaults; all other fields of `RunConfig` were fixed when
the file was compiled.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

import srccore
from srccore.cluster.request import pods_reach
from srccore.config import RunConfig, apply_overrides, texts, validate_config
from srccore.containers.names import CACHE
from srccore.errors import UserError
from srccore.shown import has_credentials
from srccore.stages.checks import check_settings
from srccore.stages.table import STAGES

__all__ = ["Package", "Parameter", "read_package", "refuse_secrets", "shared_root"]

ARTIFACT_ROOT = "artifact_root"
COMPILE = "Compile it with srccore compile."
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""In C if PyYAML has it, which reads a shipped pipeline six times faster."""
_TYPES: Mapping[str, Any] = {
    "NUMBER_INTEGER": int,
    "NUMBER_DOUBLE": float,
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}
_MADE_BY = re.compile(r"srccore ([^\s,]+)(?:,|\s|$)")


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter.

    Args:
        type: Its type in the file: ``STRING``, ``NUMBER_INTEGER``, ``STRUCT``, ...
        default: Its default; None if it has none.
        required: Whether a run must set it.
    """

    type: str
    default: Any = None
    required: bool = False


@dataclass(frozen=True)
class Package:
    """A pipeline compiled by this version of srccore.

    Args:
        path: The file.
        name: The pipeline's name.
        version: The version of srccore that compiled it.
        parameters: Its parameters, by name.
        pipeline: The first document.
        platforms: The second document, if there is one.
    """

    path: Path
    name: str
    version: str
    parameters: Mapping[str, Parameter]
    pipeline: Mapping[str, Any]
    platforms: Mapping[str, Any] | None = None

    def spec(self, *, cache: bool = True) -> dict[str, Any]:
        """The pipeline as the API takes it.

        Args:
            cache: False turns the cache off for every task, including those of nested pipelines.
        """
        pipeline = copy.deepcopy(dict(self.pipeline))
        if not cache:
            for task in _tasks(pipeline):
                task["cachingOptions"] = {}
        if self.platforms is None:
            return pipeline
        return {"pipeline_spec": pipeline, "platform_spec": dict(self.platforms)}

    def arguments(
        self, artifact_root: str, settings: Sequence[str] = (), given: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The arguments of a run: the artifact root, and all values that differ from the defaults.

        Args:
            artifact_root: The folder or ``s3://...`` that the run writes to.
            settings: ``dotted.name=value`` items, as for ``srccore run --set``.
            given: ``name=value`` items, for parameters that are not settings.

        Raises:
            UserError: A name does not exist, or a value is missing, fixed, of the wrong type, or
                could have a secret in it.
        """
        arguments: dict[str, Any] = {ARTIFACT_ROOT: artifact_root}
        arguments |= self._settings(settings)
        arguments |= dict(self._given(text) for text in given)
        missing = [
            name for name, p in self.parameters.items() if p.required and name not in arguments
        ]
        if missing:
            raise UserError(
                f"{self.path} requires {', '.join(missing)}.", f"Pass --param {missing[0]}=VALUE."
            )
        refuse_secrets(arguments)
        return arguments

    def refuse_unreachable(self, arguments: Mapping[str, Any]) -> None:
        """Refuses data, checkpoints and teachers that pods on a cluster cannot reach.

        Args:
            arguments: As `arguments` returns them.

        Raises:
            UserError: One of them is on a local disk, outside the pods' cache, or a stage would ask
                a teacher that has no address.
        """
        self.check_settings(arguments)
        for section, field in (("data", "source"), ("model", "path"), ("rating_model", "path")):
            if section not in self.parameters:
                continue
            given = (arguments.get(section) or self.parameters[section].default or {}).get(field)
            if given and not _is_reachable(section, given):
                raise UserError(
                    f"{section}.{field} is {given}, which pods cannot reach.",
                    f"Copy it to a bucket, and pass --set {section}.{field}=s3://BUCKET/KEY.",
                )

    def check_settings(self, arguments: Mapping[str, Any]) -> None:
        """Refuses what the settings already rule out: a teacher without an address.

        Args:
            arguments: As `arguments` returns them; without any, the defaults are checked.

        Raises:
            UserError: A stage of the pipeline would ask an endpoint that is not set.
        """
        stages = [name for name in STAGES if f"comp-{name}" in self.pipeline.get("components", {})]
        sections = {}
        settings = [STAGES[stage].teacher for stage in stages if STAGES[stage].teacher]
        for name in (setting.partition(".")[0] for setting in settings):
            section: Any = RunConfig.model_fields[name].annotation
            values = arguments.get(name) or self.parameters[name].default
            sections[name] = section.model_validate(values)
        check_settings(stages, sections)

    def refuse_jobs(self) -> None:
        """Refuses a pipeline that trains as a job, for use without a cluster.

        Raises:
            UserError: The pipeline trains as a job.
        """
        for task in _tasks(self.pipeline):
            launcher = task.get("inputs", {}).get("parameters", {}).get("launcher", {})
            chosen = launcher.get("runtimeValue", {}).get("constant", "inprocess")
            if chosen != "inprocess":
                raise UserError(
                    f"{self.path} trains as a {chosen}, which only a cluster can run.",
                    "Compile it with launcher: inprocess in its profile.",
                )

    def _settings(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The sections and fields that the overrides change, each as a whole."""
        if not overrides:
            return {}
        defaults = {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if name in RunConfig.model_fields
        }
        for override in overrides:
            name = override.partition("=")[0].partition(".")[0]
            if name in RunConfig.model_fields and name not in defaults:
                raise UserError(
                    f"--set {override}: {name} is fixed when the pipeline is compiled.",
                    f"Compile it again: srccore compile --set {override}.",
                )
        values = copy.deepcopy(defaults)
        apply_overrides(values, overrides)
        before, after = self._config(defaults), self._config(values)
        return {name: after[name] for name in defaults if after[name] != before[name]}

    def _config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values as a run would read them, validated."""
        # The name is not a setting, and a parameter cannot be None: no threads are written as 0.
        whole = {**values, "name": self.name, "threads": values.get("threads") or None}
        validate_config(whole, f"configuration ({self.path})")
        # Not what `validate_config` returns, since it resolves folders of this machine. None is
        # left out: it is the default of every such field, and Kubeflow's dicts cannot have it.
        checked = RunConfig.model_validate(whole).model_dump(mode="json", exclude_none=True)
        return {"threads": 0} | checked

    def _given(self, text: str) -> tuple[str, Any]:
        name, found, value = text.partition("=")
        others = [n for n in self.parameters if n not in {*RunConfig.model_fields, ARTIFACT_ROOT}]
        if not found:
            raise UserError(
                f"--param {text} is not of the form name=value.",
                f"The parameters are {', '.join(others) or 'none'}.",
            )
        if name in RunConfig.model_fields or name == ARTIFACT_ROOT:
            option = "--artifact-root" if name == ARTIFACT_ROOT else "--set"
            raise UserError(f"--param {text}: {name} is a setting.", f"Pass it with {option}.")
        if name not in others:
            raise UserError(
                f"--param {text}: {self.path} has no such parameter.",
                f"It has {', '.join(others) or 'only settings'}.",
            )
        return name, _typed(name, value, self.parameters[name].type)


def refuse_secrets(arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that have a password in them, or would get one.

    Kubeflow passes the arguments of a task on in those of its container, where the kubelet replaces
    ``$(NAME)`` by the variable of that name, which may come from a Secret.

    Args:
        arguments: Of a run, or the defaults of a pipeline.

    Raises:
        UserError: There is such a text in one of them.
    """
    for name, value in arguments.items():
        for text in texts(value):
            if has_credentials(text):
                raise UserError(
                    f"{name} has a URL with a user name or password, which Kubeflow would store.",
                    "Remove it, and pass credentials in environment variables from a Secret.",
                )
            if "$(" in text:
                raise UserError(
                    f"{name} has $( in it ({text[:60]!r}): Kubernetes would replace $(NAME) by "
                    "the value of an environment variable.",
                    "Write the value itself.",
                )


def shared_root(artifact_root: str) -> str:
    """Checks that all pods of a run can reach an artifact root.

    Raises:
        UserError: The artifact root is not in a bucket.
    """
    if not re.fullmatch(r"s3://[^/]+(/.*)?", artifact_root):
        raise UserError(
            f"--artifact-root {artifact_root} is not in a bucket, where all pods can reach it.",
            "Pass --artifact-root s3://BUCKET/PREFIX.",
        )
    return artifact_root.rstrip("/")


def _is_reachable(section: str, given: str) -> bool:
    if section != "data":
        return pods_reach(given)
    return given == "embedded" or given.startswith(("s3://", f"{CACHE}/"))


def read_package(path: Path) -> Package:
    """Reads and checks a compiled pipeline file.

    Args:
        path: A file written by ``srccore compile``.

    Raises:
        UserError: The file is missing, is not a compiled pipeline, or is of another version.
    """
    documents = _documents(path)
    pipeline = documents[0] if documents else None
    if not (isinstance(pipeline, dict) and {"pipelineInfo", "root"} <= pipeline.keys()):
        raise UserError(f"{path} is not a compiled pipeline.", COMPILE)
    schema = str(pipeline.get("schemaVersion"))
    if not schema.startswith("2.1."):
        raise UserError(
            f"{path} uses version {schema} of Kubeflow's pipeline format, not 2.1.",
            COMPILE,
        )
    information = pipeline["pipelineInfo"]
    made_by = _MADE_BY.match(information.get("description") or "")
    if made_by is None:
        raise UserError(f"{path} was not compiled by srccore.", COMPILE)
    if made_by[1] != srccore.__version__:
        raise UserError(
            f"{path} was compiled by srccore {made_by[1]}, but this is {srccore.__version__}.",
            "Compile it again with this version, or install that one.",
        )
    parameters = _parameters(pipeline)
    if ARTIFACT_ROOT not in parameters:
        raise UserError(f"{path} has no parameter {ARTIFACT_ROOT}.", COMPILE)
    return Package(
        path=path,
        name=information["name"],
        version=made_by[1],
        parameters=parameters,
        pipeline=pipeline,
        platforms=documents[1] if len(documents) > 1 else None,
    )


def _tasks(pipeline: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All tasks of a pipeline: the root's, and those of its components."""
    for component in (pipeline["root"], *pipeline.get("components", {}).values()):
        yield from component.get("dag", {}).get("tasks", {}).values()


def _documents(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        return [each for each in yaml.load_all(text, _LOADER) if each is not None]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", COMPILE) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML: {reason}.", COMPILE) from None


def _parameters(pipeline: Mapping[str, Any]) -> dict[str, Parameter]:
    inputs = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    return {
        name: Parameter(
            type=definition["parameterType"],
            default=definition.get("defaultValue"),
            required="defaultValue" not in definition and not definition.get("isOptional"),
        )
        for name, definition in inputs.items()
    }


def _typed(name: str, text: str, kind: str) -> Any:
    """The value of a parameter from the command line, in its type."""
    if kind == "STRING":
        return text
    try:
        return TypeAdapter(_TYPES.get(kind, Any)).validate_json(text, strict=True)
    except ValidationError:
        raise UserError(
            f"--param {name}={text} is not a value of type {kind.lower().replace('_', ' ')}.",
            "Write the value as JSON.",
        ) from None
