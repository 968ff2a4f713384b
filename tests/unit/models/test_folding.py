"""Folding keeps deltas far below the spacing of the weights, over rounds and on every load."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from srccore.errors import UserError
from srccore.hashing import stable_hash
from srccore.models import folding
from srccore.models.folding import Share, fold_adapters, read_adapter, stochastic_round

ROWS, COLUMNS, RANK, ALPHA = 2048, 1024, 256, 512
LEARNING_RATE = 5e-7
STEPS = {"94 steps": 94, "750 steps": 750}
"""12,000 samples in batches of 128, and of 16."""
NAME = "model.language_model.layers.0.mlp.up_proj"


def model(dtype: torch.dtype, names: tuple[str, ...] = (NAME,)) -> Any:
    """Linear layers whose weights are as large as those of a 7B model."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.nn.Module()
    for name in names:
        inner = whole
        *path, last = name.split(".")
        for part in path:
            if part not in dict(inner.named_children()):
                inner.add_module(part, torch.nn.Module())
            inner = inner.get_submodule(part)
        linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
        with torch.no_grad():
            linear.weight.normal_(std=0.02, generator=generator)
        inner.add_module(last, linear)
    whole.config = SimpleNamespace(model_type="llava")
    return whole.to(dtype)


def adapter(out: Path, steps: int, seed: int, name: str = NAME, **changes: float) -> Path:
    """Writes an adapter like DPO's: Adam with linear decay moves B by steps * rate / 2."""
    generator = torch.Generator().manual_seed(seed)
    moved = steps * LEARNING_RATE / 2

    def uniform(rows: int, columns: int, largest: float) -> torch.Tensor:
        return (2 * torch.rand(rows, columns, generator=generator) - 1) * largest

    # PEFT draws A from +-1/sqrt(inputs).
    tensors = {
        f"base_model.model.{name}.lora_A.weight": uniform(RANK, COLUMNS, COLUMNS**-0.5),
        f"base_model.model.{name}.lora_B.weight": uniform(ROWS, RANK, moved),
    }
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [name]}
    (out / "adapter_config.json").write_text(json.dumps(config | changes))
    return out


def delta(path: Path, name: str = NAME) -> torch.Tensor:
    found = read_adapter(path)
    a, b = found.pairs[name]
    product: torch.Tensor = b.double() @ a.double()
    return product * found.scale


def projection(kept: torch.Tensor, true: torch.Tensor) -> float:
    return float((kept.double() * true).sum() / (true * true).sum())


def cosine(kept: torch.Tensor, true: torch.Tensor) -> float:
    return float((kept.double() * true).sum() / kept.double().norm() / true.norm())


def weights(dtype: torch.dtype, *adapters: Path) -> torch.Tensor:
    made = model(dtype)
    fold_adapters(made, adapters)
    weight: torch.Tensor = made.get_submodule(NAME).weight
    return weight.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_a_round_of_dpo_survives_folding(tmp_path: Path, dtype: torch.dtype, steps: int) -> None:
    path = adapter(tmp_path / "a", steps, seed=1)
    base, true = weights(dtype), delta(path)
    kept = weights(dtype, path).double() - base.double()
    assert projection(kept, true) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("steps", "most"), [(94, 0.25), (750, 0.95)])
