"""A stage's folder: started, finished, skipped, refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from srccore.errors import UserError
from srccore.files import MANIFEST, STARTED
from srccore.method.engine import Work
from srccore.stages.folder import StageFolder
from srccore.stages.manifest import read_manifest
from srccore.stages.table import Input, Stage

STAGE = Stage(
    "stage",
    "A stage.",
    "light",
    inputs=(Input("source", "stage"), Input("shards", "stage", many=True)),
    sources=("model",),
)


def _folder(out: Path, **settings: object) -> StageFolder:
    return StageFolder(STAGE, out, settings=settings)


def test_a_finished_stage_tells_its_figures_and_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _folder(out, seed=1)
    assert first.figures is None
    (out / "result.txt").write_text("42")
    first.finish({"answer": 42})
    assert _folder(out, seed=1).figures == {"answer": 42}
    assert list(read_manifest(out).outputs) == ["result.txt"]


def test_an_unfinished_stage_goes_on_in_its_folder(tmp_path: Path) -> None:
    _folder(tmp_path / "out", seed=1)
    (tmp_path / "out" / "part.jsonl").write_text("{}\n")
    assert _folder(tmp_path / "out", seed=1).figures is None
    assert (tmp_path / "out" / "part.jsonl").exists()


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_folder_of_other_settings_is_refused_untouched(tmp_path: Path, is_finished: bool) -> None:
    folder = _folder(tmp_path / "out", seed=1)
    if is_finished:
        folder.finish({})
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="already holds the output of a different stage"):
        _folder(tmp_path / "out", seed=2)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_manifest_of_other_work_is_refused_untouched(tmp_path: Path) -> None:
    for seed in (1, 2):
        _folder(tmp_path / str(seed), seed=seed).finish({})
    shutil.copy(tmp_path / "2" / MANIFEST, tmp_path / "1" / MANIFEST)
    with pytest.raises(UserError, match=r"manifest.json belongs to a different stage, input or"):
        _folder(tmp_path / "1", seed=1)
    assert (tmp_path / "1" / MANIFEST).exists()


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="already holds the output of a different stage"):
        _folder(tmp_path)


def test_a_changed_input_is_another_stage(tmp_path: Path) -> None:
    source = tmp_path / "input.txt"
    source.write_text("a")
    StageFolder(STAGE, tmp_path / "out", inputs={"source": source}).finish({})
    source.write_text("b")
    with pytest.raises(UserError, match="already holds the output of a different stage"):
        StageFolder(STAGE, tmp_path / "out", inputs={"source": source})


def test_a_folder_counts_by_its_files_and_not_by_its_card(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    # Someone else's manifest is a file like any other.
    for name in ("model.safetensors", "manifest.json"):
        (model / name).write_text("a")
    StageFolder(STAGE, tmp_path / "out", inputs={"source": model}).finish({})
    (model / "README.md").write_text("A card.")
    assert StageFolder(STAGE, tmp_path / "out", inputs={"source": model}).figures == {}
    (model / "manifest.json").write_text("b")
    with pytest.raises(UserError, match="already holds the output of a different stage"):
        StageFolder(STAGE, tmp_path / "out", inputs={"source": model})


def test_an_input_that_the_stage_does_not_declare_is_a_mistake_of_the_code(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="declares no inputs"):
        StageFolder(STAGE, tmp_path / "out", inputs={"other": tmp_path})
    with pytest.raises(ValueError, match="declares no sources"):
        StageFolder(STAGE, tmp_path / "out", sources={"other": "x"})
    assert not (tmp_path / "out").exists()


def test_several_inputs_of_one_name_are_numbered(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    folder = StageFolder(STAGE, tmp_path / "out", inputs={"shards": [tmp_path / n for n in "ab"]})
    folder.finish({})
    assert sorted(read_manifest(tmp_path / "out").inputs) == ["shards_0", "shards_1"]


def test_the_peak_of_a_gpu_is_not_recorded_where_workers_used_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a training before has left in this process.
    monkeypatch.setattr("srccore.stages.folder._peak_gpu_memory_mb", lambda: 5.0)
    for elsewhere, peak in ((False, 5.0), (True, None)):
        out = tmp_path / str(elsewhere)
        _folder(out).finish({}, gpus=2, elsewhere=elsewhere)
        assert read_manifest(out).gpu_seconds == pytest.approx(2 * read_manifest(out).seconds)
        assert read_manifest(out).peak_gpu_memory_mb == peak


def test_a_temporary_file_that_a_killed_process_left_goes_with_the_next_attempt(
    tmp_path: Path,
) -> None:
    _folder(tmp_path / "out")
    (tmp_path / "out" / "result.jsonl.17.tmp").write_text("half")
    # As a training works in, and as a library left a file in it.
    (tmp_path / "out" / ".trainer-17.tmp").mkdir()
    (tmp_path / "out" / ".trainer-17.tmp" / "18.tmp").write_text("half")
    folder = _folder(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
    (tmp_path / "out" / "result.jsonl.18.tmp").write_text("half")
    folder.finish({})
    assert read_manifest(tmp_path / "out").outputs == {}


WORK = """
import sys
from pathlib import Path
from srccore.stages.folder import StageFolder
from srccore.stages.table import Stage
folder = StageFolder(Stage("stage", "A stage.", "light"), Path(sys.argv[1]))
if folder.figures is None:
    print("working", flush=True)
    input()
    folder.finish({"made by": sys.argv[2]})
