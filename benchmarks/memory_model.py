"""How much GPU memory each stage of a preset takes at its peak, by arithmetic over shapes.

    python benchmarks/memory_model.py                       # all presets for a GPU
    python benchmarks/memory_model.py --preset llava-1.5-7b --set dpo.batch_size=4

A table per preset has, for each stage that runs a model, the parts of the peak in GiB, and the
largest batch that fits a card of 80, 48 or 40 GB. ``tests/unit/benchmarks/test_memory_model.py``
compares the model with measured peaks. It counts tensors whose size grows with weights, tokens or
vocabulary. It leaves out masks of one dimension, positions, optimiser scalars, CUDA's context and
what the allocator cannot use; `RESERVE` and `USABLE` are for those.

Assumptions: decoders in the style of Llama and Qwen2 (gated MLP, rotary positions, RMSNorm),
attention that keeps no scores (SDPA), LoRA on all linear layers of the decoder's blocks, TRL's
head, which never has all logits, and AdamW without temporary copies of its states (fused).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srccore.config import LoraSettings, OptimizerSettings, RunConfig, load_config, preset_names

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CARDS = {80: 79.2, 48: 44.4, 40: 39.4}
"""GiB that CUDA offers, by the GB that a card is sold with (H100, L40S, A100)."""
RESERVE = 1.0
"""GiB of CUDA's context, kernels and workspaces, which torch's allocator does not count."""
USABLE = 0.92
"""Share of the rest that tensors can use: the allocator's blocks leave gaps."""
BLOCK = 32
"""Tokens by which the engine's caches of responses grow (`srccore.models.shared_prefix`)."""
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768
"""A tile of TRL's fused head."""
SAMPLING = 40
"""Bytes for each logit of a row that is drawn: its float32 logits (now, and those that belong to
the previous sentence), a copy without banned ids and one at the temperature, and the softmax and
its sum in float64."""
GREEDY = 16
"""Bytes for each logit of a row whose best token is taken."""

Device = Literal["cuda", "cpu"]
Parts = dict[str, float]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Image:
    """An image as a model sees it.

    Attributes:
        tokens: Of the prompt.
        patches: Positions that the vision tower works on, over all tiles.
    """

    tokens: int
    patches: int


NO_IMAGE = Image(tokens=0, patches=0)


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on.

    Attributes:
        hidden: Width of the decoder.
        intermediate: Width of its MLP.
        layers: Its blocks.
        queries: Width of all query heads of a layer.
        keys: Width of all key heads of a layer, the same as of its values.
        vocabulary: Rows of the embedding.
        tied: Whether the head is the embedding.
        image: A large image.
        vision_hidden: Width of the vision tower; 0 without one.
        vision_intermediate: Width of its MLP.
        vision_layers: Its blocks.
        vision_gated: Whether its MLP has three matrices instead of two.
        vision_states: Outputs of its layers that it keeps.
    """

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool = False
    image: Image = NO_IMAGE
    vision_hidden: int = 0
    vision_intermediate: int = 0
    vision_layers: int = 0
    vision_gated: bool = False
    vision_states: int = 1

    @property
    def is_grouped(self) -> bool:
        """Whether several queries share keys and values."""
        return self.queries > self.keys

    @property
    def parameters(self) -> int:
        """The number of weights, without biases, norms and projectors of under one percent."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        decoder = self.layers * (attention + 3 * self.hidden * self.intermediate)
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return decoder + self.vision_parameters + embeddings

    @property
    def vision_parameters(self) -> int:
        """Of these, the weights of the vision tower."""
        matrices = 3 if self.vision_gated else 2
        return self.vision_layers * (
            4 * self.vision_hidden**2 + matrices * self.vision_hidden * self.vision_intermediate
        )

    def adapter(self, rank: int) -> int:
        """The number of weights of a LoRA adapter."""
        attention = 2 * (self.hidden + self.queries) + 2 * (self.hidden + self.keys)
        return rank * self.layers * (attention + 3 * (self.hidden + self.intermediate))

    def cache(self, width: int) -> int:
        """Bytes of keys and values of a token, with ``width`` bytes for each number."""
        return 2 * self.layers * self.keys * width