def test_rounding_to_the_nearest_value_loses_it(tmp_path: Path, steps: int, most: float) -> None:
    # What the tests here guard against: a bfloat16 weight of 0.02 would have to move by 6e-5, half
    # its spacing, and 94 steps move it by 8e-6 (root mean square).
    base, true = weights(torch.bfloat16), delta(adapter(tmp_path / "a", steps, seed=1))
    kept = (base.double() + true).to(torch.bfloat16).double() - base.double()
    assert projection(kept, true) < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_survives_is_reported_for_all_adapters_and_for_the_newest(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    first, second = (adapter(tmp_path / f"{seed}", 94, seed) for seed in (1, 2))
    made = model(dtype)
    found = fold_adapters(made, [first, second])
    whole = made.get_submodule(NAME).weight.detach().double()
    kept, true = whole - weights(dtype).double(), delta(first) + delta(second)
    assert found.total.projection == pytest.approx(projection(kept, true), abs=1e-4)
    assert found.total.cosine == pytest.approx(cosine(kept, true), abs=1e-4)
    kept, true = whole - weights(dtype, first).double(), delta(second)
    assert found.newest.projection == pytest.approx(projection(kept, true), abs=1e-4)
    assert found.newest.cosine == pytest.approx(cosine(kept, true), abs=1e-4)
    if dtype == torch.float32:
        assert found.newest.projection == pytest.approx(1, abs=1e-4)
        assert found.newest.cosine == pytest.approx(1, abs=1e-4)


def test_a_single_adapter_is_the_newest_and_the_total_and_none_loses_nothing(
    tmp_path: Path,
) -> None:
    found = fold_adapters(model(torch.bfloat16), [adapter(tmp_path / "a", 94, seed=1)])
    assert found.newest == found.total
    none = fold_adapters(model(torch.bfloat16), [])
    assert none.total == none.newest == Share(projection=1, cosine=1)


def test_a_layer_that_the_newest_adapter_leaves_alone_counts_only_in_the_total(
    tmp_path: Path,
) -> None:
    other = NAME.replace("up_proj", "gate_proj")
    made = model(torch.bfloat16, (NAME, other))
    before = made.get_submodule(other).weight.detach().clone()
    paths = [adapter(tmp_path / "a", 94, 1, other), adapter(tmp_path / "b", 750, 2)]
    found = fold_adapters(made, paths)
    kept = made.get_submodule(NAME).weight.detach().double() - weights(torch.bfloat16).double()
    assert found.newest.projection == pytest.approx(projection(kept, delta(paths[1])), abs=1e-4)
    moved = made.get_submodule(other).weight.detach().double() - before.double()
    true = delta(paths[0], other)
    assert projection(moved, true) == pytest.approx(1, abs=0.02)
    norms = [float((each * each).sum()) for each in (delta(paths[1]), true)]
    wanted = (norms[0] * found.newest.projection + norms[1] * projection(moved, true)) / sum(norms)
    assert found.total.projection == pytest.approx(wanted, abs=1e-4)


def test_rounds_add_up_and_a_weight_that_has_moved_stays(tmp_path: Path) -> None:
    # The same direction in each round, so no weight has a reason to move back.
    paths = [adapter(tmp_path / str(number), 94, seed=1) for number in range(3)]
    states = [weights(torch.bfloat16, *paths[:count]).double() for count in range(4)]
    true = delta(paths[0])
    for before, after in itertools.pairwise(states):
        moved = after - before
        assert projection(moved, true) == pytest.approx(1, abs=0.02)
        assert bool((moved * true >= 0).all())
    assert projection(states[3] - states[0], 3 * true) == pytest.approx(1, abs=0.01)


def test_folding_again_gives_the_same_weights_and_other_matrices_other_numbers(
    tmp_path: Path,
) -> None:
    path = adapter(tmp_path / "a", 94, seed=1)
    assert torch.equal(weights(torch.bfloat16, path), weights(torch.bfloat16, path))
    values = torch.full((1000,), 1 + 2.0**-8)  # half-way between two values of bfloat16
    ups = [stochastic_round(values, torch.bfloat16, name) > 1 for name in ("a", "b")]
    same = float((ups[0] == ups[1]).float().mean())
    assert same == pytest.approx(0.5, abs=0.1)


def test_a_matrix_is_folded_alike_in_blocks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = adapter(tmp_path / "a", 750, seed=1)
    once = weights(torch.bfloat16, path)
    # Blocks of seven rows, the last one incomplete.
    monkeypatch.setitem(folding._BLOCK, "cpu", 7 * COLUMNS + 5)
    blocks = weights(torch.bfloat16, path)
    # Matrix products differ in their last bit, which decides for hardly any element.
    assert float((once != blocks).float().mean()) < 1e-4


def test_a_delta_of_zero_changes_no_bit(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", steps=0, seed=1)
    made = model(torch.bfloat16)
    with torch.no_grad():
        made.get_submodule(NAME).weight[0, :3] = torch.tensor([0.0, -0.0, 3e38])
    before = made.get_submodule(NAME).weight.detach().clone()
    found = fold_adapters(made, [path, path])
    after = made.get_submodule(NAME).weight.detach()
    assert torch.equal(after.view(torch.int16), before.view(torch.int16))
    assert (found.newest.projection, found.newest.cosine) == (1, 1)


def test_a_delta_that_float32_cannot_hold_is_reported_as_lost(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", 94, seed=1, lora_alpha=1e-4)
    found = fold_adapters(model(torch.float32), [path])
    assert found.newest.projection < 0.5


# Adapters from elsewhere


def written(folder: Path, config: object = None, **tensors: torch.Tensor) -> Path:
    """Writes an adapter of rank 2 for a matrix of 6 x 4; by default a good one."""
    good = {
        f"base_model.model.{NAME}.lora_A.weight": torch.ones(2, 4),
        f"base_model.model.{NAME}.lora_B.weight": torch.ones(6, 2),
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
    changed = {f"base_model.model.{name.replace('__', '.')}": t for name, t in tensors.items()}
    save_file({**good, **changed} if "only" not in tensors else {}, folder / WEIGHTS)
    text = json.dumps({**settings, **config}) if isinstance(config, dict) else config
    (folder / "adapter_config.json").write_text(str(text or json.dumps(settings)))
    return folder


WEIGHTS = "adapter_model.safetensors"
A, B = (f"{NAME.replace('.', '__')}__lora_{half}__weight" for half in "AB")
NAN = torch.tensor([[1.0, math.nan], [0, 0]]).repeat(1, 2)


@pytest.mark.parametrize(
    ("config", "tensors", "told"),
    [
        ({"lora_alpha": math.inf}, {}, "no valid lora_alpha: Input should be a finite number"),
        ({"lora_alpha": math.nan}, {}, "no valid lora_alpha"),
        ({"lora_alpha": "many"}, {}, "no valid lora_alpha"),
        ({"lora_alpha": None}, {}, "no valid lora_alpha"),
        ({"r": 0}, {}, "no valid r"),
        ({"r": 4}, {}, "does not have two matrices of rank 4 for model.language_model"),
        ({"target_modules": 3}, {}, "no valid target_modules"),
        ({"alora_invocation_tokens": [1]}, {}, "has alora_invocation_tokens"),
        ("[]", {}, "is not a mapping"),
        ("{", {}, "cannot be read"),
        ("[" * 100_000, {}, "cannot be read"),
        ({}, {A: NAN}, "not finite"),
        ({}, {B: torch.full((6, 2), math.inf)}, "not finite"),
        ({}, {B: torch.ones(6, 2, dtype=torch.int8)}, "not finite"),
        ({}, {B: torch.ones(6, 3)}, "does not have two matrices of rank 2"),
        ({}, {A: torch.ones(3, 4)}, "does not have two matrices of rank 2"),
        ({}, {"other__lora_A__weight": torch.ones(2, 4)}, "two matrices of rank 2 for other"),
        ({}, {"only": torch.ones(1)}, "has no LoRA matrices"),
    ],
)
def test_a_broken_adapter_is_refused(
    tmp_path: Path, config: object, tensors: dict[str, torch.Tensor], told: str
) -> None:
    path = written(tmp_path, config, **tensors)
    with pytest.raises(UserError, match=told):
        read_adapter(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path) / WEIGHTS
    for left in (0, 7, 40, -1):
        data = written(tmp_path).joinpath(WEIGHTS).read_bytes()
        path.write_bytes(data[:left])
        with pytest.raises(UserError, match="cannot be read"):
            read_adapter(tmp_path)


def small(*names: str) -> Any:
    whole = torch.nn.ModuleDict()
    for name in names:
        inner: Any = whole
        *above, last = name.split(".")
        for part in above:
            if part not in inner:
                inner[part] = torch.nn.ModuleDict()
            inner = inner[part]
        inner[last] = torch.nn.Linear(4, 6, bias=False)
    whole.config = SimpleNamespace(model_type="llava")
    return whole


@pytest.mark.parametrize("other", ["model.vision_tower.up_proj", "model.projector.up", "lm_head"])
def test_only_the_language_model_is_changed(tmp_path: Path, other: str) -> None:
    model = small(NAME, other)
    halves = {"A": torch.ones(2, 4), "B": torch.ones(6, 2)}
    more = {f"{other.replace('.', '__')}__lora_{half}__weight": t for half, t in halves.items()}
    with pytest.raises(UserError, match=f"changes {other}, which is not a linear layer of the"):
        fold_adapters(model, [written(tmp_path, **more)])
    fold_adapters(model, [written(tmp_path)])


def test_a_layer_that_is_not_linear_is_not_changed(tmp_path: Path) -> None:
    model = small(NAME)
    model.get_submodule(NAME.rpartition(".")[0])["up_proj"] = torch.nn.Embedding(6, 4)
    with pytest.raises(UserError, match="is not a linear layer"):
        fold_adapters(model, [written(tmp_path)])


def test_finite_matrices_whose_product_is_not_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, **{A: torch.full((2, 4), 1e30), B: torch.full((6, 2), 1e30)})
    with pytest.raises(UserError, match="add numbers to the weights that are not finite"):
        fold_adapters(small(NAME), [path])


TYPES = (torch.bfloat16, torch.float16)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(
    lambda number: number == 0 or abs(number) >= 2.0**-100
)


def neighbours(number: float, dtype: torch.dtype) -> tuple[float, float]:
    """The nearest values of a type at or below, and at or above, a number within its range."""
    nearest = torch.tensor(number).to(dtype)
    found = [float(nearest)]
    for step in (-1, 1):
        bits = nearest.view(torch.int16) + step
        found.append(float(bits.view(dtype)) if nearest != 0 else step * 2.0**-24)
    return (
        max(each for each in found if each <= number),
        min(each for each in found if each >= number),
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@given(number=NUMBERS, index=st.integers(0, 2**31 - 2))
def test_a_number_becomes_one_of_its_two_neighbours(
    dtype: torch.dtype, number: float, index: int
) -> None:
    largest = torch.finfo(dtype).max
    found = float(stochastic_round(torch.tensor([number]), dtype, "a", index))
    if abs(number) >= largest:
        assert found == math.copysign(largest, number)
    else:
        assert found in neighbours(number, dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@given(number=NUMBERS, index=st.integers(0, 2**31 - 2))
def test_what_the_type_represents_stays(dtype: torch.dtype, number: float, index: int) -> None:
    largest = torch.finfo(dtype).max
    exact = torch.tensor([number]).clamp(-largest, largest).to(dtype)
    found = stochastic_round(exact.float(), dtype, "a", index)
    assert torch.equal(found.view(torch.int16), exact.view(torch.int16))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@given(number=NUMBERS, other=NUMBERS, index=st.integers(0, 2**31 - 2))
def test_a_larger_number_is_never_rounded_to_a_smaller_one(
    dtype: torch.dtype, number: float, other: float, index: int
) -> None:
    low, high = (
        float(stochastic_round(torch.tensor([each]), dtype, "a", index))
        for each in sorted((number, other))
    )
    assert low <= high


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("number", [0.02, -1.003, 3e-6, 0.9999])
def test_the_mean_over_elements_is_the_number(dtype: torch.dtype, number: float) -> None:
    count = 2**18
    found = stochastic_round(torch.full((count,), number), dtype, "a").double()
    below, above = neighbours(torch.tensor(number).item(), dtype)
    # The mean of N such draws is off by at most half a step / sqrt(N); five times that here.
    assert float(found.mean()) == pytest.approx(number, abs=2.5 * (above - below) / count**0.5)


def test_neighbouring_elements_and_matrices_round_independently() -> None:
    values = torch.full((2**18,), 1 + 2.0**-8)
    first, second = (
        (stochastic_round(values, torch.bfloat16, name) > 1).double() - 0.5 for name in ("a", "b")
    )
    for left, right in ((first[1:], first[:-1]), (first[1024:], first[:-1024]), (first, second)):
        # The mean of N products of +-0.25 has a standard deviation of 0.25 / sqrt(N).
        assert abs(float((left * right).mean())) < 5 * 0.25 / len(left) ** 0.5


def test_float32_is_not_rounded() -> None:
    values = torch.tensor([0.1, -1e-30, 3e38])
    assert torch.equal(stochastic_round(values, torch.float32, "a"), values)


def test_the_numbers_of_a_matrix_never_change() -> None:
    # Kept runs would fold into other weights. Worked out with Python's integers:
    # x = index * (seed | 1) + (seed >> 32) mod 2^32, then lowbias32; the top 16 bits.
    def fraction(index: int) -> float:
        seed = stable_hash(NAME)
        x = (index * (seed | 1) + (seed >> 32)) % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return ((x ^ x >> 16) >> 16) / 2**16

    found = folding._fractions(NAME, 5000, 100, 16, "cpu").tolist()
    assert found == [fraction(index) for index in range(5000, 5100)]
