"""Which samples an engine computes together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from srccore.config import EngineConfig, ModelConfig
from srccore.data import dataset
from srccore.data.records import Category, Sample
from srccore.method.engine import Prompt
from srccore.models.policy import (
    Policy,
    load_processor,
    prompt_text,
    prompt_tokens,
    write_policy,
)
from srccore.models.transformers import encode_prompts
from srccore.stages.batches import prompt_batches, unfinished, within_budget


@given(st.lists(st.integers(1, 50)), st.integers(1, 200))
def test_a_batch_never_exceeds_its_budget_except_one_long_item(
    lengths: list[int], most: int
) -> None:
    ordered = sorted(lengths, reverse=True)
    batches = within_budget(ordered, lambda length: length, most)
    assert [item for batch in batches for item in batch] == ordered
    for batch in batches:
        assert len(batch) * max(batch) <= most or len(batch) == 1
    for batch in batches[:-1]:
        assert (len(batch) + 1) * batch[0] > most


def test_items_are_padded_to_the_longest_of_their_batch() -> None:
    # 2 x 5 = 10 fits, 3 x 5 = 15 does not.
    assert within_budget([30, 5, 4, 3, 2], lambda item: item, 12) == [[30], [5, 4], [3, 2]]


def test_an_interrupted_batch_is_computed_again_as_a_whole() -> None:
    batches = [[1, 2], [3, 4], [5]]
    assert unfinished(batches, {1, 2, 3}.__contains__) == [[3, 4], [5]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dataset.DataSet:
    path = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(12):
        # Images of three sizes: a family with tiles or patches spends more tokens on some.
        name = f"{number}.png"
        Image.new("RGB", [(60, 60), (200, 60), (90, 400)][number % 3]).save(path / name)
        sample = Sample(
            id=f"s{number}",
            category=Category.PERCEPTION,
            question="What " + "is " * (number % 4) + "it?",
            answer="A",
        )
        rows.append((sample, (path / name).read_bytes()))
    dataset.write_data(path / "data.parquet", rows)
    return dataset.open_data(path / "data.parquet")


@pytest.mark.parametrize("name", ["qwen2.5-vl", "llava-next-shapes"])
def test_batches_are_those_of_the_lengths_that_the_engine_sees(
    name: str,
    data: dataset.DataSet,
    awkward: Callable[[str], ModelConfig],
    tmp_path: Path,
) -> None:
    base = awkward(name)
    write_policy(tmp_path, Policy(base=base))
    processor = load_processor(base)

    def seen(samples: list[Sample]) -> tuple[int, int]:
        prompts = [Prompt(partial(data.image, s.id), s.question, s.id) for s in samples]
        rows, length = encode_prompts(processor, prompts)["input_ids"].shape
        return rows, length

    lengths = {sample.id: seen([sample])[1] for sample in data}
    assert lengths == {
        sample.id: prompt_tokens(
            processor, prompt_text(processor, sample.question), data.size(sample.id)
        )
        for sample in data
    }
    most = 3 * max(lengths.values())
    batches = prompt_batches(list(data), data, tmp_path, EngineConfig(), most)
    assert sorted(s.id for batch in batches for s in batch) == sorted(lengths)
    for batch in batches:
        rows, length = seen(batch)
        assert rows * length <= most


def test_for_vllm_each_sample_is_durable_by_itself(data: dataset.DataSet, tmp_path: Path) -> None:
    engine = EngineConfig(name="vllm")
    first, second = list(data)[:2]
    assert prompt_batches([first, second], data, tmp_path, engine, 1) == [
        [first],
        [second],
    ]
