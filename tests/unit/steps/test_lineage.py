"""From a pipeline's last evaluation back to a run folder, with handmade outputs."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import s3_server
from PIL import Image
from s3_server import S3Server

from srccore import storage
from srccore.config import load_config
from srccore.data.dataset import write_data
from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.models.policy import read_policy
from srccore.run.loop import load_run
from srccore.stages.manifest import Manifest
from srccore.stages.splits import open_split
from srccore.steps.home import collect_report, collect_run

moto, no_aws = s3_server.moto, s3_server.no_aws

CONFIG = load_config("tiny")


def step(root: Path, stage: str, key: str, number: int | None = None, **inputs: list[str]) -> str:
    """Writes a folder the way a step does; returns its path relative to the root."""
    folder = root / stage / key
    folder.mkdir(parents=True)
    lineage = {"record": "step", "version": 1, "stage": stage, "round": number, "inputs": inputs}
    (folder / "step.json").write_text(json.dumps(lineage))
    manifest = Manifest(
        stage=stage,
        key=key,
        config={},
        inputs={},
        outputs={},
        figures={"round": number},
        versions={},
        seconds=1,
        peak_memory_mb=1,
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    if stage in ("tune-rationale", "train-dpo"):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        earlier = [f"../../{each}/adapter" for each in inputs.get("policy", [])]
        policy = {"base": {"path": "embedded:lvlm"}, "adapters": [*earlier, "adapter"]}
        document = {"record": "policy", "version": 1, "policy": policy}
        (folder / "policy.json").write_text(json.dumps(document))
    return f"{stage}/{key}"


def run_of_one_round(root: Path, *, augment: bool = True, scorer: str | None = None) -> str:
    """Two shards, one round; returns the last evaluation."""
    data = step(root, "prepare-data", "d")
    train, calibration, heldout = (
        [f"{data}/{split}.parquet"] for split in ("train", "calibration", "heldout")
    )
    for split in ("train", "calibration", "heldout"):
        (root / data / f"{split}.parquet").write_bytes(b"samples")
        (root / data / f"{split}.index.jsonl").write_bytes(b"texts")
    made, round_made = train, calibration
    if augment:
        made = [step(root, "augment-rationales", "t", data=train)]
        round_made = [step(root, "augment-rationales", "c", data=calibration)]
    tuned = step(root, "tune-rationale", "p0", data=train, rationales=made)
    before = step(root, "evaluate", "e0", 0, data=heldout, policy=[tuned])
    if scorer is None:
        sampled = step(root, "sample-responses", "s", data=train, policy=[tuned])
        pairs = step(root, "annotate-ratings", "a", data=train, candidates=[sampled])
        scorer = step(root, "train-scorer", "r", data=train, labelled_pairs=[pairs])
    found = [
        step(root, "search-candidates", f"c{n}", 1, data=calibration, policy=[tuned])
        for n in range(2)
    ]
    rated = [
        step(
            root,
            "score-candidates",
            f"s{n}",
            candidates=[found[n]],
            scorer=[scorer],
            rationales=round_made,
        )
        for n in range(2)
    ]
    curated = step(root, "curate-preference", "k", candidates=found, ratings=rated)
    aligned = step(root, "train-dpo", "p1", preferences=[curated], policy=[tuned])
    return step(root, "evaluate", "e1", 1, data=heldout, policy=[aligned], previous=[before])


def folders(run: Path) -> set[str]:
    return {path.parent.relative_to(run).as_posix() for path in run.rglob("manifest.json")}


ROUND = {
    "round-1/search-candidates-0",
    "round-1/search-candidates-1",
    "round-1/score-candidates-0",
    "round-1/score-candidates-1",
    "round-1/curate-preference",
    "round-1/train-dpo",
    "round-1/evaluate",
}
BEFORE = {"data", "tune-rationale", "round-0/evaluate"}
SCORER = {"sample-responses", "annotate-ratings", "train-scorer"}
RATIONALES = {"augment-rationales/train", "augment-rationales/calibration"}


def test_every_step_finds_its_place_in_the_run_folder(tmp_path: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    last = run_of_one_round(root)
    collect_run(str(root), f"{root}/{last}", CONFIG, out, whole=True)
    assert folders(out) == ROUND | BEFORE | SCORER | RATIONALES
    assert json.loads((out / "figures.json").read_text()) == [{"round": 0}, {"round": 1}]
    assert load_run(out).rounds == 1
    adapters = [Path(each) for each in read_policy(out / "round-1" / "train-dpo").adapters]
    assert adapters == [out / "tune-rationale" / "adapter", out / "round-1/train-dpo/adapter"]
    assert all((each / "adapter_model.safetensors").is_file() for each in adapters)


def test_data_that_carry_their_rationales_are_no_step_of_their_own(tmp_path: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    last = run_of_one_round(root, augment=False)
    collect_run(str(root), f"{root}/{last}", CONFIG, out)
    assert folders(out) == ROUND | BEFORE | SCORER


def test_a_given_r_scorer_has_no_steps_before_it(tmp_path: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    given = tmp_path / "given"
    (given / "model").mkdir(parents=True)
    (given / "model" / "config.json").write_text("{}")
    last = run_of_one_round(root, scorer=str(given))
    collect_run(str(root), f"{root}/{last}", CONFIG, out)
    assert folders(out) == ROUND | BEFORE | RATIONALES
    assert not (out / "train-scorer").exists()  # only what is below the root is collected


def test_a_report_needs_neither_weights_nor_the_train_split(tmp_path: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    last = run_of_one_round(root)
    collect_run(str(root), f"{root}/{last}", CONFIG, out)
    assert not list(out.rglob("*.safetensors"))
    kept = {path.name for path in (out / "data").iterdir()} - {"manifest.json", "step.json"}
    assert kept == {
        f"{split}.{ending}"
        for split in ("calibration", "heldout")
        for ending in ("parquet", "index.jsonl")
    }


def test_a_report_of_a_run_in_a_bucket_fetches_the_images_that_it_shows(
    no_aws: None, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = moto.with_new_bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    root, out = tmp_path / "artifacts", tmp_path / "run"
    last = run_of_one_round(root)
    samples = [
        Sample(id=name, category=Category.CHART, question="?", answer="3") for name in ("a", "b")
    ]
    images = [io.BytesIO(), io.BytesIO()]
    for number, image in enumerate(images):
        Image.new("RGB", (number + 1, 1)).save(image, "PNG")
    split = root / "prepare-data" / "d" / "calibration.parquet"
    encoded = [image.getvalue() for image in images]
    write_data(split, zip(samples, encoded, strict=True))
    storage.publish(root, bucket.uri)
    collect_run(bucket.uri, f"{bucket.uri}/{last}", CONFIG, out)
    opened = open_split(out / "data" / "calibration.parquet")
    assert list(opened) == samples
    assert opened.encoded("b") == encoded[1]
    in_cache = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert encoded[1] in in_cache
    assert encoded[0] not in in_cache
    assert split.read_bytes() not in in_cache


def test_a_moved_root_is_collected_from_its_report(tmp_path: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    report = step(root, "report", "x", last_evaluation=[run_of_one_round(root)])
    (root / report / "run.json").write_text(CONFIG.model_dump_json())
    moved = shutil.move(root, tmp_path / "moved")
    collect_report(f"{moved}/{report}/", out)
    assert folders(out) > ROUND
    with pytest.raises(UserError, match="is not empty"):
        collect_report(f"{moved}/{report}", out)


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    last = run_of_one_round(root)
    with pytest.raises(UserError, match="is not the report of a pipeline"):
        collect_report(f"{root}/{last}", tmp_path / "run")


def test_a_run_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    report = step(root, "report", "x", last_evaluation=[run_of_one_round(root)])
    (root / report / "run.json").write_text(CONFIG.model_dump_json())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write to .*file/run: Not a directory"):
        collect_report(f"{root}/{report}", tmp_path / "file" / "run")


def report_of(root: Path, last: str) -> str:
    report = step(root, "report", "x", last_evaluation=[last])
    (root / report / "run.json").write_text(CONFIG.model_dump_json())
    return f"{root}/{report}"


def change(root: Path, folder: str, **inputs: list[str]) -> None:
    """Changes what a step says about its inputs."""
    file = root / folder / "step.json"
    lineage = json.loads(file.read_text())
    lineage["inputs"] |= inputs
    file.write_text(json.dumps(lineage))


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A folder of this machine that has nothing to do with a run."""
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True)
    (folder / "id_ed25519").write_text("PRIVATE KEY")
    return folder


