"""A stage as a pod of a pipeline runs it: fetch what goes in, run it, publish what comes out.

Everything large lies under one `artifact_root`, a folder or ``s3://...``, as ``<stage>/<key>``: the
key is a hash of all that went in, the release among it. So work that was done before, by this run
or by another, is not done again. Where two pods work on one folder at the same time, one waits for
the other if they share a file system; else the first to finish wins. What Kubeflow carries from pod
to pod is small: a reference (a few lines of JSON that name a folder), or a ``policy.json`` whose
adapters are URIs. An input may also be the thing itself: a data set, a stage's folder, a policy.

Of several processes that train together (torchrun starts each of them with the same step), the
first works on the stage's folder and publishes it. The others work in folders that nobody keeps,
and none leaves before the stage is published.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

import srccore
from srccore import storage
from srccore.config import (
    AnnotationConfig,
    AugmentationConfig,
    DataConfig,
    EvaluationConfig,
    Section,
    TextModelConfig,
    explain,
    identity,
)
from srccore.errors import UserError
from srccore.files import MANIFEST, write_json
from srccore.models.policy import POLICY_FILE, Policy, parse_policy, policy_document, write_policy
from srccore.stages.folder import hash_input
from srccore.training.ranks import Processes, is_launched, joined
from srccore.training.resume import CHECKPOINTS, Checkpoints, PublishedCheckpoints, discard

__all__ = [
    "RUN",
    "STEP",
    "Finished",
    "Lineage",
    "Reference",
    "fetch_output",
    "finished_stage",
    "import_output",
    "locate_stage",
    "report_run",
    "run_stage",
]

STEP = "step.json"
"""In a stage's folder: which folders went into it."""
RUN = "run.json"
"""In a report's folder: the run's configuration."""


class Reference(BaseModel):
    """What a small artifact of Kubeflow says of a large one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    record: Literal["reference"] = "reference"
    version: Literal[1] = 1
    uri: str
    """A file or folder."""
    fingerprint: str | None = None
    """Of what srccore did not make and may change under the same URI."""
    figures: dict[str, Any] = {}


class Lineage(BaseModel):
    """Which stage a folder is of, and what went into it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    record: Literal["step"] = "step"
    version: Literal[1] = 1
    stage: str
    round: int | None
    inputs: dict[str, list[str]]
    """URIs by input; those under the artifact root are relative to it, so it can be moved."""


class Metrics(Protocol):
    """Kubeflow's ``dsl.Metrics``."""

    path: str

    def log_metric(self, metric: str, value: float) -> None:
        """Shows a number."""
        ...


@dataclass(frozen=True)
class Finished:
    """A stage that is done.

    Attributes:
        uri: Its folder.
        figures: What it tells of its work.
    """

    uri: str
    figures: dict[str, Any]

    def refer(self, artifact: str, name: str = "") -> None:
        """Writes a reference.

        Args:
            artifact: The path of a Kubeflow artifact.
            name: A file of the stage's folder; none is the folder.
        """
        uri = storage.join(self.uri, name) if name else self.uri
        _write(Path(artifact), Reference(uri=uri, figures=self.figures).model_dump(mode="json"))

    def write_policy(self, artifact: str) -> None:
        """Writes the policy that the stage ended with, its adapters as URIs.

        Args:
            artifact: The path of a Kubeflow artifact.
        """
        policy = _policy_at(self.uri)
        _write(Path(artifact), policy_document(policy))

    def log(self, metrics: Metrics) -> None:
        """Shows all figures that are numbers.

        Args:
            metrics: Kubeflow's artifact; its file gets the numbers too, or nothing that
                asks whether the artifact is there would find it.
        """
        numbers = dict(_numbers(self.figures))
        for name, value in numbers.items():
            metrics.log_metric(name, value)
        _write(Path(metrics.path), numbers)


def run_stage(
    stage: str,
    artifact_root: str,
    *,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
    device: str = "auto",
    threads: int = 0,
) -> Finished:
    """Runs a stage, or finds it done.

    Args:
        stage: Its name, ``search-candidates``.
        artifact_root: The folder or ``s3://...`` below which it writes.
        inputs: By the stage function's arguments, the paths of Kubeflow's artifacts: a reference,
            a policy file, or the thing itself. None is an input that was not given.
        settings: The stage function's other arguments, as JSON has them.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 leaves it alone.

    Returns:
        Where its folder lies, and its figures.

    Raises:
        SystemExit: With 2, after one paragraph on stderr, where the user can mend what is wrong.
            Its cause is the `UserError`.
    """
    from srccore.run.console import quiet_libraries
    from srccore.run.loop import set_threads

    with _explained():
        quiet_libraries()
        set_threads(threads or None)
        work = _work(stage, artifact_root, inputs, settings, device)
        if not is_launched():
            return _finished_before(work) or _lead(work, Processes())
        if not work.trains:
            raise UserError(
                f"{stage} runs in one process.", "Let torchrun start training stages only."
            )
        with joined(device) as processes:
            return _run_together(work, processes)


