"""Steps of a pipeline, on a local artifact root and on one in a bucket."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3_server
from s3_server import S3Server

from srccore import storage
from srccore.config import ModelConfig
from srccore.data.records import Rationale, read_records
from srccore.errors import UserError
from srccore.files import LOCK, Hold
from srccore.models.policy import Policy, write_policy
from srccore.stages import data as data_stages
from srccore.stages.folder import StageFolder
from srccore.stages.table import Stage
from srccore.steps import step
from srccore.steps.step import (
    FINISHED,
    Finished,
    Reference,
    _policy_input,
    fetch_output,
    finished_stage,
    import_output,
    locate_stage,
    publish_stage,
    run_stage,
)

moto, no_aws = s3_server.moto, s3_server.no_aws

DATA = {"train": 8.0, "calibration": 8.0, "heldout": 8.0, "seed": 0.0}


def prepare(root: str, **changes: Any) -> Finished:
    return run_stage("prepare-data", root, inputs={}, settings={"config": {**DATA, **changes}})


def augment(root: str, data: Path, **changes: Any) -> Finished:
    return run_stage(
        "augment-rationales",
        root,
        inputs={"data": str(data)},
        settings={"config": {"teacher": "facts", **changes}},
    )


def refer(done: Finished, name: str, path: Path) -> Path:
    done.refer(str(path), name)
    return path


@pytest.fixture
def s3(no_aws: None, moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An empty bucket that the environment points to. Storage itself is tested on more servers."""
    it = moto.with_new_bucket()
    for name, value in it.environment.items():
        monkeypatch.setenv(name, value)
    return it


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "artifacts")
    server: S3Server = request.getfixturevalue("s3")
    return f"{server.uri}/artifacts"


def test_a_step_reads_what_another_wrote(root: str, tmp_path: Path) -> None:
    train_split = refer(prepare(root), "train.parquet", tmp_path / "train")
    rationales = refer(augment(root, train_split), "", tmp_path / "rationales")
    folder = fetch_output(str(rationales))
    assert len(list(read_records(folder / "rationales.jsonl", Rationale))) == 8


def test_a_step_that_reads_texts_does_not_fetch_the_split(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = refer(prepare(s3.uri), "train.parquet", tmp_path / "train")
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "another pod"))
    figures = augment(s3.uri, split).figures
    assert figures["given"] + figures["made"] == 8
    fetched = {path.name for path in (tmp_path / "another pod").rglob("*.*") if path.is_file()}
    assert "train.index.jsonl" in fetched
    assert "train.parquet" not in fetched


def test_work_that_was_done_is_not_done_again(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(root)
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "another cache"))

    def fail(*_: object) -> None:
        raise AssertionError("it was done again")

    monkeypatch.setattr("srccore.data.parquet.parquet_writer", fail)
    assert prepare(root) == first


def test_another_setting_makes_another_folder_and_an_operational_one_does_not(
    root: str, tmp_path: Path
) -> None:
    split = refer(prepare(root), "train.parquet", tmp_path / "train")
    assert prepare(root, seed=1).uri != prepare(root).uri
    assert augment(root, split, endpoint={"retries": 1}).uri == augment(root, split).uri


def test_a_step_without_the_gpu_that_it_was_promised_fetches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    policy = tmp_path / "policy.json"
    write_policy(policy, Policy(base=ModelConfig(path="embedded:lvlm")))
    data = tmp_path / "data"
    data.write_text(Reference(uri=str(tmp_path / "nothing"), fingerprint="x").model_dump_json())
    with pytest.raises(SystemExit) as raised:
        run_stage(
            "evaluate",
            str(tmp_path / "artifacts"),
            inputs={"data": str(data), "policy": str(policy)},
            settings={"config": {}, "seed": 0, "round_number": 0},
            device="cuda",
        )
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("Error: No GPU for device: cuda: ")


def test_an_endpoint_is_identified_by_its_model_and_not_by_its_address(tmp_path: Path) -> None:
    root = str(tmp_path / "artifacts")
    split = refer(prepare(root), "train.parquet", tmp_path / "train")

    def uri(url: str, model: str) -> str:
        return augment(root, split, endpoint={"url": url, "model": model}).uri

    assert uri("http://a.example.com", "m") == uri("http://b.example.com", "m")
    assert uri("http://a.example.com", "m") != uri("http://a.example.com", "n")


