"""Following, listing and stopping runs."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import kfp_server_api as api
import pytest
import yaml
from backend_commands import NO_BACKEND, ROOT, call
from kfp_server import NEVER, KfpServer, Step, Workflow, clock
from rich.console import Console

from srccore.kubeflow.client import UnavailableError, connect
from srccore.kubeflow.connection import Connection
from srccore.kubeflow.follow import PATIENCE, ending, follow, screen, tree
from srccore.kubeflow.tasks import node_id, task_tree, walk

PREPARED = {"prepare": "SUCCEEDED"}
SEARCHING = PREPARED | {
    "src-round.for-loop-2.0.search": "SUCCEEDED",
    "src-round.for-loop-2.1.search": "RUNNING",
}
SEARCHED = SEARCHING | {"src-round.for-loop-2.1.search": "SUCCEEDED"}
ROUND = SEARCHED | {"src-round.train": "SUCCEEDED"}
SECOND = ROUND | {
    "src-round-2.for-loop-2.0.search": "SUCCEEDED",
    "src-round-2.for-loop-2.1.search": "SUCCEEDED",
}
DONE = SECOND | {"src-round-2.train": "SUCCEEDED"}
FAILED = SECOND | {"src-round-2.train": "FAILED"}
SUCCESS = [
    Step("PENDING"),
    Step("RUNNING", {"prepare": "RUNNING"}),
    Step("RUNNING", SEARCHING),
    Step("RUNNING", ROUND),
    Step("SUCCEEDED", DONE),
]
FAST = "--interval=0.01"


@pytest.fixture
def run_id(server: KfpServer, pipeline: Path) -> str:
    """A submitted run."""
    assert call("submit", pipeline, ROOT, "--host", server.url).code == 0
    [run_id] = server.runs
    return run_id


def at_step(server: KfpServer, run_id: str, step: Step) -> api.V2beta1Run:
    """The run as the client reads it at a step."""
    server.script = [step]
    backend = connect(Connection(host=server.url))
    return backend.call(backend.runs.run_service_get_run, run_id=run_id)


def test_submit_and_wait_says_every_change_and_ends_with_zero(
    server: KfpServer, pipeline: Path
) -> None:
    server.script = SUCCESS
    result = call("submit", pipeline, ROOT, "--host", server.url, "--wait", FAST)
    assert result.code == 0, result.out
    [run_id] = server.runs
    lines = result.out.splitlines()
    assert lines[2:] == [
        "[0/7] prepare: running",
        "[2/7] prepare: succeeded (1 min 15 s)",
        "[2/7] round 1 / for-loop-2 / item 0 / search: succeeded (1 min 15 s)",
        "[2/7] round 1 / for-loop-2 / item 1 / search: running",
        "[4/7] round 1 / for-loop-2 / item 1 / search: succeeded (1 min 15 s)",
        "[4/7] round 1 / train: succeeded (1 min 15 s)",
        "[7/7] round 2 / for-loop-2 / item 0 / search: succeeded (1 min 15 s)",
        "[7/7] round 2 / for-loop-2 / item 1 / search: succeeded (1 min 15 s)",
        "[7/7] round 2 / train: succeeded (1 min 15 s)",
        "The run ended: SUCCEEDED.",
        f"{server.url}/#/runs/details/{run_id}",
    ]


def test_a_run_of_an_uploaded_version_is_followed_like_one_that_brings_its_pipeline(
    server: KfpServer, pipeline: Path
) -> None:
    said = []
    for options in ((), ("--upload",)):
        server.script = SUCCESS
        result = call("submit", pipeline, ROOT, "--host", server.url, "--wait", FAST, *options)
        assert result.code == 0, result.out
        said.append([line for line in result.out.splitlines() if line.startswith("[")])
    assert said[0] == said[1]
    assert len(said[0]) == 9
    [version_id] = server.versions
    assert len(server.sent("GET", f"/versions/{version_id}")) == 1, "a version never changes"


def test_a_run_whose_version_was_deleted_is_shown_and_stopped_all_the_same(
    server: KfpServer, pipeline: Path
) -> None:
    server.script = [Step("RUNNING", SEARCHING)]
    assert call("submit", pipeline, ROOT, "--host", server.url, "--upload").code == 0
    [run_id] = server.runs
    assert "round 1" in call("runs", "status", run_id, "--host", server.url).out
    server.versions.clear()
    result = call("runs", "status", run_id, "--host", server.url)
    assert result.code == 0, result.out
    assert "search" in result.out
    assert "round 1" not in result.out
    assert call("runs", "stop", run_id, "--host", server.url).code == 0


def test_a_failed_run_names_the_task_that_failed_and_its_round(
    server: KfpServer, run_id: str
) -> None:
    server.script = [Step("RUNNING", SECOND), Step("FAILED", FAILED)]
    result = call("runs", "status", run_id, "--wait", FAST, "--host", server.url)
    assert result.code == 1
    assert "The run ended: FAILED." in result.out
    assert "Failed: round 2 / train: Kubeflow gives no reason; see the log in the UI" in result.out
    assert result.out.count("Failed: ") == 1


def test_a_driver_that_fails_is_named_too(server: KfpServer, run_id: str) -> None:
    server.script = [Step("FAILED", SECOND | {"src-round-2.train": "DRIVER FAILED"})]
    result = call("runs", "status", run_id, "--wait", FAST, "--host", server.url)
    assert result.code == 1
    assert "Failed: train-driver" in result.out


def test_what_the_backend_says_of_a_failure_is_shown(server: KfpServer, run_id: str) -> None:
    run = at_step(server, run_id, Step("FAILED", FAILED))
    [failed] = [
        each
        for each in run.run_details.task_details
        if (each.display_name, each.state) == ("train", "FAILED")
    ]
    failed.error = api.GoogleRpcStatus(code=9, message="OOMKilled:\nexit code 137")
    named = dict(walk(task_tree(run)))
    assert named["round 2 / train"].error == "OOMKilled: exit code 137"
    assert named["round 1 / train"].error is None


def test_a_run_that_was_stopped_is_no_success(server: KfpServer, run_id: str) -> None:
    server.runs[run_id].state = "CANCELING"
    result = call("runs", "status", run_id, "--wait", FAST, "--host", server.url)
    assert result.code == 1
    assert "The run ended: CANCELED." in result.out


def test_following_outlives_a_backend_that_is_away_for_a_while(
    server: KfpServer, run_id: str
) -> None:
    server.script = [Step("RUNNING", SEARCHING), Step("SUCCEEDED", DONE)]
    server.failures = [("GET .*/runs/", None), ("GET .*/runs/", 503)]
    result = call("runs", "status", run_id, "--wait", FAST, "--host", server.url)
    assert result.code == 0, result.out
    assert "is not responding" in result.out
    assert "Trying again (1 of 11)" in result.out
    assert "failed to handle the request (503). Trying again (2 of 11)" in result.out


def test_following_gives_up_in_the_end_and_says_that_the_run_goes_on(
    server: KfpServer, run_id: str
) -> None:
    server.failures = [("GET .*/runs/", 503)] * PATIENCE
    result = call("runs", "status", run_id, "--wait", FAST, "--host", server.url)
    assert result.code == 2
    assert f"The run continues. Follow it: srccore runs status {run_id} --wait" in result.out
    assert not server.failures


def test_failures_that_are_not_in_a_row_are_no_reason_to_give_up(
    server: KfpServer, run_id: str
) -> None:
    backend = connect(Connection(host=server.url))
    server.script = [*[Step("RUNNING", PREPARED)] * 30, Step("SUCCEEDED", DONE)]
    with screen(Console(file=io.StringIO())) as on:
        server.failures = [("GET .*/runs/", 503)] * (PATIENCE - 1)
        with pytest.raises(TimeoutError):
            follow(backend, run_id, on, interval=0.01, timeout=0.2)
        server.failures = [("GET .*/runs/", 503)] * (PATIENCE - 1)
        assert follow(backend, run_id, on, interval=0.01).state == "SUCCEEDED"
        server.failures = [("GET .*/runs/", 503)] * PATIENCE
        with pytest.raises(UnavailableError):
            follow(backend, run_id, on, interval=0.01)


def test_a_token_that_expires_while_following_is_told(
    server: KfpServer, run_id: str, tmp_path: Path
) -> None:
    server.script = [Step("RUNNING", PREPARED)]
    server.failures = [("GET .*/runs/", 401)]
    result = call(
        "runs", "status", run_id, "--wait", FAST, "--host", server.url, KFP_TOKEN="the-secret"
    )
    assert result.code == 2
    assert "Renew the token in KFP_TOKEN" in result.out
    assert "The run continues." in result.out
    assert "the-secret" not in result.out


def test_a_timeout_leaves_the_run_going(server: KfpServer, run_id: str) -> None:
    server.script = [Step("RUNNING", PREPARED)]
    options = ("--wait", FAST, "--timeout", "0.05", "--host", server.url)
    result = call("runs", "status", run_id, *options)
    assert result.code == 124
    assert "It has not finished after 0.05 s. The run continues." in result.out
    assert not server.sent("POST", ":terminate")


def test_ctrl_c_leaves_the_run_going_and_says_how_to_follow_and_stop_it(
    server: KfpServer, pipeline: Path
) -> None:
    server.script = [Step("RUNNING", SEARCHING)]
    process = subprocess.Popen(
        [sys.executable, "-m", "srccore", "submit", pipeline, ROOT, "--wait", "--interval=60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in NO_BACKEND} | {"KFP_HOST": server.url},
        # A background process of a script ignores Ctrl-C, and so would its child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no thread
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "item 1 / search: running" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    [run_id] = server.runs
    assert out.strip().splitlines() == [
        f"The run continues. Follow it: srccore runs status {run_id} --wait --host {server.url}",
        f"Stop it: srccore runs stop {run_id} --host {server.url}",
    ]
    assert not err
    assert not server.sent("POST", ":terminate")


def test_a_terminal_shows_a_tree_while_the_run_goes_on(server: KfpServer, run_id: str) -> None:
    file = io.StringIO()
    server.script = SUCCESS
    backend = connect(Connection(host=server.url))
    console = Console(file=file, force_terminal=True, color_system=None, width=100, height=40)
    with screen(console) as on:
        follow(backend, run_id, on, interval=0.01)
    last = file.getvalue().rpartition("SUCCEEDED  7/7")[2]
    assert ["prepare" in last, "round 1  3/3" in last, "round 2  3/3" in last] == [True] * 3


def test_a_tree_folds_what_is_finished_or_has_not_begun(server: KfpServer, run_id: str) -> None:
    run = at_step(server, run_id, Step("RUNNING", SEARCHING | {"prepare": "SUCCEEDED"}))
    file = io.StringIO()
    Console(file=file, width=100).print(tree(run))
    first, *lines = (line.rstrip() for line in file.getvalue().splitlines())
    assert first.endswith("RUNNING  2/7")
    assert [line.partition(" (")[0] for line in lines if "●" not in line] == [
        "├── ✓ prepare  1 min 15 s",
        "│   │   ├── ✓ item 0  1/1  1 min 15 s",
        "│   └── ○ train",
        "└── ○ round 2  0/3",
    ]
    running = [line.partition("● ")[2].partition("  ")[0] for line in lines if "●" in line]
    assert running == ["round 1", "for-loop-2", "item 1", "search"]


def test_status_shows_how_far_a_run_has_come(server: KfpServer, run_id: str) -> None:
    server.script = [Step("RUNNING", FAILED)]
    result = call("runs", "status", run_id, "--host", server.url)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].endswith("  RUNNING  6/7")
    assert [line.rpartition("─ ")[2].split("  ")[0] for line in lines[1:-1]] == [
        "✓ prepare",
        "✓ round 1",
        "✗ round 2",
        "✓ for-loop-2",
        "✗ train",
    ]
    assert lines[-1] == f"{server.url}/#/runs/details/{run_id}"


def test_tasks_of_one_name_are_told_apart_by_their_round(server: KfpServer, run_id: str) -> None:
    run = at_step(server, run_id, Step("RUNNING", ROUND | {"src-round-2.train": "RUNNING"}))
    states = {name: task.state for name, task in walk(task_tree(run))}
    assert states["round 1 / train"] == "SUCCEEDED"
    assert states["round 2 / train"] == "RUNNING"
    assert states["round 2 / for-loop-2 / item 0 / search"] == "PENDING"
    assert {each.parent_task_id for each in run.run_details.task_details} == {None}


@pytest.mark.parametrize("attempts", [0, 1, 2])
def test_a_node_counts_by_its_last_attempt_however_many_there_are(
    pipeline: Path, attempts: int
) -> None:
    spec = yaml.safe_load(pipeline.read_text().partition("\n---\n")[0])
    details = Workflow(spec, "wf-abcde", SEARCHING, attempts).details("id")
    for detail in details:
        detail.start_time = detail.end_time = None
    run = api.V2beta1Run(
        pipeline_spec=spec, run_details=api.V2beta1RunDetails(task_details=details)
    )
    states = {name: task.state for name, task in walk(task_tree(run))}
    assert states == {
        "prepare": "SUCCEEDED",
        "round 1 / for-loop-2 / item 0 / search": "SUCCEEDED",
        "round 1 / for-loop-2 / item 1 / search": "RUNNING",
        "round 1 / train": "PENDING",
        "round 2 / for-loop-2 / item 0 / search": "PENDING",
        "round 2 / for-loop-2 / item 1 / search": "PENDING",
        "round 2 / train": "PENDING",
    }


def test_a_backend_that_ceases_to_tell_of_tasks_is_told_of_once(
    server: KfpServer, run_id: str
) -> None:
    run = at_step(server, run_id, Step("RUNNING", SEARCHING))
    file = io.StringIO()
    with screen(Console(file=file, width=500)) as on:
        on.show(run)
        assert "Kubeflow stopped reporting" not in file.getvalue()
        nameless = [each for each in run.run_details.task_details if not each.display_name]
        nameless[0].end_time = datetime(2026, 3, 1, 3, 0, tzinfo=UTC)
        on.show(run)
        on.show(run)
    assert file.getvalue().count("Kubeflow stopped reporting individual tasks at ") == 1
    assert "The run continues" in file.getvalue()
    file = io.StringIO()
    run.state = "FAILED"
    Console(file=file, width=500).print(tree(run))
    assert "Kubeflow stopped reporting individual tasks at " in file.getvalue()
    assert "The run continues" not in file.getvalue()
    assert f"--selector pipeline/runid={run_id}" in ending(run, "")


def test_a_loop_over_items_that_the_pipeline_does_not_list_grows_as_they_begin(
    pipeline: Path,
) -> None:
    spec = yaml.safe_load(pipeline.read_text().partition("\n---\n")[0])
    loop = spec["components"]["comp-src-round"]["dag"]["tasks"]["for-loop-2"]
    loop["parameterIterator"]["items"] = {"inputParameter": "pipelinechannel--shards"}
    begun = {f"src-round.for-loop-2.{i}.search": "RUNNING" for i in range(3)}
    for states, items in ((PREPARED, 1), (PREPARED | begun, 3)):
        details = Workflow(spec, "wf-abcde", states).details("id")
        run = api.V2beta1Run(
            pipeline_spec=spec, run_details=api.V2beta1RunDetails(task_details=details)
        )
        for detail in details:
            detail.start_time = detail.end_time = None
        names = [name for name, _ in walk(task_tree(run)) if name.startswith("round 1 / for-")]
        assert len(names) == items


def test_node_ids_are_those_of_argo() -> None:
    # The test vectors of the hash's reference: "a" is e40c292c and "foobar" is bf9cf968.
    assert node_id("wf", "a") == f"wf-{0xE40C292C}"
    assert node_id("wf", "foobar") == f"wf-{0xBF9CF968}"


def test_a_run_without_its_pipeline_is_shown_as_the_backend_lists_it() -> None:
    nodes = [
        ("report", None),
        ("train", datetime(2026, 3, 1, 3, tzinfo=UTC)),
        ("src-round", datetime(2026, 3, 1, 2, tzinfo=UTC)),
        ("train-driver", datetime(2026, 3, 1, 2, tzinfo=UTC)),
        ("executor", datetime(2026, 3, 1, 3, tzinfo=UTC)),
    ]
    details = [
        api.V2beta1PipelineTaskDetail(display_name=name, start_time=start) for name, start in nodes
    ]
    run = api.V2beta1Run(run_details=api.V2beta1RunDetails(task_details=details))
    assert [name for name, _ in walk(task_tree(run))] == ["src-round", "train", "report"]


def test_runs_are_listed_newest_first_over_all_pages(server: KfpServer) -> None:
    server.largest_page = 3
    for number in range(8):
        server.add_run(display_name=f"run {number}", created_at=clock(number))
    going = server.add_run(
        display_name="late", created_at=clock(3000), state="RUNNING", finished_at=NEVER
    )
    result = call("runs", "list", "--host", server.url, "--limit", 8)
    assert result.code == 0, result.out
    rows = [line.split("  ") for line in result.out.splitlines()]
    assert rows[0][0] == "ID"
    names = [next(cell for cell in row[1:] if cell) for row in rows[1:]]
    assert names == ["late", *(f"run {number}" for number in range(7, 0, -1))]
    assert result.out.splitlines()[1].startswith(f"{going.run_id}  late   RUNNING")
    # Created at second 7 and finished at second 125.
    assert result.out.splitlines()[2].endswith("SUCCEEDED  2026-03-01 02:00  1 min 58 s")


def test_no_name_of_a_run_moves_the_cursor_of_who_lists_it(server: KfpServer) -> None:
    run = server.add_run(display_name="\x1b[2Jall is well", created_at=clock(0), state="FAILED")
    for command in (["list"], ["status", run.run_id]):
        result = call("runs", *command, "--host", server.url)
        assert "⟨U+001B⟩[2Jall is well" in result.out
        assert "\x1b[2J" not in result.out


def test_runs_of_one_experiment_alone_are_listed(server: KfpServer, pipeline: Path) -> None:
    for experiment in ("one", "two"):
        options = ("--experiment", experiment, "--run-name", f"in {experiment}")
        assert call("submit", pipeline, ROOT, "--host", server.url, *options).code == 0
    result = call("runs", "list", "--experiment", "one", "--host", server.url)
    assert "in one" in result.out
    assert "in two" not in result.out
    result = call("runs", "list", "--experiment", "three", "--host", server.url)
    assert result.code == 2
    assert "no experiment 'three'" in result.out


def test_a_list_in_a_multi_user_install_is_of_a_namespace(server: KfpServer, run_id: str) -> None:
    server.multi_user = True
    result = call("runs", "list", "--host", server.url, "--namespace", "ann")
    assert result.code == 0
    assert server.requests[-1].query["namespace"] == "ann"
    # The ID of a run needs no namespace.
    assert call("runs", "status", run_id, "--host", server.url).code == 0


def test_stop_ends_a_run_and_says_so(server: KfpServer, run_id: str) -> None:
    server.script = [Step("RUNNING", SEARCHING)]
    result = call("runs", "stop", run_id, "--host", server.url)
    assert result.code == 0, result.out
    assert result.out == f"Run {run_id} is being stopped.\n"
    assert server.runs[run_id].state == "CANCELING"
    result = call("runs", "stop", run_id, "--host", server.url)
    assert result.out == f"Run {run_id} has already finished: CANCELED.\n"
    assert len(server.sent("POST", ":terminate")) == 1


@pytest.mark.parametrize("command", [["status"], ["status", "--wait"], ["stop"]])
def test_a_run_that_there_is_not_is_told(server: KfpServer, command: list[str]) -> None:
    result = call("runs", command[0], "no-such-run", *command[1:], "--host", server.url)
    assert result.code == 2
    assert "has no such object (404): Run no-such-run not found. List the runs" in result.out
