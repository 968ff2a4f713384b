"""The compiled pipeline, run task by task under kfp's local runner, against `srccore run`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shrunken import SETTINGS, Recorder, shrunken

from srccore.data import dataset
from srccore.data.records import Preference, Rationale, read_records
from srccore.models.policy import read_policy
from srccore.run.folder import RunFolder
from srccore.run.loop import load_run, run

METHOD = [f"--set={each}" for each in SETTINGS if not each.startswith("rounds=")]


def srccore(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "srccore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`srccore run` over two shards."""
    out = tmp_path_factory.mktemp("looped") / "run"
    run(shrunken("shards=2"), out, Recorder())
    return out


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same through the compiled pipeline, brought back as a run folder."""
    folder = tmp_path_factory.mktemp("piped")
    package = folder / "tiny.yaml"
    made = srccore("compile", "--rounds", "1", "--shards", "2", "-o", package)
    assert made.returncode == 0, made.stderr
    done = srccore("pipeline-local", "--pipeline", package, "--out", folder / "local", *METHOD)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train-dpo +\d+\.\d s$", done.stderr, re.M)
    assert (folder / "local" / "report.html").stat().st_size > 50_000
    (report,) = (folder / "local" / "artifacts" / "report").iterdir()
    brought = srccore("collect", report, "-o", folder / "run")
    assert brought.returncode == 0, brought.stderr
    return folder / "run"


def test_preferences_and_figures_are_those_of_srccore_run(looped: Path, piped: Path) -> None:
    def preferences(folder: Path) -> list[Preference]:
        file = folder / "round-1" / "curate-preference" / "preferences.jsonl"
        return list(read_records(file, Preference))

    assert preferences(piped) == preferences(looped) != []
    figures = [json.loads((folder / "figures.json").read_text()) for folder in (piped, looped)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 2


def test_search_and_scoring_were_done_in_two_shards(piped: Path) -> None:
    for stage in ("search-candidates", "score-candidates"):
        assert len(list(piped.glob(f"round-1/{stage}-*/manifest.json"))) == 2


def test_a_brought_run_has_its_policies_and_is_reported(piped: Path) -> None:
    assert load_run(piped).rounds == 1
    policy = read_policy(RunFolder(piped).policy(1))
    assert [Path(adapter).parent.name for adapter in policy.adapters] == [
        "tune-rationale",
        "train-dpo",
    ]
    for adapter in policy.adapters:
        assert (Path(adapter) / "adapter_model.safetensors").is_file()
    assert srccore("report", piped).returncode == 0


def data_with_rationales(finished: Path, path: Path) -> None:
    """The splits of a run in one data set, with the rationales that its teacher wrote."""
    rows = []
    for split in ("train", "calibration"):
        data = dataset.open_data(finished / "data" / f"{split}.parquet")
        file = finished / "augment-rationales" / split / "rationales.jsonl"
        texts = {each.sample_id: each.rationale for each in read_records(file, Rationale)}
        for sample in data:
            with_rationale = sample.model_copy(update={"rationale": texts[sample.id]})
            rows.append((with_rationale, data.encoded(sample.id)))
    dataset.write_data(path, rows)


@pytest.mark.long
def test_data_with_rationales_and_a_given_r_scorer_come_to_a_report(
    finished: Path, tmp_path: Path
) -> None:
    data, profile, package = (tmp_path / name for name in ("data.parquet", "p.yaml", "src.yaml"))
    data_with_rationales(finished, data)
    profile.write_text("augment: false\nscorer: given")
    settings = [*METHOD, f"--set=data.source={data}", "--set=data.heldout=20"]
    made = srccore("compile", "--profile", profile, "--rounds", "1", "-o", package)
    assert made.returncode == 0, made.stderr
    out = tmp_path / "local"
    given = f"--param=scorer_uri={finished / 'train-scorer'}"
    done = srccore("pipeline-local", "--pipeline", package, "--out", out, given, *settings)
    assert done.returncode == 0, done.stderr
    tasks = {line.split()[0] for line in done.stderr.splitlines()}
    assert {"import-output", "tune-rationale", "train-dpo", "report"} < tasks
    assert not {"augment-rationales", "train-scorer", "annotate-ratings"} & tasks
    assert (out / "report.html").stat().st_size > 30_000


def test_a_failed_task_is_one_paragraph_after_its_own(tmp_path: Path) -> None:
    done = srccore(
        *("pipeline-local", "--out", tmp_path / "out", "--set", f"data.source={tmp_path}/none")
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    own, task, last = done.stderr.strip().splitlines()
    assert own.startswith(f"Error: Input data.source does not exist: {tmp_path}/none.")
    assert re.fullmatch(r"prepare-data +\d+\.\d s  failure", task)
    assert last.startswith("Error: The pipeline failed: ") and "pipeline.log" in last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "none"), "There is no shipped pipeline 'none'"),
        (("--set", "rounds=2"), "rounds is fixed when the pipeline is compiled"),
        (("--set", "search.widht=2"), "Did you mean search.width?"),
        (("--pipeline", "none.yaml"), "none.yaml cannot be read"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_input_is_refused_at_once(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = srccore("pipeline-local", "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
