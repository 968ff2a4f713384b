"""A stage as a pod of a pipeline runs it: fetch what goes in, run it, publish what comes out.

Everything large is stored under one `artifact_root`, a folder or ``s3://...``, as
``<stage>/<key>``: the key is a hash of everything that went in, including the version of the
stage's code. Work that this run or another one has done before is therefore not done again. What
Kubeflow passes from pod to pod is small: a reference (a few lines of JSON that name a folder), or a
``policy.json`` whose adapters are URIs. An input may also be the thing itself: a data set, a
stage's folder, a policy.

If two pods do the same work at the same time, one waits for the other where they share a file
system. In a bucket, the first to finish wins: each publishes in a folder of its own below
``<stage>/<key>``, and the first ``finished.json`` says which of them counts.

When several processes train together (torchrun starts each of them with the same step), the first
works on the stage's folder and publishes it. The others work in temporary folders, and none exits
before the stage is published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from srccore import storage
from srccore.config import Section, explain, identity
from srccore.errors import UserError
from srccore.files import MANIFEST, full_disk_explained, hold, write_json
from srccore.hashing import hash_text
from srccore.models.policy import POLICY_FILE, Policy, parse_policy, policy_document, write_policy
from srccore.stages import inputs as identify
from srccore.stages import splits
from srccore.stages.checks import check_device, check_settings
from srccore.stages.manifest import Manifest, parse_manifest, read_manifest
from srccore.stages.parts import PARTS
from srccore.stages.table import STAGES, Stage
from srccore.stopping import stoppable
from srccore.training.machine import Machine, Progress
from srccore.training.ranks import Processes, is_launched, joined
from srccore.training.resume import CHECKPOINTS, Checkpoints, PublishedCheckpoints, discard

__all__ = [
    "FINISHED",
    "STEP",
    "Finished",
    "Lineage",
    "Reference",
    "StepInput",
    "below",
    "explained",
    "fetch_output",
    "finished_stage",
    "import_output",
    "locate_stage",
    "normalise_root",
    "publish_stage",
    "read_reference",
    "run_stage",
    "work_key",
    "write_lineage",
]

FINISHED = "finished.json"
"""At the address of a stage in a bucket: the manifest of the attempt that counts."""
STEP = "step.json"
"""In a stage's folder: which folders went into it."""