def has_private(out: Path) -> bool:
    return any(b"PRIVATE" in file.read_bytes() for file in out.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["{private}", "file://{private}", "../home/.ssh"])
@pytest.mark.parametrize("stage", ["evaluate/e1", "train-dpo/p1", "curate-preference/k"])
def test_a_lineage_brings_no_folder_from_outside_the_root(
    tmp_path: Path, private: Path, stage: str, name: str
) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    report = report_of(root, run_of_one_round(root))
    inputs = {"evaluate/e1": "policy", "train-dpo/p1": "preferences"}
    change(root, stage, **{inputs.get(stage, "candidates"): [name.format(private=private)]})
    with pytest.raises(UserError, match=r"is outside the artifact root|is not relative to"):
        collect_report(report, out)
    assert not has_private(out)


@pytest.mark.parametrize("name", ["{private}", "s3://another-bucket/evaluate/e1"])
def test_a_lineage_in_a_bucket_brings_no_folder_of_this_machine_or_another_bucket(
    no_aws: None,
    moto: S3Server,
    tmp_path: Path,
    private: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    bucket = moto.with_new_bucket()
    for variable, value in bucket.environment.items():
        monkeypatch.setenv(variable, value)
    root, out = tmp_path / "artifacts", tmp_path / "run"
    report = report_of(root, run_of_one_round(root)).removeprefix(f"{root}/")
    change(root, "evaluate/e1", previous=[name.format(private=private)])
    storage.publish(root, f"{bucket.uri}/src")
    with pytest.raises(UserError, match="is outside the artifact root"):
        collect_report(f"{bucket.uri}/src/{report}", out)
    assert not has_private(out)


@pytest.mark.parametrize(
    "link",
    [
        "evaluate/e1/outcomes.jsonl",
        "evaluate/e0/step.json",
        "report/x/run.json",
        "train-dpo/p1/adapter/adapter_model.safetensors",
    ],
)
def test_a_symbolic_link_out_of_the_root_is_refused(
    tmp_path: Path, private: Path, link: str
) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    report = report_of(root, run_of_one_round(root))
    (root / link).unlink(missing_ok=True)
    (root / link).symlink_to(private / "id_ed25519")
    with pytest.raises(UserError, match="a link that leads out of it") as caught:
        collect_report(report, out)
    assert "PRIVATE" not in str(caught.value)
    assert not has_private(out)


def test_a_linked_folder_out_of_the_root_is_refused(tmp_path: Path, private: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    report = report_of(root, run_of_one_round(root))
    shutil.rmtree(root / "search-candidates" / "c1")
    (root / "search-candidates" / "c1").symlink_to(private)
    with pytest.raises(UserError, match="a link that leads out of it"):
        collect_report(report, out)
    assert not has_private(out)


@pytest.mark.parametrize("previous", ["evaluate/e1", "evaluate/e2", "evaluate/../evaluate/e1"])
def test_a_lineage_that_goes_round_in_circles_ends(tmp_path: Path, previous: str) -> None:
    root = tmp_path / "artifacts"
    report = report_of(root, run_of_one_round(root))
    shutil.copytree(root / "evaluate" / "e1", root / "evaluate" / "e2")
    change(root, "evaluate/e2", previous=["evaluate/e1"])
    change(root, "evaluate/e1", previous=[previous])
    with pytest.raises(UserError, match="of round 1, cannot come before one of round 1"):
        collect_report(report, tmp_path / "run")


def test_what_is_collected_shares_no_file_with_the_root(tmp_path: Path) -> None:
    root, out = tmp_path / "artifacts", tmp_path / "run"
    collect_report(report_of(root, run_of_one_round(root)), out)
    found = [path for path in out.rglob("*") if path.is_file()]
    assert found
    assert not [path for path in found if path.is_symlink() or path.stat().st_nlink > 1]


def test_a_policy_with_an_adapter_from_elsewhere_is_refused(tmp_path: Path, private: Path) -> None:
    root = tmp_path / "artifacts"
    report = report_of(root, run_of_one_round(root))
    document = {"base": {"path": "embedded:lvlm"}, "adapters": [str(private)]}
    text = json.dumps({"record": "policy", "version": 1, "policy": document})
    (root / "train-dpo" / "p1" / "policy.json").write_text(text)
    with pytest.raises(UserError, match="an adapter that no training of the run wrote"):
        collect_report(report, tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("report/x/run.json", "{", "is not JSON"),
        ("report/x/run.json", "[" * 100_000, "is not JSON"),
        ("report/x/step.json", "{}", "does not say which step wrote it"),
        ("report/x/step.json", None, "does not name its one input last_evaluation"),
        ("train-dpo/p1/step.json", None, "does not name its one input preferences"),
        ("evaluate/e0/step.json", None, "is not an evaluation of a pipeline"),
    ],
)
def test_a_damaged_report_is_explained(
    tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    root = tmp_path / "artifacts"
    report = report_of(root, run_of_one_round(root))
    if text is None:
        (root / file).unlink()
    else:
        (root / file).write_text(text)
    with pytest.raises(UserError, match=message):
        collect_report(report, tmp_path / "run")
