"""How long each stage of a preset takes on a GPU, by arithmetic over counted work.

    python benchmarks/cost_model.py --preset llava-1.5-7b --gpu h100
    python benchmarks/cost_model.py --preset llava-1.5-7b --gpu a100 --response 150

Two steps, both explained in docs/cost.md. What a stage computes follows from the preset and from
how long prompts and responses are: the counters of `srccore.method.engine.Work`, which every
manifest has, too. How long that takes follows from the model's shape and from what the card can do:
floating point operations and bytes per second, and how fast kernels are started. The share of each
that is reached was measured for transformers (benchmarks/RESULTS.md); for vLLM it is assumed.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Literal

from memory_model import BYTES, SHAPES, Shape

from srccore.config import OptimizerSettings, RunConfig, load_config, preset_names
from srccore.method.engine import Work

Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class Card:
    """What a GPU could do at best.

    Attributes:
        flops: Floating point operations per second, dense, in bfloat16; in TF32, half as many.
        bandwidth: Bytes per second between memory and chip.
    """

    flops: float
    bandwidth: float


GPUS = {
    "h200": Card(989e12, 4.8e12),
    "h100": Card(989e12, 3.35e12),
    "a100": Card(312e12, 2.04e12),
    "l40s": Card(362e12, 0.864e12),
}
"""NVIDIA's data sheets (SXM cards of 80 GB; the L40S)."""
PREFILL, TRAINING, READING = 0.33, 0.25, 0.7
"""Share of `Card.flops` reached with prompts (measured: 0.32 and 0.35) and in training (0.21 and
0.27), and of `Card.bandwidth` when decoding (assumed)."""
KERNELS, LAUNCH = 53, 17e-6
"""Kernels of a decoder block in a decoding step, and seconds to start one, in transformers
(measured: 1,710 kernels for 32 blocks in 28.9 ms). vLLM replays a graph instead."""
IN_FLIGHT = 256
"""Responses that vLLM decodes together (assumed)."""


@dataclass(frozen=True)
class Texts:
    """Mean lengths, in tokens.

    Attributes:
        question: With the chat template, without the image.
        response: A rationale with its answer.
        rating: The part of a rating prompt that all pairs of a sample share.
    """

    question: int = 60
    response: int = 120
    rating: int = 220


TEXTS = Texts()


@dataclass(frozen=True)
class Job:
    """What a stage computes, and on which model.

    Attributes:
        stage: Its name.
        shape: The model.
        work: What it computes; for a training, prefilled tokens are those of one forward pass.
        context: Mean number of tokens that a decoded token attends to.
        passes: Forward passes' worth of operations per prefilled token.
        is_float32: Whether the model is read in float32, multiplied in TF32: R-Scorer.
        width: Bytes of a weight.
    """

    stage: str
    shape: Shape
    work: Work
    context: float = 0.0
    passes: float = 1.0
    is_float32: bool = False
    width: int = 2