class Reference(BaseModel):
    """A small Kubeflow artifact that stands for a large one."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    record: Literal["reference"] = "reference"
    version: Literal[1] = 1
    uri: str
    """A file or folder."""
    fingerprint: str | None = None
    """Identifies what srccore did not write, and what may change under the same URI."""
    figures: dict[str, Any] = {}


class Lineage(BaseModel):
    """Which stage wrote a folder, and what went into it."""

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
    """A finished stage.

    Attributes:
        uri: Its folder.
        figures: What it measured of its work.
        measured: What it took, as `srccore.stages.manifest.Manifest.measured`.
    """

    uri: str
    figures: dict[str, Any]
    measured: Mapping[str, Any]

    def refer(self, artifact: str, name: str = "") -> None:
        """Writes a reference.

        Args:
            artifact: The path of a Kubeflow artifact.
            name: A file in the stage's folder; empty refers to the folder.
        """
        uri = storage.join(self.uri, name) if name else self.uri
        _write(Path(artifact), Reference(uri=uri, figures=self.figures).model_dump(mode="json"))

    def write_policy(self, artifact: str) -> None:
        """Writes the policy that the stage produced, its adapters as URIs.

        Args:
            artifact: The path of a Kubeflow artifact.
        """
        policy = _policy_at(self.uri)
        _write(Path(artifact), policy_document(policy))

    def log(self, metrics: Metrics) -> None:
        """Logs all figures that are numbers, and what the stage took.

        Args:
            metrics: Kubeflow's artifact; the numbers also go into its file, because Kubeflow's
                cache looks for that file.
        """
        numbers = dict(_numbers({**self.figures, **self.measured}))
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
    """Runs a stage, unless it is finished already.

    Args:
        stage: Its name, ``search-candidates``.
        artifact_root: The folder or ``s3://...`` below which it writes.
        inputs: Paths of Kubeflow's artifacts, by argument of the stage function: a reference, a
            policy file, or the thing itself. None is an input that was not given.
        settings: The stage function's other arguments, as JSON has them.
        device: ``cpu``, ``cuda`` or ``auto``; a stage that runs a model says on stderr which
            device it found.
        threads: CPU threads of torch; 0 leaves it alone.

    Returns:
        Its folder and its figures.

    Raises:
        SystemExit: With 2, after one paragraph on stderr, for an error that the user can fix.
            Its cause is the `UserError`. With 143, if the process received SIGTERM.
    """
    from srccore.models.device import open_device
    from srccore.run.console import quiet_libraries
    from srccore.run.loop import set_threads

    with explained():
        quiet_libraries()
        set_threads(threads or None)
        work = _work(stage, artifact_root, inputs, settings, device)
        if not is_launched():
            return _finished_before(work) or _lead(work, Processes())
        if not work.stage.trains:
            raise UserError(
                f"{stage} runs in a single process.", "Use torchrun for training stages only."
            )
        with joined(open_device(device)) as processes:
            return _run_together(work, processes)


def locate_stage(
    stage: str,
    artifact_root: str,
    *,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
) -> str:
    """Returns the folder that `run_stage` with the same arguments writes.

    Args:
        stage: Its name.
        artifact_root: The folder or ``s3://...`` below which it writes.
        inputs: By the stage function's arguments, the paths of Kubeflow's artifacts.
        settings: The stage function's other arguments, as JSON has them.

    Returns:
        The folder's path or URI.

    Raises:
        UserError: An input is missing, or a setting is invalid.
    """
    return _work(stage, artifact_root, inputs, settings, "auto").uri


def finished_stage(stage: str, uri: str) -> Finished | None:
    """Checks whether a stage is finished.

    Args:
        stage: Its name.
        uri: Its address, by `locate_stage`.

    Returns:
        Its folder and figures; None if there is work to do.

    Raises:
        UserError: The manifest there is not whole or belongs elsewhere, or a file that it lists is
            missing.
    """
    path = storage.join(uri, FINISHED if storage.is_remote(uri) else MANIFEST)
    if not storage.exists(path):
        return None
    again = f"Delete {uri}, so that the stage is done again, and check who else can write there."
    try:
        manifest = parse_manifest(storage.read_text(path), uri)
    except UserError:
        raise UserError(f"{path} is not a whole manifest.", again) from None
    if manifest.stage != stage:
        raise UserError(
            f"{uri} is the output of {manifest.stage}, not {stage}.", "Check the address."
        )
    folder = _folder_of(manifest, uri)
    if manifest.address != _address(folder, uri):
        raise UserError(f"{path} was not written for this address.", again)
    found = {file.path for file in storage.listing(folder)} if storage.exists(folder) else set()
    if missing := manifest.outputs.keys() - found:
        raise UserError(f"{storage.join(folder, min(missing))} is missing.", again)
    return Finished(folder, manifest.figures, manifest.measured)


def publish_stage(folder: Path, uri: str) -> Finished:
    """Publishes a finished stage, unless another pod has finished the same work meanwhile.

    Two pods rarely compute the same bytes. In a bucket, each has a folder of its own, so that no
    manifest is ever beside the data of the other.

    Args:
        folder: The finished stage.
        uri: Its address, by `locate_stage`.

    Returns:
        What counts.

    Raises:
        UserError: The address cannot be written, or what is there is not whole.
    """
    manifest = read_manifest(folder)
    target = _folder_of(manifest, uri)
    sealed = manifest.model_copy(update={"address": _address(target, uri)})
    write_json(folder / MANIFEST, sealed.model_dump(mode="json"))
    storage.publish(folder, target)
    if storage.is_remote(uri):
        text = (folder / MANIFEST).read_bytes()
        counts = storage.create(storage.join(uri, FINISHED), text)
        done = finished_stage(manifest.stage, uri)
        if done and (counts or done.uri == target):
            storage.adopt(folder, target)
        elif done:
            discard(target)
            return done
    return Finished(target, manifest.figures, manifest.measured)


def _address(folder: str, uri: str) -> str:
    return below(storage.join(uri, "../.."), folder)


def _folder_of(manifest: Manifest, uri: str) -> str:
    """Returns where the outputs of a stage are: in a bucket, their hash is in the address."""
    if not storage.is_remote(uri):
        return uri
    outputs = json.dumps(manifest.outputs, sort_keys=True)
    return storage.join(uri, hash_text(outputs)[:16])


def import_output(uri: str, artifact: str) -> None:
    """Refers to a file or folder that exists already.

    Args:
        uri: Its address.
        artifact: The path of a Kubeflow artifact.

    Raises:
        SystemExit: With 2, if there is nothing at that address.
    """
    with explained():
        if not uri or not storage.exists(uri):
            raise UserError(f"There is nothing at {uri!r}.", "Check the path or URI.")
        reference = Reference(uri=uri, fingerprint=identify.content("uri", uri))
        _write(Path(artifact), reference.model_dump(mode="json"))


def fetch_output(artifact: str) -> Path:
    """Fetches what an output refers to, for a component of your own.

    Args:
        artifact: The path of a Kubeflow artifact that a component of the suite wrote.

    Returns:
        The file or folder on this machine: of search-candidates, one with ``candidates.jsonl``.

    Raises:
        SystemExit: With 2, if it is not a reference or there is nothing at its address.
    """
    with explained():
        reference = read_reference(Path(artifact))
        if reference is None:
            raise UserError(
                f"{artifact} is not a reference.", "Pass an output of a component of the suite."
            )
        return storage.fetch(reference.uri)


@dataclass(frozen=True)
class _Work:
    """A stage with everything that goes into it.

    Attributes:
        stage: Its entry in the table.
        arguments: Its checked settings.
        given: Its inputs, read.
        device: ``cpu``, ``cuda`` or ``auto``.
        root: The artifact root.
        uri: The address of its folder.
    """

    stage: Stage
    arguments: Mapping[str, Any]
    given: Mapping[str, Sequence[StepInput]]
    device: str
    root: str
    uri: str

    @property
    def folder(self) -> Path:
        """Where it is made: outside the folder that a fetch of what is published makes."""
        is_remote = storage.is_remote(self.uri)
        return storage.local_path(storage.join(self.uri, "work") if is_remote else self.uri)

    def run(self, out: Path, progress: Progress | None = None) -> None:
        """Fetches what goes in and runs the stage function.

        Args:
            out: The output folder.
            progress: Receives its progress.

        Raises:
            UserError: A GPU is missing, or something else that the stage function needs.
        """
        check_device(self.stage.name, out, self.device)
        machine = Machine(self.device, checkpoints=self._checkpoints(), parts=self._parts())
        if progress is not None:
            machine = dataclasses.replace(machine, progress=progress)
        many = {each.name for each in self.stage.inputs if each.many}
        with tempfile.TemporaryDirectory() as scratch:
            paths = {
                name: [each.fetch(Path(scratch)) for each in found]
                for name, found in self.given.items()
            }
            inputs = {name: found if name in many else found[0] for name, found in paths.items()}
            self.stage.function()(**self.arguments, **inputs, out=out, machine=machine)

    def _checkpoints(self) -> Checkpoints | None:
        """The same ones for all processes, whatever their output folder."""
        if not self.stage.trains:
            return None
        uri = storage.join(self.uri, CHECKPOINTS)
        folder = storage.local_path(uri)
        remote = storage.is_remote(uri)
        return PublishedCheckpoints(folder, uri) if remote else Checkpoints(folder)

    def _parts(self) -> str | None:
        is_wanted = self.stage.has_journal and storage.is_remote(self.uri)
        return storage.join(self.uri, PARTS) if is_wanted else None

    def discard_unfinished(self) -> None:
        """Removes what a published stage no longer needs."""
        if self.stage.trains:
            uri = storage.join(self.uri, CHECKPOINTS)
            discard(uri)
            discard(str(storage.local_path(uri)))
        if parts := self._parts():
            discard(parts)


def _work(
    stage: str,
    artifact_root: str,
    inputs: Mapping[str, str | Sequence[str] | None],
    settings: Mapping[str, Any],
    device: str,
) -> _Work:
    root = normalise_root(artifact_root)
    entry = STAGES[stage]
    hints = get_type_hints(entry.function())
    arguments = {name: _typed(stage, name, settings[name], hints[name]) for name in settings}
    sections = {section: arguments[name] for name, section in entry.sections.items()}
    check_settings([stage], sections)
    kinds = {each.name: each.kind for each in entry.inputs}
    given = {
        name: [_read_input(name, kinds[name], Path(path), root) for path in _as_list(value)]
        for name, value in inputs.items()
        if value is not None
    }
    uri = storage.join(root, f"{stage}/{work_key(stage, arguments, given)}")
    return _Work(entry, arguments, given, device, root, uri)


def _run_together(work: _Work, processes: Processes) -> Finished:
    """Runs a stage as one of several processes, which all make the same collective calls."""
    done = None
    if processes.is_first:
        done = _finished_before(work)
        if not processes.from_first(done is not None):
            done = _lead(work, processes)
    elif not processes.from_first(False):
        _follow(work, processes)
    # The operator ends the other pods as soon as one has completed.
    processes.wait()
    done = done or finished_stage(work.stage.name, work.uri)
    if done is None:
        raise UserError(
            f"This process cannot see {work.uri}, which the first process wrote.",
            "Use an artifact root that all pods can reach: s3://BUCKET/PATH.",
        )
    return done


def _lead(work: _Work, processes: Processes) -> Finished:
    """Works on the stage's folder, and publishes it."""
    from srccore.run.console import ConsoleObserver

    folder = work.folder
    round_number = work.arguments.get("round_number")
    folder.mkdir(parents=True, exist_ok=True)
    held = hold(folder)
    # Another process may have finished it while this one waited.
    done = _finished_before(work)
    # An attempt that was interrupted after training only has to be published.
    processes.from_first(done is not None or (folder / MANIFEST).exists())
    if done:
        return done
    with ConsoleObserver().stage(work.stage.name, round_number) as progress:
        work.run(folder, progress=progress)
    write_lineage(folder, work.stage.name, round_number, work.given, work.root)
    # A pod of another run may have finished the same work meanwhile.
    if done := _finished_before(work):
        return done
    done = publish_stage(folder, work.uri)
    del held
    work.discard_unfinished()
    print(f"Finished {work.stage.name}: {done.uri}", file=sys.stderr)
    return done


