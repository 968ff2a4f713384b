"""LoRA adapters on disk, and folding them into a model's weights so that small deltas survive.

A round of DPO moves a weight by a fraction of the spacing of bfloat16. Rounding to the nearest
value then loses most of the round, so weights below float32 are rounded stochastically: up or down
with probabilities that keep the expected value. The random number of an element depends only on
the name of its matrix and its index (reconstruction). So every process folds a policy into the
same weights, and an element that has crossed its threshold in one round stays there in the next:
rounds add up.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from srccore import storage
from srccore.errors import UserError
from srccore.hashing import stable_hash
from srccore.models.families import in_language_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Adapter", "Folding", "Share", "fold_adapters", "read_adapter", "stochastic_round"]

# The settings with which an adapter can be folded as scale * B @ A.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
}

_TRAIN_PLAIN = "Train a plain LoRA adapter on the language model's linear layers."

_BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Elements folded at a time: on a CPU they fit into its cache, on a GPU temporaries stay small."""


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter as it is stored on disk."""

    scale: float
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """By module name: A of shape (rank, inputs) and B of shape (outputs, rank)."""
    target_modules: str | list[str]


@dataclass(frozen=True)
class Share:
    """How much of a delta is in the weights after rounding, over all folded matrices together.

    A delta of zero loses nothing: both are 1.
    """

    projection: float
    """``<kept, delta> / <delta, delta>``: 1 means that the delta is there in full, on average."""
    cosine: float
    """Between kept and delta. Noise of rounding lowers it even where nothing is lost."""


@dataclass(frozen=True)
class Folding:
    """How well adapters were folded into a model's weights."""

    total: Share
    """Of all adapters together."""
    newest: Share
    """Of the last adapter: the weights with it, minus the weights without it."""


class _Settings(BaseModel):
    """What of ``adapter_config.json`` decides what an adapter adds."""

    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    target_modules: str | list[str]


def read_adapter(path: str | Path) -> Adapter:
    """Reads a PEFT adapter folder.

    Args:
        path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the URI
            of one.

    Returns:
        The adapter, on the CPU.

    Raises:
        UserError: A file is missing or damaged, a number is not finite, or the adapter is more than
            plain LoRA on linear layers.
    """
    folder = storage.fetch(str(path)) if storage.is_remote(str(path)) else Path(path)
    config, tensors = _read_files(folder)
    for name, allowed in _PLAIN_LORA.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"The adapter {folder} has {name} = {_short(config[name])}, which cannot be "
                "folded.",
                _TRAIN_PLAIN,
            )
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"The adapter_config.json of {folder} has no valid {name}: {first['msg']}.",
            _TRAIN_PLAIN,
        ) from None
    pairs = _pairs(folder, tensors, settings.r)
    scale = settings.lora_alpha / settings.r ** (0.5 if settings.use_rslora else 1)
    return Adapter(scale=scale, pairs=pairs, target_modules=settings.target_modules)


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        if not isinstance(config, dict):
            raise ValueError("adapter_config.json is not a mapping")
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"The adapter {folder} cannot be read ({error}).",
            "Pass a folder with adapter_config.json and adapter_model.safetensors.",
        ) from None
    return config, tensors