def test_a_root_can_be_moved(tmp_path: Path) -> None:
    def both(root: Path) -> tuple[Finished, Finished]:
        done = prepare(str(root))
        split = refer(done, "train.parquet", tmp_path / root.name / "reference")
        return done, augment(str(root), split)

    before = both(tmp_path / "one" / "artifacts")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    after = both(tmp_path / "two" / "artifacts")
    assert [Path(each.uri).name for each in before] == [Path(each.uri).name for each in after]
    assert sorted(p.name for p in (tmp_path / "two" / "artifacts").iterdir()) == [
        "augment-rationales",
        "prepare-data",
    ]


def test_a_folder_in_a_bucket_ends_with_its_manifest_and_tells_its_inputs(
    s3: S3Server, tmp_path: Path
) -> None:
    root = f"{s3.uri}/artifacts"
    done = prepare(root)
    made = augment(root, refer(done, "train.parquet", tmp_path / "train"))
    names = {file.path for file in storage.listing(made.uri)}
    assert names == {"manifest.json", "rationales.jsonl", "stage.json", "step.json"}
    step = json.loads(storage.read_text(storage.join(made.uri, "step.json")))
    assert step["inputs"] == {"data": [f"{done.uri.removeprefix(root)[1:]}/train.parquet"]}


def test_an_input_may_be_the_thing_itself_and_counts_by_its_content(
    root: str, tmp_path: Path
) -> None:
    split = refer(prepare(root), "train.parquet", tmp_path / "train")
    first = shutil.copyfile(fetch_output(str(split)), tmp_path / "mine.parquet")
    second = shutil.copyfile(first, tmp_path / "the same again.parquet")
    assert augment(root, first).uri == augment(root, second).uri


def test_what_is_imported_counts_by_what_lies_there(root: str, tmp_path: Path) -> None:
    split = refer(prepare(root), "train.parquet", tmp_path / "train")
    other = refer(prepare(root, seed=1), "train.parquet", tmp_path / "other")
    mine = tmp_path / "mine.parquet"
    found = []
    for source in (split, other):
        shutil.copyfile(fetch_output(str(source)), mine)
        import_output(str(mine), str(tmp_path / "imported"))
        found.append(augment(root, tmp_path / "imported").uri)
    assert found[0] != found[1]


def test_where_a_stage_will_lie_is_known_before_and_whether_it_is_done(root: str) -> None:
    settings = {"config": DATA}
    uri = locate_stage("prepare-data", root, inputs={}, settings=settings)
    assert finished_stage("prepare-data", uri) is None
    done = prepare(root)
    assert f"{done.uri}/".startswith(f"{uri}/")
    assert finished_stage("prepare-data", uri) == done
    with pytest.raises(UserError, match="is the output of prepare-data, not train-dpo"):
        finished_stage("train-dpo", uri)


@pytest.mark.parametrize("root", ["bucket"], indirect=True)
def test_a_manifest_that_does_not_belong_to_its_address_is_not_believed(root: str) -> None:
    done, other = prepare(root), prepare(root, seed=1)
    address = storage.join(done.uri, "..")
    marker = f"{address}/{FINISHED}"
    right = storage.read_text(marker)
    foreign = storage.read_text(f"{storage.join(other.uri, '..')}/{FINISHED}")
    for text, problem in (
        ('{"stage": "prepare-data", "figures": {}}', "is not a whole manifest"),
        (foreign, "was not written for this address"),
        # Its outputs decide where they are.
        (right.replace("train.parquet", "train.txt"), "was not written for this address"),
    ):
        overwrite(marker, text)
        with pytest.raises(UserError, match=f"{marker} {problem}.*Delete {address}"):
            finished_stage("prepare-data", address)
    overwrite(marker, right)
    assert finished_stage("prepare-data", address) == done
    storage.remove(f"{done.uri}/heldout.parquet")
    with pytest.raises(UserError, match=r"heldout\.parquet is missing.*Delete"):
        finished_stage("prepare-data", address)


def overwrite(uri: str, text: str) -> None:
    storage.remove(uri)
    assert storage.create(uri, text.encode())