def locate_stage(
    stage: str,
    artifact_root: str,
    *,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
) -> str:
    """Says where `run_stage` of the same arguments writes.

    Args:
        stage: Its name.
        artifact_root: The folder or ``s3://...`` below which it writes.
        inputs: By the stage function's arguments, the paths of Kubeflow's artifacts.
        settings: The stage function's other arguments, as JSON has them.

    Returns:
        The folder's path or URI.

    Raises:
        UserError: An input is missing, or a setting does not hold.
    """
    return _work(stage, artifact_root, inputs, settings, "auto").uri


def finished_stage(stage: str, uri: str) -> Finished | None:
    """Looks whether a stage is done.

    Args:
        stage: Its name.
        uri: Its folder, by `locate_stage`.

    Returns:
        Its folder and figures; None where there is work to do.

    Raises:
        UserError: The folder is another stage's.
    """
    path = storage.join(uri, MANIFEST)
    if not storage.exists(path):
        return None
    manifest = json.loads(storage.read_text(path))
    if manifest["stage"] != stage:
        raise UserError(f"{uri} holds {manifest['stage']}, not {stage}.", "Check the address.")
    return Finished(uri, manifest["figures"])


def import_output(uri: str, artifact: str) -> None:
    """Refers to a file or folder that is there already.

    Args:
        uri: Where it lies.
        artifact: The path of a Kubeflow artifact.

    Raises:
        SystemExit: With 2, where nothing lies there.
    """
    with _explained():
        if not uri or not storage.exists(uri):
            raise UserError(f"There is nothing at {uri!r}.", "Check the path or URI.")
        reference = Reference(uri=uri, fingerprint=_content("uri", uri))
        _write(Path(artifact), reference.model_dump(mode="json"))


def fetch_output(artifact: str) -> Path:
    """Brings what an output refers to, for a component of your own.

    Args:
        artifact: The path of a Kubeflow artifact that a component of the suite wrote.

    Returns:
        The file or folder on this machine: of search-candidates, one with ``candidates.jsonl``.

    Raises:
        SystemExit: With 2, where it is no reference or nothing lies there.
    """
    with _explained():
        reference = _reference(Path(artifact))
        if reference is None:
            raise UserError(
                f"{artifact} is no reference.", "Give an output of a component of the suite."
            )
        return storage.fetch(reference.uri)


def report_run(
    artifact_root: str, last_evaluation: str, page: str, config: Mapping[str, Any]
) -> None:
    """Writes the report of the run that ends with an evaluation.

    The report also stays under the artifact root, in a folder that `srccore collect` takes.

    Args:
        artifact_root: The folder or ``s3://...`` of the run.
        last_evaluation: The artifact of the last `evaluate`.
        page: The path of the artifact that gets the HTML page.
        config: The run's configuration, as `srccore.config.RunConfig` has it.

    Raises:
        SystemExit: With 2, where something is missing.
    """
    from srccore.config import validate_config
    from srccore.run.report.gather import write_report
    from srccore.steps.home import collect_run

    with _explained(), tempfile.TemporaryDirectory() as scratch:
        root = _root(artifact_root)
        reference = _reference(Path(last_evaluation))
        if reference is None:
            raise UserError(
                "The evaluation is no reference.", "Give what the component evaluate returned."
            )
        run = Path(scratch) / "run"
        checked = validate_config(config, "The configuration")
        collect_run(root, reference.uri, checked, run)
        given = {"last_evaluation": [_Input(reference.uri, _below(root, reference.uri))]}
        uri = storage.join(root, f"report/{_key('report', {'config': checked}, given)}")
        folder = storage.local_path(uri)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (write_report(run), run / RUN):
            shutil.copyfile(file, folder / file.name)
        _write_lineage(folder, "report", None, given, root)
        storage.publish(folder, uri)
        Path(page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "report.html", page)
        print(f"The report is at {uri}; srccore collect {uri} brings the run.", file=sys.stderr)


