"""For data without facts, an endpoint judges the rationales of the held-out split."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from endpoint import fails, says, serving, text_of

from srccore.config import EndpointConfig, EvaluationConfig, ModelConfig
from srccore.data import dataset
from srccore.data.records import Judgement, read_records
from srccore.embedded.world import make_item
from srccore.errors import UserError
from srccore.models.policy import Policy, write_policy
from srccore.stages.evaluation import evaluate as run_evaluate
from srccore.training.machine import Figures, Machine

COUNT = 12


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    rows = []
    for number in range(COUNT):
        item = make_item(0, "heldout", number)
        buffer = io.BytesIO()
        item.image.save(buffer, "PNG")
        rows.append((item.sample.model_copy(update={"facts": ()}), buffer.getvalue()))
    dataset.write_data(tmp_path / "data.parquet", rows)
    write_policy(tmp_path / "policy.json", Policy(base=ModelConfig(path="embedded:lvlm")))
    return {"data": tmp_path / "data.parquet", "policy": tmp_path / "policy.json"}


def test_a_judge_fills_the_figures_and_is_not_asked_twice_of_one_response(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:

        def evaluate(folder: str) -> Figures:
            endpoint = EndpointConfig(url=server.url, model="judge", concurrency=1, retries=0)
            config = EvaluationConfig(max_tokens=60, judge="endpoint", endpoint=endpoint)
            return run_evaluate(
                config,
                **inputs,
                out=tmp_path / folder,
                seed=0,
                round_number=0,
                machine=Machine("cpu"),
            )

        yes = says('{"rationale_right": true, "derived_answer": "x"}')
        server.script = lambda body, attempt: yes if len(server.seen) <= 2 else fails(401)
        with pytest.raises(UserError, match="refused the key"):
            evaluate("run")
        asked = {text_of(body) for body in server.seen[:2]}
        server.script = lambda body, attempt: yes
        figures = evaluate("run")
        assert not asked & {text_of(body) for body in server.seen[3:]}
    assert figures["judged"] == figures["n"] == COUNT
    # Only a response without a rationale is wrong here, and it was not asked about.
    wrong = sum(not record.rationale_right for record in _judgements(tmp_path / "run"))
    assert figures["rationale_accuracy"] == pytest.approx(1 - wrong / COUNT)
    assert len(server.seen) == 1 + COUNT - wrong


def _judgements(folder: Path) -> list[Judgement]:
    return list(read_records(folder / "judgements.jsonl", Judgement))
