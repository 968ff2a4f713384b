"""``srccore schedule``: cron lines, and one enabled schedule per name."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from backend_commands import ROOT, Outcome, call
from kfp_server import KfpServer
from small_pipeline import CONFIG

from srccore.errors import UserError
from srccore.kubeflow.schedule import next_times, read_cron


def schedule(
    server: KfpServer, pipeline: Path, *options: str, name: str = "weekly", cron: str = "0 2 * * 0"
) -> Outcome:
    given = ("--host", server.url, "--name", name, "--cron", cron)
    return call("schedule", pipeline, ROOT, *given, *options)


def modes(server: KfpServer) -> list[tuple[str, str]]:
    return [(each.display_name, each.mode) for each in server.recurring_runs.values()]


def test_a_schedule_runs_one_at_a_time_without_catching_up(
    server: KfpServer, pipeline: Path
) -> None:
    result = schedule(server, pipeline, "--set", "search.width=6", "--service-account", "src")
    assert result.code == 0, result.out
    [made] = server.recurring_runs
    [request] = server.sent("POST", "/recurringruns")
    assert request.body["no_catchup"] is True
    assert request.body["max_concurrency"] == "1"
    assert request.body["mode"] == "ENABLE"
    assert request.body["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * 0"}}
    assert request.body["service_account"] == "src"
    assert request.body["runtime_config"]["parameters"] == {
        "artifact_root": "s3://bucket/runs",
        "search": CONFIG["search"] | {"width": 6},
    }
    lines = result.out.splitlines()
    assert lines[:2] == [f"Schedule {made}", f"{server.url}/#/recurringrun/details/{made}"]
    assert lines[2].startswith("Next runs, if the backend's clock is set to UTC: Sun ")
    assert lines[2].count("Sun ") == 3


def test_a_schedule_starts_the_version_that_was_uploaded(server: KfpServer, pipeline: Path) -> None:
    result = schedule(server, pipeline, "--upload")
    assert result.code == 0, result.out
    [(version_id, version)] = server.versions.items()
    [request] = server.sent("POST", "/recurringruns")
    assert "pipeline_spec" not in request.body
    assert request.body["pipeline_version_reference"] == {
        "pipeline_id": version.pipeline_id,
        "pipeline_version_id": version_id,
    }
    url = f"{server.url}/#/pipelines/details/{version.pipeline_id}/version/{version_id}"
    assert result.out.splitlines()[2] == f"Pipeline: {url}"
    assert call("submit", pipeline, ROOT, "--host", server.url, "--upload").code == 0
    assert len(server.versions) == 1, "a run starts the same version"


def test_a_new_schedule_is_there_before_the_old_ones_of_its_name_are_disabled(
    server: KfpServer, pipeline: Path
) -> None:
    server.multi_user = True
    server.largest_page = 2
    assert schedule(server, pipeline, "--namespace", "bob").code == 0
    for name in ("weekly", "other", "weekly", "weekly"):
        assert schedule(server, pipeline, "--namespace", "ann", name=name).code == 0
    # Someone enabled two schedules of the same name, on different pages.
    for each in server.recurring_runs.values():
        each.mode, each.status = "ENABLE", "ENABLED"
    server.requests.clear()
    result = schedule(server, pipeline, "--namespace", "ann", "--experiment", "another")
    assert result.code == 0, result.out
    assert modes(server) == [
        ("weekly", "ENABLE"),  # bob's
        ("weekly", "DISABLE"),
        ("other", "ENABLE"),
        ("weekly", "DISABLE"),
        ("weekly", "DISABLE"),
        ("weekly", "ENABLE"),
    ]
    posts = [r.path.rpartition("/")[2] for r in server.requests if r.method == "POST"]
    assert posts[:2] == ["experiments", "recurringruns"]
    assert [post.endswith(":disable") for post in posts[2:]] == [True] * 3
    assert result.out.count("Disabled the earlier schedule of that name") == 3
    # Disabled schedules are left alone.
    server.requests.clear()
    assert schedule(server, pipeline, "--namespace", "ann").code == 0
    assert len(server.sent("POST", ":disable")) == 1


@pytest.mark.parametrize("at", ["POST .*:disable", "GET .*/recurringruns"])
def test_two_schedules_of_one_name_are_told_of(server: KfpServer, pipeline: Path, at: str) -> None:
    assert schedule(server, pipeline).code == 0
    server.failures = [(at, 503)]
    result = schedule(server, pipeline)
    assert result.code == 2
    old, new = server.recurring_runs
    assert f"The new schedule {new} is enabled" in result.out
    assert (old if "disable" in at else "an older schedule") in result.out
    assert modes(server) == [("weekly", "ENABLE"), ("weekly", "ENABLE")]
    assert schedule(server, pipeline).code == 0, "the same command fixes it"
    assert [mode for _, mode in modes(server)] == ["DISABLE", "DISABLE", "ENABLE"]


def test_a_schedule_that_is_refused_leaves_the_old_one_alone(
    server: KfpServer, pipeline: Path
) -> None:
    assert schedule(server, pipeline).code == 0
    server.failures = [("POST .*/recurringruns$", 503)]
    assert schedule(server, pipeline).code == 2
    assert modes(server) == [("weekly", "ENABLE")]


@pytest.mark.parametrize(
    ("line", "cron"),
    [
        ("0 2 * * 0", "0 0 2 * * 0"),
        ("*/15 8-18 * * MON-FRI", "0 */15 8-18 * * MON-FRI"),
        ("0 9 ? JAN,JUL 1", "0 0 9 ? JAN,JUL 1"),
        ("30 0 2 * * 0", "30 0 2 * * 0"),
        (" 0  2 * * */7 ", "0 0 2 * * */7"),
    ],
)
def test_a_cron_line_gets_the_form_of_kubeflow(line: str, cron: str) -> None:
    assert read_cron(line) == cron


@pytest.mark.parametrize(
    "line",
    ["", "daily", "@daily", "61 * * * *", "* * *", "0 2 * * 0 0 0", "0 2 L * *", "0 2 * * 1#2"],
)
def test_a_line_that_is_none_is_told_with_an_example(
    server: KfpServer, pipeline: Path, line: str
) -> None:
    result = schedule(server, pipeline, cron=line)
    assert result.code == 2
    assert "is not a valid cron line" in result.out
    assert '--cron "0 2 * * 0"' in result.out
    assert not server.requests


@pytest.mark.parametrize("line", ["0 2 * * 7", "0 2 * * 5-7", "0 2 * * 1,7"])
def test_a_sunday_of_seven_is_told_since_kubeflow_has_none(line: str) -> None:
    with pytest.raises(UserError, match="Use 0 for Sunday"):
        read_cron(line)


def test_the_next_times_are_those_of_the_line() -> None:
    # 1 March 2026 is a Sunday; at exactly 02:00 the next time is a week later.
    now = datetime(2026, 3, 1, 2, 0, tzinfo=UTC)
    sundays = [datetime(2026, 3, day, 2, 0, tzinfo=UTC) for day in (8, 15, 22)]
    assert next_times("0 0 2 * * 0", now) == sundays
    assert next_times("30 0 2 * * 0", now, times=1) == [now.replace(second=30)]