@dataclass(frozen=True)
class _Work:
    """A stage with all that goes into it.

    Attributes:
        stage: Its name.
        function: The stage function.
        hints: The types of its arguments.
        arguments: Its checked settings, and where it runs.
        inputs: Its inputs, as `run_stage` was given them.
        given: The same, read.
        root: The artifact root.
        uri: Where its folder shall lie.
    """

    stage: str
    function: Callable[..., dict[str, Any]]
    hints: Mapping[str, Any]
    arguments: Mapping[str, Any]
    inputs: Mapping[str, str | Sequence[str] | None]
    given: Mapping[str, Sequence[_Input]]
    root: str
    uri: str

    @property
    def trains(self) -> bool:
        """Whether several processes can do it together, and go on from its checkpoints."""
        return "checkpoints" in self.hints

    def run(self, out: Path, **more: Any) -> dict[str, Any]:
        """Fetches what goes in and runs the stage function.

        Args:
            out: The output folder.
            more: Further arguments of the function.

        Returns:
            Its figures.
        """
        arguments = {**self.arguments, **more}
        if self.trains:
            arguments["checkpoints"] = self._checkpoints()
        with tempfile.TemporaryDirectory() as scratch:
            for name, found in self.given.items():
                paths = [each.fetch(Path(scratch)) for each in found]
                is_list = isinstance(self.inputs[name], (list, tuple))
                arguments[name] = paths if is_list else paths[0]
            return self.function(**arguments, out=out)

    def _checkpoints(self) -> Checkpoints:
        """The same ones for all processes, whatever their output folder."""
        uri = storage.join(self.uri, CHECKPOINTS)
        folder = storage.local_path(uri)
        remote = storage.is_remote(uri)
        return PublishedCheckpoints(folder, uri) if remote else Checkpoints(folder)

    def discard_checkpoints(self) -> None:
        """Removes what a published stage needs no longer."""
        if self.trains:
            discard(storage.join(self.uri, CHECKPOINTS))


def _work(
    stage: str,
    artifact_root: str,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
    device: str,
) -> _Work:
    from srccore import stages

    root = _root(artifact_root)
    function = getattr(stages, stage.replace("-", "_"))
    hints = get_type_hints(function)
    arguments = {name: _typed(stage, name, settings[name], hints[name]) for name in settings}
    given = {
        name: [_read_input(name, Path(path), root) for path in _as_list(value)]
        for name, value in inputs.items()
        if value is not None
    }
    uri = storage.join(root, f"{stage}/{_key(stage, arguments, given)}")
    if "device" in hints:
        arguments["device"] = device
    return _Work(stage, function, hints, arguments, inputs, given, root, uri)


def _run_together(work: _Work, processes: Processes) -> Finished:
    """Runs a stage as one of several processes, each of which takes the same turns."""
    done = None
    if processes.is_first:
        done = _finished_before(work)
        if not processes.from_first(done is not None):
            done = _lead(work, processes)
    elif not processes.from_first(False):
        _follow(work, processes)
    # The operator ends the other pods as soon as one has completed.
    processes.wait()
    done = done or finished_stage(work.stage, work.uri)
    if done is None:
        raise UserError(
            f"This process does not see {work.uri}, where the first one wrote.",
            "Give an artifact root that all pods see: s3://BUCKET/PATH.",
        )
    return done


def _lead(work: _Work, processes: Processes) -> Finished:
    """Works on the stage's folder, and publishes it."""
    from srccore.run.console import ConsoleObserver

    folder = storage.local_path(work.uri)
    round_number = work.arguments.get("round_number")
    with _alone(folder):
        # An attempt that was cut off after training has only to be published.
        processes.from_first((folder / MANIFEST).exists())
        with ConsoleObserver().stage(work.stage, round_number) as progress:
            figures = work.run(folder, progress=progress)
        _write_lineage(folder, work.stage, round_number, work.given, work.root)
        # Another pod, of another run, may have done the same meanwhile: others read its files.
        if done := _finished_before(work):
            return done
        storage.publish(folder, work.uri)
        work.discard_checkpoints()
    print(f"{work.stage} is done: {work.uri}", file=sys.stderr)
    return Finished(work.uri, figures)


def _follow(work: _Work, processes: Processes) -> None:
    """Trains along with the first process."""
    if not processes.from_first(False):
        with tempfile.TemporaryDirectory() as scratch:
            work.run(Path(scratch) / "out")


def _finished_before(work: _Work) -> Finished | None:
    """What a bucket holds of a stage; a local folder is looked at by the stage itself."""
    done = finished_stage(work.stage, work.uri) if storage.is_remote(work.uri) else None
    if done:
        print(f"{work.stage} was done before: {work.uri}", file=sys.stderr)
        work.discard_checkpoints()
    return done


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process of this file system works on a folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Another process works on {folder}: waiting for it.", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks; one pod a folder is the rule anyway.
            print(f"{folder} is worked on without a lock ({error.strerror}).", file=sys.stderr)
        yield