print(folder.figures["made by"], flush=True)
"""


def test_of_two_processes_one_works_and_the_other_waits_for_it(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORK, str(tmp_path / "out"), name]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    with start("first") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "working\n"
        with start("second") as second:
            assert second.stderr is not None
            assert "Another process is working on" in second.stderr.readline()
            assert first.communicate("\n", timeout=60)[0] == "first\n"
            assert second.communicate(timeout=60)[0] == "first\n"


@pytest.mark.parametrize("text", ["", '{"stage": "sta', "\0\0\0\0"])
def test_a_manifest_that_a_power_cut_left_incomplete_does_not_count(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _folder(tmp_path).finish({})
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    folder = _folder(tmp_path)
    assert folder.figures is None
    assert "was not written completely: finishing stage again" in capsys.readouterr().err
    folder.finish({"answer": 42})
    assert _folder(tmp_path).figures == {"answer": 42}


def test_a_manifest_of_another_release_is_explained_and_kept(tmp_path: Path) -> None:
    _folder(tmp_path).finish({})
    text = (tmp_path / MANIFEST).read_text(encoding="utf-8").replace('"stage"', '"step"')
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is not the folder of a finished stage"):
        _folder(tmp_path)
    assert (tmp_path / MANIFEST).read_text(encoding="utf-8") == text


def test_a_folder_that_was_left_at_its_first_file_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "stage.json.0123abcd.tmp").write_text("", encoding="utf-8")
    _folder(tmp_path, seed=1)
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / STARTED).write_text("", encoding="utf-8")
    _folder(tmp_path, seed=2)
    assert json.loads((tmp_path / STARTED).read_text(encoding="utf-8"))["stage"] == "stage"
    (tmp_path / STARTED).write_text("", encoding="utf-8")
    (tmp_path / "part.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"stage\.json was not written completely"):
        _folder(tmp_path, seed=2)
    assert (tmp_path / "part.jsonl").exists()


def test_a_missing_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Input source does not exist"):
        StageFolder(STAGE, tmp_path / "out", inputs={"source": tmp_path / "none"})


def test_a_path_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        _folder(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Cannot write"):
        _folder(tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part is Linux's to tell")
def test_memory_is_what_the_stage_took_not_what_was_taken_before(tmp_path: Path) -> None:
    block = bytearray(os.urandom(2**20) * 200)
    del block
    stage = StageFolder(STAGE, tmp_path / "small")
    stage.finish({})
    assert stage.manifest is not None
    with open("/proc/self/status", encoding="ascii") as status:
        (now,) = (int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS:"))
    assert stage.manifest.peak_memory_mb < now + 100


def test_the_manifest_has_what_an_engine_computed_and_none_without_one(tmp_path: Path) -> None:
    for name, work in (("with", Work(prompts=2, decoded_tokens=5)), ("without", None)):
        StageFolder(STAGE, tmp_path / name).finish({}, work)
    counted = read_manifest(tmp_path / "with").work
    assert counted is not None
    assert (counted["prompts"], counted["decoded_tokens"], counted["forward_passes"]) == (2, 5, 0)
    assert read_manifest(tmp_path / "without").work is None
