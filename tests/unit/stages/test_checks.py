"""What is refused before any work starts."""

from __future__ import annotations

import pytest

from srccore.config import AnnotationConfig, AugmentationConfig, load_config
from srccore.data.records import Category, Fact, Sample
from srccore.errors import UserError
from srccore.stages.checks import (
    check_facts,
    check_gpus,
    check_settings,
    check_training_processes,
)
from srccore.stages.table import STAGES

BARE = Sample(id="1", category=Category.CHART, question="How many?", answer="2")
REASONED = BARE.model_copy(update={"id": "2", "rationale": "There are two."})
FACT = Fact(subject="the bar", relation="is", value="2")
FACTS = AnnotationConfig(samples=1)


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("augmentation.teacher", "augment-rationales"),
        ("annotation.teacher", "annotate-ratings"),
        ("evaluation.judge", "evaluate"),
    ],
)
def test_an_endpoint_without_an_address_is_refused_where_a_stage_would_ask_it(
    setting: str, stage: str
) -> None:
    config = load_config("tiny", [f"{setting}=endpoint"])
    section = setting.partition(".")[0]
    others = [name for name in STAGES if name != stage]
    check_settings(others, dict(config))
    with pytest.raises(UserError) as caught:
        check_settings(STAGES, dict(config))
    assert f"{stage} would ask an endpoint ({setting})" in str(caught.value)
    assert f"{section}.endpoint.url and {section}.endpoint.model are not set" in str(caught.value)
    assert f"Pass --set {section}.endpoint.url=" in str(caught.value)
    complete = [f"{section}.endpoint.url=http://localhost/v1", f"{section}.endpoint.model=m"]
    check_settings(STAGES, dict(load_config("tiny", [f"{setting}=endpoint", *complete])))


def test_an_address_without_its_scheme_is_refused() -> None:
    endpoint = ["evaluation.endpoint.url=localhost:8000/v1", "evaluation.endpoint.model=m"]
    config = load_config("tiny", ["evaluation.judge=endpoint", *endpoint])
    with pytest.raises(UserError, match="must start with http:// or https://"):
        check_settings(["evaluate"], dict(config))


def test_the_teacher_facts_is_refused_where_no_sample_has_facts() -> None:
    with pytest.raises(UserError, match=r"annotation.teacher is facts, but no sample of mine"):
        check_facts("annotate-ratings", FACTS, [BARE, REASONED], "mine")


def test_rationales_of_the_data_are_enough_where_only_rationales_are_wanted() -> None:
    check_facts("augment-rationales", AugmentationConfig(), [BARE, REASONED], "mine")
    with pytest.raises(UserError, match=r"augmentation.teacher is facts"):
        check_facts("augment-rationales", AugmentationConfig(), [BARE], "mine")


def test_one_sample_with_facts_is_enough() -> None:
    known = BARE.model_copy(update={"facts": (FACT,)})
    check_facts("annotate-ratings", FACTS, [BARE, known], "mine")
    endpoint = AnnotationConfig(samples=1, teacher="endpoint")
    check_facts("annotate-ratings", endpoint, [BARE], "mine")


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        ([], 9, None),
        (["engine.name=vllm"], 4, None),
        (["engine.name=vllm"], 5, "--workers 5 needs 5 GPUs, 1 for each worker's vLLM, but only 4"),
        (["engine.name=vllm", "scoring.engine.tensor_parallel_size=2"], 2, None),
        (["engine.name=vllm", "scoring.engine.tensor_parallel_size=2"], 3, "needs 6 GPUs, 2 for"),
        (["engine.name=vllm", "device=cpu"], 5, None),
    ],
)
def test_more_workers_on_vllm_than_gpus_are_refused(
    settings: list[str], workers: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    config = load_config("tiny", ["device=auto", *settings])
    if message is None:
        check_gpus(config, workers)
    else:
        with pytest.raises(UserError, match=message):
            check_gpus(config, workers)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    check_training_processes(2, "auto")
    check_training_processes(3, "cpu")
    check_training_processes(None, "auto")
    with pytest.raises(UserError, match="--training-processes 3 needs 3 GPUs, but only 2 are"):
        check_training_processes(3, "auto")