def _pairs(folder: Path, tensors: dict[str, Tensor], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Checks an adapter's tensors, and pairs A and B of each module."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, half = key.removeprefix("base_model.model.").rpartition(".lora_")
        if half not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise UserError(
                f"The adapter {folder} has {_short(key)}, which is not a LoRA matrix of a linear "
                "layer.",
                _TRAIN_PLAIN,
            )
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise UserError(
                f"The adapter {folder} has numbers in {key} that are not finite.",
                "Use an earlier adapter, or train it again with a lower learning rate.",
            )
        halves.setdefault(module, {})[half[0]] = tensor
    pairs = {module: (half.get("A"), half.get("B")) for module, half in halves.items()}
    found = {}
    for module, (a, b) in pairs.items():
        if a is None or b is None or not a.shape[0] == b.shape[1] == rank:
            raise UserError(
                f"The adapter {folder} does not have two matrices of rank {rank} for {module}.",
                "Copy it again from where it was trained.",
            )
        found[module] = (a, b)
    if not found:
        raise UserError(f"The adapter {folder} has no LoRA matrices.", _TRAIN_PLAIN)
    return found


def _short(value: object) -> str:
    return repr(value)[:100]


def fold_adapters(model: Any, adapters: Sequence[str | Path]) -> Folding:
    """Adds adapters to a model's weights, in place.

    The deltas of all adapters are summed in float32 and rounded once, with `stochastic_round`
    (reconstruction). A weight whose deltas add up to exactly zero does not change.

    Args:
        model: The base model.
        adapters: Adapter folders, in the order in which they were trained.

    Returns:
        How much of the deltas is in the weights.

    Raises:
        UserError: An adapter is not plain LoRA, does not fit the model, changes more than the
            linear layers of its language model, or adds numbers that are not finite.
    """
    import torch

    read = [(path, read_adapter(path)) for path in adapters]
    modules = dict(model.named_modules())
    total, newest = _Products(), _Products()
    with torch.no_grad():
        for name in dict.fromkeys(name for _, adapter in read for name in adapter.pairs):
            module = modules.get(name)
            weight: Any = getattr(module, "weight", None)
            earlier, last = [], None
            for number, (path, adapter) in enumerate(read, start=1):
                if name not in adapter.pairs:
                    continue
                a, b = adapter.pairs[name]
                if weight is None or weight.shape != (b.shape[0], a.shape[1]):
                    raise UserError(
                        f"The adapter {path} does not fit the base model at {name}.",
                        "Use the base model that the adapter was trained on.",
                    )
                if not (isinstance(module, torch.nn.Linear) and in_language_model(model, name)):
                    raise UserError(
                        f"The adapter {path} changes {name}, which is not a linear layer of the "
                        "language model.",
                        _TRAIN_PLAIN,
                    )
                delta = _Delta(
                    adapter.scale,
                    a.to(weight.device, torch.float32),
                    b.to(weight.device, torch.float32),
                )
                if number < len(read):
                    earlier.append(delta)
                else:
                    last = delta
            _fold(weight, name, earlier, last, total, newest)
    folding = Folding(total=total.share(), newest=newest.share())
    if not all(map(math.isfinite, (folding.total.projection, folding.total.cosine))):
        raise UserError(
            f"The adapters {', '.join(map(str, adapters))} add numbers to the weights that are not "
            "finite.",
            "Use earlier adapters, or train them again with a lower learning rate.",
        )
    return folding


@dataclass(frozen=True)
class _Delta:
    """What one adapter adds to one matrix, in float32 and on the matrix's device."""

    scale: float
    a: Tensor
    b: Tensor

    def of(self, rows: slice) -> Tensor:
        return self.scale * (self.b[rows] @ self.a)


class _Products:
    """Sums, in float64, the products of which a `Share` is made."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def add(self, kept: Tensor, delta: Tensor) -> None:
        import torch

        pairs = ((kept, delta), (delta, delta), (kept, kept))
        products = [(left * right).sum(dtype=torch.float64) for left, right in pairs]
        # Not read yet: that would wait for the device after every block.
        self._blocks.append(torch.stack(products))

    def share(self) -> Share:
        import torch

        if not self._blocks:
            return Share(projection=1.0, cosine=1.0)
        both, delta, kept = torch.stack(self._blocks).sum(0).tolist()
        if delta == 0:
            return Share(projection=1.0, cosine=1.0)
        return Share(
            projection=both / delta, cosine=both / math.sqrt(delta * kept) if kept else 0.0
        )


def _fold(
    weight: Tensor,
    name: str,
    earlier: Sequence[_Delta],
    last: _Delta | None,
    total: _Products,
    newest: _Products,
) -> None:
    """Folds the deltas of one matrix, and adds what became of them to the products."""
    import torch

    for rows, first in _blocks(weight):
        base = weight[rows].float()
        zero = torch.zeros_like(base)
        before = sum((delta.of(rows) for delta in earlier), start=zero)
        added = last.of(rows) if last else zero
        delta = before + added
        folded = stochastic_round(base + delta, weight.dtype, name, first)
        total.add(folded.float() - base, delta)
        if last:
            start = base
            if earlier:
                start = stochastic_round(base + before, weight.dtype, name, first).float()
            newest.add(folded.float() - start, added)
        # A sum with zero can still change a bit: -0 becomes 0.
        weight[rows] = torch.where(delta == 0, weight[rows], folded)


def _blocks(weight: Tensor) -> Iterator[tuple[slice, int]]:
    """Yields blocks of rows, each with the index of its first element."""
    rows, columns = weight.shape
    size = max(1, _BLOCK.get(weight.device.type, _BLOCK["cuda"]) // columns)
    for start in range(0, rows, size):
        yield slice(start, start + size), start * columns


def stochastic_round(values: Tensor, dtype: torch.dtype, name: str, first: int = 0) -> Tensor:
    """Rounds to one of the two nearest values of a type, with the right expected value.

    A value is rounded away from zero if the fraction of the step that it has gone exceeds a number
    between 0 and 1 that depends only on ``name`` and the element's index. So the result never falls
    when a value rises, values that the type represents stay as they are, and a CPU rounds like a
    GPU. Values beyond the type's largest become the largest. bfloat16 keeps less than eight bits of
    values below 2^-100.

    Args:
        values: Float32 values, of any shape.
        dtype: The type to round to; float32 and wider need no rounding.
        name: The name of the matrix.
        first: The index of the first of the values in the matrix, less than 2^31.

    Returns:
        The values as ``dtype``.
    """
    import torch

    if dtype.itemsize >= values.dtype.itemsize:
        return values.to(dtype)
    info = torch.finfo(dtype)
    values = values.clamp(info.min, info.max)
    # The power of two at or below a value: its exponent bits alone.
    power = (values.view(torch.int32) & 0x7F800000).view(torch.float32)
    # The spacing of the type there; the limit keeps the spacing of bfloat16 a normal number.
    step = power.clamp_(min=max(info.smallest_normal, 2.0**-100)).mul_(info.eps)
    # As many bits as the type lacks. With more, adding them to a whole number of steps could round.
    bits = 23 + round(math.log2(info.eps))
    fractions = _fractions(name, first, values.numel(), bits, values.device).view(values.shape)
    steps = values.abs().div_(step).add_(fractions).floor_()
    return steps.mul_(step).copysign_(values).to(dtype)


def _fractions(name: str, first: int, count: int, bits: int, device: Any) -> Tensor:
    """Pseudo-random multiples of ``2**-bits`` in [0, 1) for elements of a matrix.

    Hashes the index of an element (the lowbias32 hash, public domain), in integer operations that
    wrap around in the same way on every device. Every matrix walks through the hash's inputs with
    a stride and an offset of its own.
    """
    import torch

    seed = stable_hash(name)
    x = torch.arange(first, first + count, dtype=torch.int32, device=device)
    x.mul_(_int32(seed | 1)).add_(_int32(seed >> 32))
    # `>>` copies the sign bit, so it is masked out.
    x ^= (x >> 16) & 0xFFFF
    x *= _int32(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    top: Tensor = (x >> (32 - bits)) & (2**bits - 1)
    return top.float().mul_(2.0**-bits)


def _int32(number: int) -> int:
    """The signed number with the same lowest 32 bits."""
    return (number & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