def _follow(work: _Work, processes: Processes) -> None:
    """Trains together with the first process."""
    if not processes.from_first(False):
        with tempfile.TemporaryDirectory() as scratch:
            work.run(Path(scratch) / "out")


def _finished_before(work: _Work) -> Finished | None:
    """Finds a finished stage in a bucket; in a local folder the stage itself does."""
    done = finished_stage(work.stage.name, work.uri) if storage.is_remote(work.uri) else None
    if done:
        print(f"{work.stage.name} is finished already: {done.uri}", file=sys.stderr)
        work.discard_unfinished()
    return done


def write_lineage(
    folder: Path,
    stage: str,
    round_number: int | None,
    given: Mapping[str, Sequence[StepInput]],
    root: str,
) -> None:
    """Writes ``step.json`` into a stage's folder."""
    inputs = {name: [below(root, each.uri) for each in found] for name, found in given.items()}
    lineage = Lineage(stage=stage, round=round_number, inputs=inputs)
    write_json(folder / STEP, lineage.model_dump(mode="json"))


@dataclass(frozen=True)
class StepInput:
    """One input of a stage.

    Attributes:
        uri: Its address; for a policy, the folder of the stage of its last adapter.
        mark: What identifies it in the key.
        policy: The policy, with URIs as adapters, if it is one.
    """

    uri: str
    mark: str
    policy: Policy | None = None

    def fetch(self, scratch: Path) -> Path:
        """Fetches it to this machine; adapters and images follow when they are used.

        Raises:
            UserError: It is gone, or is not what its stage wrote.
        """
        if self.policy is None:
            if not storage.exists(self.uri):
                raise UserError(
                    f"{self.uri} was removed, but a reference to it is left.",
                    "Submit the run with --no-cache, so that Kubeflow does not reuse the reference "
                    "and the stage is done again.",
                )
            return splits.fetch(self.uri)
        file = scratch / POLICY_FILE
        write_policy(file, self.policy)
        return file