def shape_of(config: Mapping[str, Any], image: Image = NO_IMAGE) -> Shape:
    """Reads a shape from a checkpoint's configuration.

    Args:
        config: ``config.json`` of a text model or of a vision-language model, as a mapping.
        image: How large an image is for it.

    Returns:
        The shape.
    """
    text = config.get("text_config", config)
    vision = config.get("vision_config", {})
    heads = text["num_attention_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    layers = vision.get("num_hidden_layers", vision.get("depth", 0))
    return Shape(
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        queries=width * heads,
        keys=width * text.get("num_key_value_heads", heads),
        vocabulary=text["vocab_size"],
        tied=config.get("tie_word_embeddings", False),
        image=image,
        vision_hidden=vision.get("hidden_size", 0),
        vision_intermediate=vision.get("intermediate_size", 0),
        vision_layers=layers,
        vision_gated=config.get("model_type", "").startswith("qwen"),
        # LLaVA reads the last layer but one, so its tower returns the outputs of all.
        vision_states=layers + 1 if "llava" in config.get("model_type", "") else 1,
    )


def _decoder(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


def _tower(hidden: int, intermediate: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
    }


SHAPES: dict[str, Shape] = {
    "llava-hf/llava-1.5-7b-hf": shape_of(
        {
            "model_type": "llava",
            "text_config": _decoder(4096, 11008, 32, 32, 32, 32064),
            "vision_config": _tower(1024, 4096, 24),
        },
        Image(tokens=576, patches=577),
    ),
    # Four tiles and the whole image; with a new line after each of at most 48 rows.
    "llava-hf/llama3-llava-next-8b-hf": shape_of(
        {
            "model_type": "llava_next",
            "text_config": _decoder(4096, 14336, 32, 32, 8, 128320),
            "vision_config": _tower(1024, 4096, 24),
        },
        Image(tokens=2928, patches=5 * 577),
    ),
    # An image of 1280 x 960: squares of 28 pixels are a token, of 14 pixels a patch.
    "Qwen/Qwen2.5-VL-7B-Instruct": shape_of(
        {
            "model_type": "qwen2_5_vl",
            "text_config": _decoder(3584, 18944, 28, 28, 4, 152064),
            "vision_config": _tower(1280, 3420, 32),
        },
        Image(tokens=46 * 34, patches=4 * 46 * 34),
    ),
    # 4 x 4 tiles of 512 pixels and the whole image: 64 tokens each, and marks of rows and columns.
    "HuggingFaceTB/SmolVLM-500M-Instruct": shape_of(
        {
            "model_type": "idefics3",
            "tie_word_embeddings": False,
            "text_config": _decoder(960, 2560, 32, 15, 5, 49280),
            "vision_config": _tower(768, 3072, 12),
        },
        Image(tokens=17 * 64 + 60, patches=17 * 1024),
    ),
    "Qwen/Qwen2.5-1.5B": shape_of(
        {"tie_word_embeddings": True, **_decoder(1536, 8960, 28, 12, 2, 151936)}
    ),
}
"""The checkpoints of the presets, by hub id."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest text of a batch.

    Attributes:
        prompt: Of a question with the chat template around it, without the image.
        response: Of a rationale with its answer. A search may write more; it rarely does.
        rating: Of a prompt of R-Scorer: question, reference, facts and two responses.
    """

    prompt: int = 128
    response: int = 256
    rating: int = 1024


LENGTHS = Lengths()


def parts(
    config: RunConfig,
    policy: Shape,
    scorer: Shape,
    lengths: Lengths = LENGTHS,
    device: Device = "cuda",
) -> dict[str, Parts]:
    """Computes what the peak of each stage consists of.

    Args:
        config: The run, with its batches and dtypes.
        policy: The vision-language model.
        scorer: R-Scorer.
        lengths: The longest texts.
        device: ``cpu`` for trainings in float32, as they are there.

    Returns:
        Bytes by stage and part, for one process that does the whole batch.
    """
    width = BYTES[config.model.dtype]
    train = width if device == "cuda" else 4
    search, most = config.search, config.search.max_sentences * config.search.max_sentence_tokens
    response = min(lengths.response, most)
    length = policy.image.tokens + lengths.prompt
    searched = max(1, search.batch_tokens // length)
    answered = max(1, config.evaluation.batch_tokens // length)
    weights: Parts = {"weights": policy.parameters * width}
    found = {
        "tune-rationale": _training(
            policy, config.rationale, config.rationale.lora, train, 1, length, lengths, device
        ),
        "sample-responses": weights
        | _sampling(
            policy,
            width,
            prompts=searched,
            rows=searched * config.annotation.candidates,
            length=length,
            tokens=response,
            logit=SAMPLING,
        ),
        "train-scorer": _training(
            scorer,
            config.scorer,
            config.scorer.lora,
            BYTES[config.rating_model.dtype] if config.scorer.lora and device == "cuda" else 4,
            1,
            lengths.rating,
            Lengths(response=1),
            device,
        ),
        # The beams of the sentence before keep their caches until the next are chosen.
        "search-candidates": weights
        | _sampling(
            policy,
            width,
            prompts=searched,
            rows=searched * search.width * search.branch,
            length=length,
            tokens=response,
            logit=SAMPLING,
            kept=max(0, response - search.max_sentence_tokens),
        ),
        "score-candidates": {
            # R-Scorer is read in float32: bfloat16 moves its ratings.
            "weights": scorer.parameters * 4.0,
            "activations": _forward(scorer, 1, config.scoring.batch_tokens, 4),
            # The prompts of a sample add a response each; their logits, and a copy to sum.
            "logits": max(1, config.scoring.batch_tokens // lengths.response)
            * scorer.vocabulary
            * 2.0
            * 4,
        },
        "train-dpo": _training(
            policy, config.dpo, config.dpo.lora, train, 2, length, lengths, device
        ),
        "evaluate": weights
        | _sampling(
            policy,
            width,
            prompts=answered,
            rows=answered,
            length=length,
            # Greedy responses may go round in circles until they are cut.
            tokens=config.evaluation.max_tokens,
            logit=GREEDY,
        ),
    }
    return found


def peaks(
    config: RunConfig,
    policy: Shape,
    scorer: Shape,
    lengths: Lengths = LENGTHS,
    device: Device = "cuda",
) -> dict[str, float]:
    """Computes the peak of each stage.

    Args:
        config: The run.
        policy: The vision-language model.
        scorer: R-Scorer.
        lengths: The longest texts.
        device: ``cpu`` for trainings in float32, as they are there.

    Returns:
        Bytes by stage.
    """
    found = parts(config, policy, scorer, lengths, device)
    return {stage: sum(each.values()) for stage, each in found.items()}


def _sampling(
    shape: Shape,
    width: int,
    *,
    prompts: int,
    rows: int,
    length: int,
    tokens: int,
    logit: int,
    kept: int = 0,
) -> Parts:
    """The parts of drawing responses: encoding the prompts, or the last step of decoding.

    Args:
        shape: The model.
        width: Bytes of a number.
        prompts: Prompts that are encoded together, each with a cache of its own.
        rows: Responses that are drawn at the same time.
        length: Tokens of a prompt.
        tokens: Tokens of a response.
        logit: Bytes for each logit.
        kept: Tokens of the responses that these continue, whose caches are still there.
    """
    cache = prompts * length * shape.cache(width)
    encoding = max(
        _vision(shape, prompts, width),
        _forward(shape, prompts, length, width) + prompts * shape.vocabulary * (width + 4.0),
    )
    blocks = math.ceil((tokens - kept) / BLOCK)
    room = kept + blocks * BLOCK
    # A cache that grows is copied layer by layer.
    copied = (room - BLOCK) / shape.layers if blocks > 1 else 0
    responses = rows * (kept + room + copied) * shape.cache(width)
    logits = rows * shape.vocabulary * float(logit)
    if encoding > responses + logits:
        return {"prompt cache": cache, "activations": encoding}
    return {"prompt cache": cache, "response cache": responses, "logits": logits}


def _forward(shape: Shape, rows: int, length: int, width: int) -> float:
    """What a layer has at once without gradients, with embeddings and features, each twice."""
    numbers = max(
        # Two matrices' outputs and their product, on top of the residual stream.
        2 * shape.hidden + 3 * shape.intermediate,
        # Queries, keys and values with and without rotation, repeated keys, and the result.
        3 * shape.hidden + 4 * shape.queries + 4 * shape.keys,
    )
    embedded = 2 * shape.hidden * (1 + shape.image.tokens / length)
    return rows * length * (numbers + embedded) * width + _mask(rows, length, width)


def _mask(rows: int, length: int, width: int) -> float:
    """The causal mask of padded rows: as truth values, and added to the scores of a layer."""
    return rows * length**2 * (1.0 + width) if rows > 1 else 0.0


def _vision(shape: Shape, images: int, width: int) -> float:
    """What the vision tower has at once; it is never trained."""
    numbers = (shape.vision_states + 3) * shape.vision_hidden + 2 * shape.vision_intermediate
    return images * shape.image.patches * float(numbers) * width


def _training(
    shape: Shape,
    config: OptimizerSettings,
    lora: LoraSettings | None,
    width: int,
    responses: int,
    prompt: int,
    lengths: Lengths,
    device: Device,
) -> Parts:
    """The parts of an optimiser step.

    Args:
        shape: The model.
        config: The stage's section.
        lora: The adapter; None trains all weights.
        width: Bytes of a number of the model.
        responses: Responses of a sample: DPO has two, in one row with their prompt.
        prompt: Tokens of a prompt.
        lengths: Gives the tokens of a response.
        device: On a GPU, matrices are multiplied in 16 bits where weights have 32.
    """
    mixed = device == "cuda"
    trained = shape.adapter(lora.rank) if lora else shape.parameters
    rows = config.batch_size
    length = prompt + responses * lengths.response
    tokens = rows * length
    # On a CPU, TRL's head reads all positions; of a policy, only those of responses reach it.
    predicted = rows * responses * lengths.response if mixed or shape.vision_layers else tokens
    # Two responses that must not see each other need a mask of their own, which all layers share.
    mask = rows * length**2 * float(width) if responses > 1 else _mask(rows, length, width)
    saved, working = _layer(shape, width, mixed, lora)
    inputs = shape.hidden * (width if lora else 4)
    if config.gradient_checkpointing:
        # A layer's input is its checkpoint.
        layers, checkpoints, saved = 1, shape.layers * inputs, saved - inputs
    else:
        layers, checkpoints = shape.layers, 0
    head = _head(shape, predicted, width, mixed, lora is None)
    backward = tokens * float(layers * saved + working) + mask
    # Without checkpointing, all that is saved is there when the head works.
    at_head = head + (0 if config.gradient_checkpointing else tokens * float(layers * saved))
    return {
        "weights": shape.parameters * float(width) if lora else 0.0,
        # Weights in float32 (an adapter's are always), gradients, and AdamW's two averages.
        "states": trained * 16.0,
        # Autocast keeps its copies of float32 weights until the end of the forward pass.
        "casts": trained * 2.0 if mixed else 0.0,
        "checkpoints": tokens * float(checkpoints + inputs),
        "activations": max(backward, at_head, _vision(shape, rows, width)),
    }


def _layer(shape: Shape, width: int, mixed: bool, lora: LoraSettings | None) -> tuple[float, float]:
    """Bytes of a token that a layer saves for its backward pass, and that this pass works with."""
    hidden, inner = shape.hidden, shape.intermediate
    # With a mask, keys and values are repeated for the queries that share them.
    attention = 2 * shape.queries + 2 * (shape.queries if shape.is_grouped else shape.keys)
    adapted = 7 * lora.rank if lora else 0
    if not mixed:
        # Both norms' inputs and outputs; what attention reads and returns; the gate before and
        # after its activation, the other matrix' output, and their product.
        saved = 4 * hidden + attention + 4 * inner + adapted
        return saved * 4.0, (hidden + 2 * inner) * 4.0
    # The norms work in float32. PEFT casts the input of each matrix to float32 for its adapter,
    # and autocast back to 16 bits, which is saved: seven copies.
    copies = 5 * hidden + shape.queries + inner
    stream = hidden * (1 if lora else 2)
    saved = 2 * (4 * hidden) + 2 * (copies + stream + attention + 3 * inner + adapted)
    # Gradients of the product, from the matrix and through the casts from its adapter.
    return float(saved), float(2 * hidden + inner * (2 + 2 + 4))


def _head(shape: Shape, tokens: int, width: int, mixed: bool, is_trained: bool) -> float:
    """What TRL's head has at once: a tile of logits, and gradients in float32."""
    tile = min(tokens, HEAD_TOKENS)
    columns = min(shape.vocabulary, HEAD_COLUMNS)
    gradient = tokens * shape.hidden * (4.0 + width)
    if is_trained:
        gradient += shape.vocabulary * shape.hidden * 4.0
    # Without Triton, the tile is folded in steps, each with a copy of it.
    folding = 0.0 if mixed else tile * columns * 4.0 * 4
    return tile * HEAD_COLUMNS * float(2 if mixed else width) + folding + gradient


def fits(peak: float, card: int) -> bool:
    """Whether a peak in bytes fits a card, named by the GB that it is sold with."""
    return peak <= (CARDS[card] - RESERVE) * USABLE * GIB


BATCHES: dict[str, tuple[str, str]] = {
    "tune-rationale": ("rationale", "batch_size"),
    "sample-responses": ("search", "batch_tokens"),
    "train-scorer": ("scorer", "batch_size"),
    "search-candidates": ("search", "batch_tokens"),
    "score-candidates": ("scoring", "batch_tokens"),
    "train-dpo": ("dpo", "batch_size"),
    "evaluate": ("evaluation", "batch_tokens"),
}
"""The section and the field that has the batch of a stage."""
LARGEST = {"batch_size": 512, "batch_tokens": 2**17}


def largest_batch(stage: str, card: int, config: RunConfig, compute: Callable[..., float]) -> int:
    """Finds the largest batch of a stage that fits a card, a power of two; 0 if none does.

    Args:
        stage: The stage.
        card: The card's GB.
        config: The run.
        compute: Returns the peak of the stage for a configuration, in bytes.
    """
    name, field = BATCHES[stage]
    section = getattr(config, name)
    limit = LARGEST[field]
    if isinstance(section, OptimizerSettings):
        limit = section.batch_size * section.gradient_accumulation_steps
    best = 0
    for batch in (2**power for power in range(int(math.log2(limit)) + 1)):
        changed = section.model_copy(update={field: batch})
        if fits(compute(config.model_copy(update={name: changed})), card):
            best = batch
    return best


def table(config: RunConfig, policy: Shape, scorer: Shape, lengths: Lengths = LENGTHS) -> str:
    """Writes the table of a preset, in Markdown.

    Args:
        config: The run.
        policy: The vision-language model.
        scorer: R-Scorer.
        lengths: The longest texts.
    """
    lines = [
        f"{config.name}: {policy.parameters / 1e9:.2f} billion weights, "
        f"{policy.image.tokens + lengths.prompt} tokens of prompt, {lengths.response} of response",
        "",
        "| stage | batch | GiB | of which | " + " | ".join(f"{c} GB" for c in CARDS) + " |",
        "| --- | ---: | ---: | --- | " + " | ".join("---:" for _ in CARDS) + " |",
    ]
    for stage, found in parts(config, policy, scorer, lengths).items():

        def compute(changed: RunConfig, stage: str = stage) -> float:
            return peaks(changed, policy, scorer, lengths)[stage]

        shown = ", ".join(f"{name} {n / GIB:.1f}" for name, n in found.items() if n > 0.05 * GIB)
        name, field = BATCHES[stage]
        batch = getattr(getattr(config, name), field)
        largest = [str(largest_batch(stage, card, config, compute) or "-") for card in CARDS]
        total = sum(found.values()) / GIB
        lines.append(f"| {stage} | {batch} | {total:.1f} | {shown} | {' | '.join(largest)} |")
    return "\n".join(lines)


def _shape(path: str, image: Image) -> Shape:
    file = Path(path) / "config.json"
    if file.is_file():
        return shape_of(json.loads(file.read_text(encoding="utf-8")), image)
    return SHAPES[path]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--response", type=int, default=LENGTHS.response)
    parser.add_argument(
        "--image-tokens", type=int, default=576, help="for a checkpoint in a folder"
    )
    given = parser.parse_args()
    for name in given.preset or [name for name in preset_names() if name != "tiny"]:
        config = load_config(name, given.overrides)
        image = Image(given.image_tokens, given.image_tokens)
        policy, scorer = (
            _shape(model.path, image) for model in (config.model, config.rating_model)
        )
        print(table(config, policy, scorer, Lengths(response=given.response)), end="\n\n")


if __name__ == "__main__":
    main()