def test_an_input_that_was_altered_is_refused(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = prepare(root)
    split = refer(done, "train.parquet", tmp_path / "train")
    index = f"{done.uri}/train.index.jsonl"
    altered = storage.read_text(index).replace("?", "!").encode()
    if storage.is_remote(index):
        storage.remove(index)
        storage.create(index, altered)
    else:
        Path(index).write_bytes(altered)
    with pytest.raises(SystemExit):
        augment(root, split)
    assert f"{index} is missing or" in capsys.readouterr().err


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_pods_that_finish_the_same_work_one_counts_and_is_whole(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: bool
) -> None:
    uri = f"{s3.uri}/artifacts/train-scorer/{'0' * 20}"
    stage = Stage("train-scorer", "A stage.", "models")
    folders = []
    for name in ("first", "second"):
        folder = StageFolder(stage, tmp_path / name)
        # Two GPUs rarely compute the same bytes.
        (tmp_path / name / "weights").write_text(name, encoding="utf-8")
        folder.finish({"pod": name})
        folders.append(tmp_path / name)
    upload = storage.publish

    def upload_second_meanwhile(folder: Path, to: str) -> None:
        upload(folder, to)
        monkeypatch.setattr(storage, "publish", upload)
        found.append(publish_stage(folders[1], uri))

    found: list[Finished] = []
    if swapped:
        monkeypatch.setattr(storage, "publish", upload_second_meanwhile)
    found.append(publish_stage(folders[0], uri))
    if not swapped:
        found.append(publish_stage(folders[1], uri))
    winner = "second" if swapped else "first"
    assert found[0] == found[1] == finished_stage("train-scorer", uri)
    assert found[0].figures == {"pod": winner}
    monkeypatch.setenv("SRCCORE_CACHE", str(tmp_path / "another pod"))
    assert (storage.fetch(found[0].uri) / "weights").read_text() == winner
    # What does not count is removed.
    stored = s3.keys()
    assert sum(key.endswith("/weights") for key in stored) == 1


def test_work_that_another_process_finished_in_the_meantime_is_not_done_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, run = step.hold, step._Work.run
    runs: list[Path] = []

    def waiting(folder: Path) -> Hold:
        monkeypatch.setattr(step, "hold", hold)
        # As a process that shares this cache does while this one waits.
        prepare(s3.uri)
        return hold(folder)

    def counted(work: Any, out: Path, **given: Any) -> None:
        runs.append(out)
        run(work, out, **given)

    monkeypatch.setattr(step, "hold", waiting)
    monkeypatch.setattr(step._Work, "run", counted)
    prepare(s3.uri)
    assert len(runs) == 1


def test_what_was_published_is_in_the_cache(s3: S3Server, tmp_path: Path) -> None:
    done = prepare(s3.uri)
    place = storage.local_path(done.uri)
    before = {path: path.stat().st_ino for path in place.iterdir()}
    assert storage.fetch(done.uri) == place
    assert {path: path.stat().st_ino for path in place.iterdir()} == before
    # Nothing is left of where it was made, and it can be made again.
    assert [path.name for path in (place.parent / "work").iterdir()] == [LOCK]
    storage.remove(storage.join(done.uri, ".."))
    assert prepare(s3.uri).uri == done.uri


def test_torchrun_starts_training_stages_only(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        prepare(root)
    # A program that calls it may need the error itself.
    assert isinstance(stopped.value.__cause__, UserError)
    assert "prepare-data runs in a single process" in capsys.readouterr().err


def write_policy_file(path: Path, *adapters: str) -> Path:
    base = {"path": "embedded:lvlm"}
    policy = {"record": "policy", "version": 1, "policy": {"base": base, "adapters": adapters}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(policy))
    return path


def test_a_policy_from_elsewhere_counts_by_what_its_adapters_hold(
    s3: S3Server, tmp_path: Path
) -> None:
    root = f"{s3.uri}/artifacts"
    s3.put("mine/adapter/adapter_model.safetensors", b"one")
    policy = write_policy_file(tmp_path / "policy.json", f"{s3.uri}/mine/adapter")
    first = _policy_input(str(policy), root)
    s3.put("mine/adapter/adapter_model.safetensors", b"two")
    assert _policy_input(str(policy), root).mark != first.mark


def test_adapters_under_the_root_count_by_their_names(s3: S3Server, tmp_path: Path) -> None:
    marks = set()
    for root in (f"{s3.uri}/artifacts", f"{s3.uri}/moved"):
        policy = write_policy_file(tmp_path / "policy.json", f"{root}/train-dpo/k/adapter")
        marks.add(_policy_input(str(policy), root).mark)
    assert len(marks) == 1


HELD = """
import functools
import sys
from srccore.stages import data
from srccore.steps.step import run_stage

real = data.prepare_data

@functools.wraps(real)
def held(*arguments, **keywords):
    print("begun", flush=True)
    sys.stdin.readline()
    return real(*arguments, **keywords)

data.prepare_data = held
config = {"train": 8, "calibration": 8, "heldout": 8}
run_stage("prepare-data", sys.argv[1], inputs={}, settings={"config": config})
"""
"""Prepares data, but not before its standard input has a line or ends."""


def test_two_processes_on_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    start = functools.partial(
        subprocess.Popen,
        [sys.executable, "-c", HELD, str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(start(stdin=subprocess.PIPE))
        stack.callback(first.kill)
        assert first.stdout.readline() == "begun\n", first.stderr.read()
        others = [stack.enter_context(start(stdin=subprocess.DEVNULL)) for _ in range(2)]
        for other in others:
            stack.callback(other.kill)
        for other in others:
            # Reads only up to this line: the first process is released once both wait.
            assert any("Another process is working on" in line for line in other.stderr)
        first.stdin.close()
        for process in (first, *others):
            said = process.stderr.read()
            assert process.wait() == 0, said
    (folder,) = (p for p in (root / "prepare-data").iterdir() if p.is_dir())
    assert (folder / "manifest.json").is_file()


def test_what_another_pod_published_meanwhile_is_kept(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{s3.uri}/artifacts"
    real = data_stages.prepare_data
    stored: list[storage.StoredFile] = []

    @functools.wraps(real)
    def slow(*arguments: Any, **keywords: Any) -> Any:
        """Is still working while another pod, with a separate cache, does the same work."""
        monkeypatch.setattr(data_stages, "prepare_data", real)
        with monkeypatch.context() as other:
            other.setenv("SRCCORE_CACHE", str(tmp_path / "another pod"))
            stored.extend(storage.listing(prepare(root).uri))
        return real(*arguments, **keywords)

    monkeypatch.setattr(data_stages, "prepare_data", slow)
    assert storage.listing(prepare(root).uri) == stored != []


def test_changed_data_at_the_same_path_are_prepared_anew(tmp_path: Path) -> None:
    root = str(tmp_path / "artifacts")
    mine = tmp_path / "mine.parquet"
    uris = set()
    for seed in (0, 1):
        done = prepare(root, seed=seed)
        shutil.copyfile(Path(done.uri) / "train.parquet", mine)
        uris.add(prepare(root, source=str(mine), train=4, calibration=4, heldout=4).uri)
    assert len(uris) == 2


def test_numbers_are_shown_as_metrics_and_written_to_their_file(tmp_path: Path) -> None:
    class Metrics:
        path = str(tmp_path / "metrics")

        def __init__(self) -> None:
            self.logged: dict[str, float] = {}

        def log_metric(self, metric: str, value: float) -> None:
            self.logged[metric] = value

    metrics = Metrics()
    figures = {"n": 3, "ok": True, "mean": None, "by": {"a": 0.5}}
    Finished("uri", figures, {"seconds": 2.0, "work": {"prompts": 7}}).log(metrics)
    assert metrics.logged == {"n": 3.0, "by.a": 0.5, "seconds": 2.0, "work.prompts": 7.0}
    assert json.loads(Path(metrics.path).read_text()) == metrics.logged


WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "an ill-typed setting",
        lambda folder: prepare(str(folder), train="many"),
        "Invalid setting config of prepare-data: train must be an integer",
    ),
    (
        "an unknown setting",
        lambda folder: prepare(str(folder), trian=3),
        "trian does not exist",
    ),
    (
        "a missing input",
        lambda folder: augment(str(folder), folder / "none"),
        "Input data does not exist",
    ),
    (
        "another scheme",
        lambda _: prepare("gs://bucket/root"),
        "is not an address that srccore can read or write",
    ),
    (
        "an import of nothing",
        lambda folder: import_output(str(folder / "none"), str(folder / "out")),
        "There is nothing at",
    ),
    (
        "an artifact that is no reference",
        lambda folder: fetch_output(str(folder / "none")),
        "is not a reference",
    ),
]


@pytest.mark.parametrize(("call", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_the_user_can_mend_ends_with_one_paragraph_and_2(
    call: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(tmp_path)
    assert stopped.value.code == 2
    (paragraph,) = capsys.readouterr().err.strip().splitlines()
    assert paragraph.startswith("Error: ") and message in paragraph


def test_a_reference_whose_folder_is_gone_says_so(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.write_text(Reference(uri=f"{s3.uri}/prepare-data/none/train.parquet").model_dump_json())
    with pytest.raises(SystemExit):
        augment(f"{s3.uri}/artifacts", gone)
    said = capsys.readouterr().err
    assert "train.parquet was removed, but a reference to it is left" in said
    assert "--no-cache" in said