def _read_input(name: str, kind: str, path: Path, root: str) -> StepInput:
    """Reads an artifact: a reference, a policy, or the thing itself."""
    reference = read_reference(path)
    if kind == "policy":
        return _policy_input(reference.uri if reference else str(path), root)
    if reference:
        mark = f"{below(root, reference.uri)} {reference.fingerprint or ''}"
        return StepInput(uri=reference.uri, mark=mark)
    return StepInput(uri=str(path), mark=identify.content(name, path))


def _policy_input(uri: str, root: str) -> StepInput:
    policy = _policy_at(uri)

    def adapter(each: str) -> str:
        # Below the root its address has a key, which says what went into it.
        is_ours = each.startswith(f"{root}/")
        return below(root, each) if is_ours else identify.content("adapter", each)

    return StepInput(
        uri=storage.join(policy.adapters[-1], "..") if policy.adapters else policy.base.path,
        mark=identify.policy(policy, adapter),
        policy=policy,
    )


def read_reference(path: Path) -> Reference | None:
    """Reads a reference; None if the file is something else."""
    try:
        with path.open("rb") as file:
            return Reference.model_validate_json(file.read(2**20))
    except (OSError, ValidationError):
        return None


def _policy_at(uri: str) -> Policy:
    """Reads a policy file, or the one in a folder; its adapters become URIs."""
    is_folder = not uri.endswith(".json") and storage.exists(storage.join(uri, POLICY_FILE))
    folder = uri if is_folder else storage.join(uri, "..")
    text = storage.read_text(storage.join(uri, POLICY_FILE) if is_folder else uri)
    policy = parse_policy(text, uri)
    adapters = tuple(storage.resolve(folder, name) for name in policy.adapters)
    return policy.model_copy(update={"adapters": adapters})


