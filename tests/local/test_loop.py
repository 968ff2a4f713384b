"""The whole loop on a shrunken `tiny`, with the real stages and the real command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from shrunken import SETTINGS, Recorder, shrunken

from srccore.data import dataset
from srccore.data.records import CandidateSet, Preference, read_records
from srccore.method.engine import Prompt
from srccore.models.engines import sampling_engine
from srccore.run.loop import run
from srccore.stages.candidates import search_candidates
from srccore.stages.data import SPLITS
from srccore.training.machine import Machine


def _preferences(out: Path, number: int = 1) -> list[Preference]:
    path = out / f"round-{number}" / "curate-preference" / "preferences.jsonl"
    return list(read_records(path, Preference))


def test_a_run_ends_with_figures_of_every_round_and_preferences(finished: Path) -> None:
    figures = json.loads((finished / "figures.json").read_text())
    assert [row["round"] for row in figures] == [0, 1]
    for row in figures:
        assert row["n"] == 24
        assert set(row["by_category"]) == {"perception", "chart", "math"}
        assert 0 <= row["aligned_accuracy"] <= row["accuracy"] <= 1
    assert _preferences(finished)


def test_a_finished_run_does_nothing_again(finished: Path) -> None:
    observer = Recorder()
    run(shrunken(), finished, observer)
    assert observer.worked == []


def test_more_rounds_do_only_the_new_ones(finished: Path, tmp_path: Path) -> None:
    observer = Recorder()
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, copy], check=True)
    figures = run(shrunken("rounds=2"), copy, observer)
    assert observer.worked == [
        "search-candidates",
        "score-candidates",
        "curate-preference",
        "train-dpo",
        "evaluate",
    ]
    assert [row["round"] for row in figures] == [0, 1, 2]
    first, second = (
        {preference.sample_id for preference in _preferences(copy, number)} for number in (1, 2)
    )
    assert not first & second
    before = (copy / "figures.json").read_bytes()
    assert run(shrunken(), copy, Recorder()) == figures, "fewer rounds lose none"
    assert (copy / "figures.json").read_bytes() == before


def test_an_interrupted_run_goes_on_to_the_same_preferences(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = shrunken()
    for where in ("sample-responses", "score-candidates", "train-dpo"):
        with pytest.raises(KeyboardInterrupt):
            run(config, out, Recorder(interrupt_at=where))
    run(config, out, Recorder())
    assert _preferences(out) == _preferences(finished)
    assert (out / "figures.json").read_text() == (finished / "figures.json").read_text()


def test_no_stage_but_evaluate_reads_the_heldout_split(finished: Path) -> None:
    digest = json.loads((finished / "data" / "manifest.json").read_text())["outputs"]
    heldout = digest["heldout.index.jsonl"]
    readers = {
        json.loads(path.read_text())["stage"]
        for path in finished.rglob("manifest.json")
        if heldout in json.loads(path.read_text())["inputs"].values()
    }
    assert readers == {"evaluate"}


def test_the_data_of_a_run_are_disjoint_by_image(finished: Path) -> None:
    owner: dict[bytes, str] = {}
    for split in SPLITS:
        data = dataset.open_data(finished / "data" / f"{split}.parquet")
        for sample in data:
            assert owner.setdefault(data.encoded(sample.id), split) == split


def test_resharding_gives_the_same_candidates(finished: Path, tmp_path: Path) -> None:
    config = shrunken()
    found: dict[int, dict[str, CandidateSet]] = {}
    for count in (1, 2, 5):
        found[count] = {}
        for index in range(count):
            out = tmp_path / f"{count}-{index}"
            search_candidates(
                config.search,
                data=finished / "data" / "calibration.parquet",
                policy=finished / "tune-rationale" / "policy.json",
                out=out,
                seed=0,
                round_number=1,
                shard=(index, count),
                machine=Machine("cpu"),
            )
            for record in read_records(out / "candidates.jsonl", CandidateSet):
                found[count][record.sample_id] = record
    for count in (2, 5):
        pairs = [
            (candidate.text, {c.text for c in found[1][sample_id].candidates})
            for sample_id, record in found[count].items()
            for candidate in record.candidates
        ]
        assert found[count].keys() == found[1].keys()
        agreement = sum(text in texts for text, texts in pairs) / len(pairs)
        print(f"{count} shards: {agreement:.2%} of {len(pairs)} candidates are the same")
        assert agreement >= 0.99


def test_the_engine_decodes_greedily_as_generate_does(finished: Path) -> None:
    from srccore.method.driver import draw_all
    from srccore.method.engine import Draw
    from srccore.models.policy import load_policy, read_policy
    from srccore.models.transformers import encode_prompts

    loaded = load_policy(read_policy(finished / "tune-rationale"), "cpu")
    data = dataset.open_data(finished / "data" / "calibration.parquet")
    prompts = [
        Prompt(partial(data.image, sample.id), sample.question, sample.id)
        for sample in list(data)[:16]
    ]
    inputs = encode_prompts(loaded.processor, prompts)
    generated = loaded.model.generate(**inputs, max_new_tokens=60, do_sample=False)
    wanted = loaded.processor.tokenizer.batch_decode(
        generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    engine = sampling_engine(finished / "tune-rationale" / "policy.json", "cpu")
    roots = engine.open(engine.prepare(prompts))
    whole = draw_all(engine, [Draw(root, 60, greedy=True, whole=True) for root in roots])
    assert [drawn.text for drawn in whole] == wanted
    # Sentence by sentence, each from the cache of the previous one: the same texts and scores.
    texts, scores = [""] * len(prompts), [0.0] * len(prompts)
    live = dict(enumerate(roots))
    while live:
        rows = list(live)
        drawn_rows = draw_all(engine, [Draw(live[row], 40, greedy=True) for row in rows])
        for row, drawn in zip(rows, drawn_rows, strict=True):
            texts[row] += drawn.text
            scores[row] += drawn.log_probability
            live[row] = drawn.node
            if drawn.stop == "end":
                del live[row]
    assert texts == wanted
    assert scores == pytest.approx([drawn.log_probability for drawn in whole], abs=1e-3)


def _srccore(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "srccore", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _sets() -> list[str]:
    return [part for setting in SETTINGS for part in ("--set", setting)]


def test_the_command_says_that_there_is_nothing_to_do_and_writes_the_report(
    finished: Path,
) -> None:
    result = _srccore("run", "--preset", "tiny", "--out", finished, *_sets())
    assert result.returncode == 0, result.stderr
    page = (finished / "report.html").read_text()
    assert "aligned" in page.casefold()
    result = _srccore("run", "--preset", "tiny", "--out", finished, *_sets())
    assert "Nothing to do" in result.stdout


@pytest.mark.parametrize(
    ("workers", "number", "code"),
    [(1, signal.SIGINT, 130), (2, signal.SIGINT, 130), (2, signal.SIGTERM, 143)],
)
def test_a_stopped_run_goes_on(
    workers: int, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    run_folder = tmp_path / "run"
    small_batches = ["--set", "search.batch_tokens=200"]
    command = [sys.executable, "-m", "srccore", "run", "--out", str(run_folder), *_sets()]
    process = subprocess.Popen(
        [*command, *small_batches, "--workers", str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background processes of a script ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread
    )
    # In the middle of a stage, not during imports, where a library may handle the signal itself.
    journal = run_folder / "sample-responses" / "journal.jsonl"
    deadline = time.monotonic() + 300
    while not journal.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    device, _, note = err.partition("\n")
    assert re.fullmatch(r"Device: CPU, 1 thread, torch \S+ \(.*\)\.", device)
    if number == signal.SIGINT:
        assert "Run the same command to resume" in out
        assert not note
    else:
        assert note.strip().startswith("Stopped by SIGTERM. What is done is kept")
    assert (run_folder / "augment-rationales" / "train" / "manifest.json").exists()
    assert journal.exists()


def test_export_writes_a_checkpoint_that_transformers_loads_by_itself(
    finished: Path, tmp_path: Path
) -> None:
    result = _srccore("export", finished, "--round", 1, "-o", tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "aligned accuracy" in card
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert model.num_parameters() > 1_000_000
    assert "ASSISTANT" in processor.chat_template
    result = _srccore("export", finished, "--round", 1, "--adapter", "-o", tmp_path / "adapter")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "huge", "--out", "{tmp}/x"], "no preset"),
        (["run", "--out", "{tmp}/x", "--set", "search.widht=3"], "search.width"),
        (["run", "--out", "{finished}", "--set", "search.width=3"], "different configuration"),
        (["run", "--out", "/proc/nothing/run"], "Cannot write to /proc/nothing/run"),
        (["run", "--out", "{tmp}/x", "--set", "model.path={tmp}"], "config.json"),
        (["run", "--out", "{tmp}/x", "--set", "data.source={tmp}/none"], "does not exist"),
        (["export", "{finished}", "--round", "7", "-o", "{tmp}/e"], "has not finished round 7"),
        (["export", "{tmp}", "--round", "1", "-o", "{tmp}/e"], "is not a run folder"),
        (["report", "{tmp}"], "is not a run folder"),
        (["data", "validate", "{tmp}/none"], "none"),
    ],
)
def test_wrong_input_is_one_paragraph_and_exit_code_two(
    finished: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()}
    result = _srccore(*(a.format(tmp=tmp_path, finished=finished) for a in arguments))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file()} == before


def test_a_missing_gpu_ends_a_run_and_a_stage_before_they_do_anything(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out"
    for command in (
        ("run", "--out", out),
        ("stage", "evaluate", "--data=none", "--policy=none", "--round=1", "--out", out),
    ):
        result = _srccore(*command, *_sets(), "--set", "device=cuda")
        assert result.returncode == 2, result.stderr
        assert result.stderr.startswith("Error: No GPU for device: cuda: ")
        assert len(result.stderr.strip().splitlines()) == 1
        assert not out.exists()
    # A finished run has no use for one.
    result = _srccore("run", "--out", finished, *_sets(), "--set", "device=cuda")
    assert "Nothing to do" in result.stdout
    assert "Device" not in result.stderr


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys; sys.argv = ['srccore', '--help']\n"
        "from srccore.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


def test_a_stage_alone_does_what_the_run_does(finished: Path, tmp_path: Path) -> None:
    result = _srccore(
        *("stage", "search-candidates", *_sets(), "--round", 1, "--out", tmp_path / "found"),
        *("--data", finished / "data" / "calibration.parquet"),
        *("--policy", finished / "tune-rationale" / "policy.json"),
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["samples"] == 24
    assert result.stderr.startswith("Device: CPU, 1 thread, torch ")
    found = (tmp_path / "found" / "candidates.jsonl").read_text()
    wanted = finished / "round-1" / "search-candidates-0" / "candidates.jsonl"
    assert found == wanted.read_text()


@pytest.mark.parametrize("shard", ["1", "2/2", "0/0", "x/y"])
def test_a_shard_that_does_not_exist_is_told(finished: Path, tmp_path: Path, shard: str) -> None:
    result = _srccore(
        *("stage", "search-candidates", "--round", 1, "--out", tmp_path / "found"),
        *("--data", finished / "data" / "calibration.parquet", "--shard", shard),
        *("--policy", finished / "tune-rationale" / "policy.json"),
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