def jobs(config: RunConfig, policy: Shape, scorer: Shape, texts: Texts = TEXTS) -> list[Job]:
    """Lists the stages of a run that use a GPU, each with the work of all rounds and shards.

    Args:
        config: The run.
        policy: The shape of the vision-language model.
        scorer: The shape of R-Scorer.
        texts: How long texts are.
    """
    prompt = policy.image.tokens + texts.question
    width = BYTES[config.model.dtype]
    context = prompt + texts.response / 2
    search, rounds = config.search, config.rounds

    def drawing(stage: str, samples: int, per_sample: float, rows: int, most: int) -> Job:
        """``rows`` responses of a sample are alive at a time, and ``per_sample`` tokens drawn."""
        batch = max(1, most // prompt)
        steps = math.ceil(samples / batch) * per_sample / rows
        return Job(
            stage,
            policy,
            Work(
                prompts=samples,
                image_encodings=samples,
                prefilled_tokens=samples * prompt,
                decoded_tokens=round(samples * per_sample),
                forward_passes=round(math.ceil(samples / batch) + steps),
            ),
            context,
            width=width,
        )

    def training(
        stage: str, settings: OptimizerSettings, samples: int, tokens: int, images: int
    ) -> Job:
        # A frozen weight has no gradient: forward, the gradient of activations, and forward again
        # under checkpointing. DPO reads the reference once, too.
        adapter = getattr(settings, "lora", None) is not None
        passes = (2 if adapter else 3) + settings.gradient_checkpointing
        if stage == "train-dpo" and config.dpo.reference == "computed":
            passes += min(1.0, 1 / settings.epochs)
        done = round(samples * settings.epochs)
        work = Work(
            prompts=done,
            image_encodings=done * images,
            prefilled_tokens=done * tokens,
            forward_passes=math.ceil(done / settings.batch_size),
        )
        return Job(stage, scorer if stage == "train-scorer" else policy, work, passes=passes)

    rows = search.width * search.branch
    count = search.candidates
    pairs = count * (count - 1) + 2 * count
    rated = rounds * search.samples
    rating = texts.rating + 2 * texts.response
    scored = texts.rating + (count + 1 + pairs) * texts.response
    return [
        training(
            "tune-rationale", config.rationale, config.rationale.samples, prompt + texts.response, 1
        ),
        drawing(
            "sample-responses",
            config.annotation.samples,
            config.annotation.candidates * texts.response,
            config.annotation.candidates,
            search.batch_tokens,
        ),
        training(
            "train-scorer",
            config.scorer,
            2
            * config.annotation.samples
            * (config.annotation.pairs + config.annotation.reference_pairs),
            rating,
            0,
        ),
        drawing("search-candidates", rated, rows * texts.response, rows, search.batch_tokens),
        Job(
            "score-candidates",
            scorer,
            # The shared part and each first response once; only the second is read for every pair.
            Work(
                prompts=rated * pairs,
                prefilled_tokens=rated * scored,
                forward_passes=math.ceil(rated * scored / config.scoring.batch_tokens),
            ),
            is_float32=True,
        ),
        # The prompt once for both responses.
        training("train-dpo", config.dpo, rated, prompt + 2 * texts.response, 1),
        drawing(
            "evaluate",
            (rounds + 1) * config.data.heldout,
            texts.response,
            1,
            config.evaluation.batch_tokens,
        ),
    ]


def seconds(job: Job, card: Card, engine: Engine = "transformers") -> dict[str, float]:
    """Predicts how long a stage takes on one card, without loading and without waiting for data.

    Args:
        job: The stage.
        card: The GPU.
        engine: What runs the model; trainings do not depend on it.

    Returns:
        Seconds for reading prompts (or training) and for decoding.
    """
    shape, work = job.shape, job.work
    images = 2.0 * shape.vision_parameters * shape.image.patches * work.image_encodings
    operations = 2.0 * _decoder_parameters(shape) * work.prefilled_tokens * job.passes + images
    share = TRAINING if job.passes > 1 else PREFILL
    peak = card.flops / 2 if job.is_float32 else card.flops
    found = {"prompts": operations / (peak * share)}
    if work.decoded_tokens:
        rows = IN_FLIGHT if engine == "vllm" else work.decoded_tokens / work.forward_passes
        found["decoding"] = (
            work.decoded_tokens
            / rows
            * step_seconds(shape, card, rows, job.context, job.width, engine)
        )
    return found


def step_seconds(
    shape: Shape, card: Card, rows: float, context: float, width: int, engine: Engine
) -> float:
    """Predicts the time of one decoding step: the slowest of three.

    Args:
        shape: The model.
        card: The GPU.
        rows: Responses that get a token.
        context: Tokens that each attends to.
        width: Bytes of a number.
        engine: transformers starts each kernel from the CPU.
    """
    decoder = _decoder_parameters(shape)
    read = decoder * width + rows * context * shape.cache(width)
    return max(
        read / (card.bandwidth * READING),
        2.0 * decoder * rows / (card.flops * PREFILL),
        KERNELS * shape.layers * LAUNCH if engine == "transformers" else 0.0,
    )


def _decoder_parameters(shape: Shape) -> int:
    """Of the blocks and the head: what a token is multiplied with."""
    embeddings = 0 if shape.tied else shape.vocabulary * shape.hidden
    return shape.parameters - shape.vision_parameters - embeddings


def table(config: RunConfig, gpu: str, engine: Engine, texts: Texts = TEXTS) -> str:
    """Writes the table of a preset, in Markdown."""
    card = GPUS[gpu]
    policy, scorer = (SHAPES[model.path] for model in (config.model, config.rating_model))
    lines = [
        f"{config.name}, {config.rounds} rounds on one {gpu.upper()}, {engine}, responses of "
        f"{texts.response} tokens",
        "",
        "| stage | images | prompt tokens | decoded tokens | passes | prompts, h | decoding, h |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    total = 0.0
    for job in jobs(config, policy, scorer, texts):
        found, work = seconds(job, card, engine), job.work
        total += sum(found.values())
        numbers = (work.image_encodings, work.prefilled_tokens, work.decoded_tokens)
        millions = " | ".join(f"{number / 1e6:.2f} M" for number in numbers)
        hours = " | ".join(f"{found.get(part, 0) / 3600:.2f}" for part in ("prompts", "decoding"))
        lines.append(f"| {job.stage} | {millions} | {work.forward_passes:,} | {hours} |")
    return "\n".join([*lines, "", f"Together {total / 3600:.1f} GPU-hours."])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument(
        "--engine", choices=["transformers", "vllm"], help="(default: the preset's)"
    )
    parser.add_argument("--response", type=int, default=Texts.response, help="tokens, mean")
    given = parser.parse_args()
    for name in given.preset or [name for name in preset_names() if name != "tiny"]:
        config = load_config(name, given.overrides)
        texts = Texts(response=given.response)
        engine = given.engine or config.engine.name
        print(table(config, given.gpu, engine, texts), end="\n\n")


if __name__ == "__main__":
    main()