def work_key(
    stage: str, arguments: Mapping[str, Any], given: Mapping[str, Sequence[StepInput]]
) -> str:
    """Returns the name of a stage's folder: a hash of all that decides what it will contain."""
    values = {
        name: identity(value) if isinstance(value, Section) else value
        for name, value in arguments.items()
    }
    inputs = {name: [each.mark for each in found] for name, found in given.items()}
    sources = [identify.setting(value) for value in arguments.values()]
    version = STAGES[stage].version
    text = json.dumps([stage, version, values, sources, inputs], sort_keys=True)
    return hash_text(text)[:20]


def _typed(stage: str, name: str, value: object, hint: Any) -> Any:
    """Checks a setting against the stage function's annotation: numbers arrive as floats."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        source, advice = f"setting {name} of {stage}", "Fix the argument of the component."
        raise explain(source, error, advice) from None


def normalise_root(artifact_root: str) -> str:
    """Returns the one spelling of a root that keys and lineage are relative to."""
    if storage.is_remote(artifact_root):
        return artifact_root.rstrip("/")
    return str(storage.local_path(artifact_root).resolve())


def below(root: str, uri: str) -> str:
    """Returns a URI relative to the artifact root, or as it is if it is elsewhere."""
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
def explained() -> Iterator[None]:
    """Ends the process as a step should: after an error, and when Kubernetes asks for it.

    An error that the user can fix becomes a paragraph without a traceback, since Kubeflow shows the
    end of a log.
    """
    # torchrun's processes are ended by what started them, and say themselves how they ended.
    stopping = contextlib.nullcontext() if is_launched() else stoppable()
    try:
        with stopping, full_disk_explained():
            yield
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
