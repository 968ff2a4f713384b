"""A draw of the mutations of bad input: no traceback, no hang, nothing bad is accepted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from srccore.errors import UserError

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")


@pytest.fixture
def badinput(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import badinput

    with badinput.quiet():
        yield badinput
    sys.modules.pop("badinput", None)


def test_a_draw_of_bad_input_is_refused_or_used(badinput: ModuleType) -> None:
    tally = badinput.measure(range(300))
    assert [failure for each in tally.values() for failure in each.failures] == []
    assert sum(each.cases for each in tally.values()) == 300
    # The draw is not of input that is refused for one reason: most is bad, and some is good.
    assert all(0 < each.known_bad < each.cases for each in tally.values())
    assert all(each.refused > 0 for each in tally.values())


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("run", "is_bad", "counted"),
    [
        (lambda module: None, True, "accepted_silently"),
        (lambda module: _raise(module.UnusableError("x")), False, "accepted_silently"),
        (lambda module: _raise(KeyError("x")), True, "tracebacks"),
        (lambda module: _raise(UserError("x" * 4000, "y")), True, "tracebacks"),
        (lambda module: _raise(module.Hang()), True, "hangs"),
    ],
)
def test_each_fault_is_counted(
    badinput: ModuleType, monkeypatch: pytest.MonkeyPatch, run: object, is_bad: bool, counted: str
) -> None:
    case = badinput.Case("x", lambda: run(badinput), is_bad)  # type: ignore[operator]
    monkeypatch.setattr(badinput, "KINDS", {"kind": lambda rng, folder: case})
    (tally,) = badinput.measure(range(1)).values()
    assert (tally.faults, getattr(tally, counted), len(tally.failures)) == (1, 1, 1)


def test_a_case_is_made_from_the_seed_and_its_number_alone(
    badinput: ModuleType, tmp_path: Path
) -> None:
    import random

    made = []
    for turn in ("a", "b"):
        (tmp_path / turn).mkdir()
        case = badinput.json_lines(random.Random("1/7"), tmp_path / turn)
        made.append((case.what, (tmp_path / turn / "samples.jsonl").read_bytes()))
    assert made[0] == made[1]