def _write_lineage(
    folder: Path,
    stage: str,
    round_number: int | None,
    given: Mapping[str, Sequence[_Input]],
    root: str,
) -> None:
    inputs = {name: [_below(root, each.uri) for each in found] for name, found in given.items()}
    lineage = Lineage(stage=stage, round=round_number, inputs=inputs)
    write_json(folder / STEP, lineage.model_dump(mode="json"))


@dataclass(frozen=True)
class _Input:
    """One input of a stage.

    Attributes:
        uri: Where it lies; for a policy, the folder of its last adapter's stage.
        mark: What it counts by in the key.
        policy: The policy, with URIs as adapters, where it is one.
    """

    uri: str
    mark: str
    policy: Policy | None = None

    def fetch(self, scratch: Path) -> Path:
        """Brings it to this machine; a policy's adapters are fetched where they are folded."""
        if self.policy is None:
            return storage.fetch(self.uri)
        file = scratch / POLICY_FILE
        write_policy(file, self.policy)
        return file


def _read_input(name: str, path: Path, root: str) -> _Input:
    """Reads an artifact: a reference, a policy, or the thing itself, which counts by its bytes."""
    reference = _reference(path)
    if name == "policy":
        return _policy_input(reference.uri if reference else str(path), root)
    if reference:
        mark = f"{_below(root, reference.uri)} {reference.fingerprint or ''}"
        return _Input(uri=reference.uri, mark=mark)
    return _Input(uri=str(path), mark=hash_input(name, path))


def _policy_input(uri: str, root: str) -> _Input:
    """Counts by base and adapters: those under the root by name, others by what lies there."""
    policy = _policy_at(uri)
    base = policy.base.path
    is_stored = storage.is_remote(base) or Path(base).is_dir()
    adapters = [
        _below(root, each) if each.startswith(f"{root}/") else _content("adapter", each)
        for each in policy.adapters
    ]
    content = storage.fingerprint(base) if is_stored else ""
    return _Input(
        uri=storage.join(policy.adapters[-1], "..") if policy.adapters else base,
        mark=json.dumps([policy.base.model_dump(mode="json"), content, adapters]),
        policy=policy,
    )


def _content(name: str, uri: str) -> str:
    """What an address counts by: its listing in a bucket, its bytes on a disk."""
    if storage.is_remote(uri):
        return storage.fingerprint(uri)
    return hash_input(name, storage.local_path(uri))


def _reference(path: Path) -> Reference | None:
    """The reference that a file holds; None where it is something else."""
    try:
        with path.open("rb") as file:
            return Reference.model_validate_json(file.read(2**20))
    except (OSError, ValidationError):
        return None


def _policy_at(uri: str) -> Policy:
    """Reads a policy file, or the one of a folder; its adapters become URIs."""
    is_folder = not uri.endswith(".json") and storage.exists(storage.join(uri, POLICY_FILE))
    folder = uri if is_folder else storage.join(uri, "..")
    text = storage.read_text(storage.join(uri, POLICY_FILE) if is_folder else uri)
    policy = parse_policy(text, uri)
    adapters = tuple(storage.resolve(folder, name) for name in policy.adapters)
    return policy.model_copy(update={"adapters": adapters})


def _key(stage: str, arguments: Mapping[str, Any], given: Mapping[str, Sequence[_Input]]) -> str:
    """Names a stage's folder by all that decides what it will hold."""
    values = {
        name: identity(value) if isinstance(value, Section) else value
        for name, value in arguments.items()
    }
    inputs = {name: [each.mark for each in found] for name, found in given.items()}
    sources = [_source(value) for value in arguments.values()]
    text = json.dumps([stage, srccore.__version__, values, sources, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _source(value: object) -> str | None:
    """What a setting that names a checkpoint or a data set counts by: what lies there."""
    from srccore.stages import model_input

    if isinstance(value, TextModelConfig):
        return hash_input("model", model_input(value.path))
    if isinstance(value, DataConfig) and value.source != "embedded":
        return _content("data.source", value.source)
    if isinstance(value, AugmentationConfig | AnnotationConfig | EvaluationConfig):
        # Where the endpoint decides which model answers, only its address tells models apart.
        return value.endpoint.url if value.endpoint.model is None else None
    return None


def _typed(stage: str, name: str, value: object, hint: Any) -> Any:
    """Checks a setting against the stage function's annotation: numbers arrive as floats."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise explain(f"The setting {name} of {stage}", error) from None


def _root(artifact_root: str) -> str:
    """One spelling of a root, since keys and lineage hold what lies below it without it."""
    if storage.is_remote(artifact_root):
        return artifact_root.rstrip("/")
    return str(storage.local_path(artifact_root).resolve())


def _below(root: str, uri: str) -> str:
    return uri.removeprefix(root + "/")


def _as_list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Kubeflow shows the end of a pod's log: the paragraph must be there, and no traceback."""
    try:
        yield
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
