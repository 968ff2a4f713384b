"""Runs and times the model stages on one GPU, with random models of real shapes.

    python benchmarks/gpu.py --out runs/gpu      # one H100: at most 9 minutes
    python benchmarks/gpu.py --smoke             # the same parts with tiny models, on a CPU

It makes bfloat16 checkpoints of the shapes of LLaVA-1.5-7B, LLaVA-NeXT-8B and Qwen2.5-1.5B, and
runs the project's own stages on them with the presets' settings, except R-Scorer's training: greedy
answers, search, scoring, stage 1, DPO with an interruption and a resume. Nothing is downloaded.
Weights are random, so what a model says is noise; memory, speed and the equality of two ways to
compute one thing are not.

Needs torch, transformers, peft, accelerate, datasets, trl, safetensors and this project; not what
only buckets and clusters need. Where vLLM is installed, it also searches with it. Each part is
caught: if one fails, the others still run. A table is printed at the end and written to
``OUT/gpu.md``; the exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers.trl_dpo import trl_trainer
from PIL import Image

from srccore.config import RunConfig, load_config
from srccore.data.records import RATING_LEVELS, CandidateSet
from srccore.method import response, search
from srccore.method.driver import Search, draw_all, drive
from srccore.method.engine import Draw, Node, Prompt, SamplingEngine, Steps
from srccore.models.engines import rating_engine, sampling_engine
from srccore.models.merged import save_in_public_names
from srccore.models.policy import Policy, load_policy, write_policy
from srccore.models.rating import encode_rating_prompts
from srccore.models.transformers import encode_prompts
from srccore.models.writing import banned_tokens
from srccore.training.dpo import PreferenceExample, train_dpo
from srccore.training.machine import Machine
from srccore.training.rationale import RationaleExample, tune_rationale
from srccore.training.resume import CHECKPOINTS, Checkpoints
from srccore.training.trainer import Row, step_figures, train_adapter

GIB = 2**30
STEPS = 5
"""Optimiser steps of each training."""
LOST_AFTER = 3
"""The step after which DPO is interrupted."""
COMPARED = 3
"""Optimiser steps whose losses are compared."""
PROFILED = 8
"""Decoding steps that are profiled."""
GREEDY_TOKENS = 24
GAP = 0.25
"""Two greedy tokens count as equal if their logits differ by less: bfloat16 has steps of 0.03 at
4, and a batch of another shape is summed in another order."""
LOSS_TOLERANCE = 0.01
"""Between two trainings in bfloat16, whose kernels add up in no fixed order."""
IMAGES = [(640, 480), (480, 640), (1024, 768), (512, 512)]
"""Sizes of the images: LLaVA-NeXT splits each of them differently."""


@dataclass(frozen=True)
class Shape:
    """The shape of a public checkpoint, under the preset that uses it."""

    preset: str
    model_type: str
    vision: dict[str, int]
    text: dict[str, int]
    pinpoints: tuple[tuple[int, int], ...] = ()
    specials: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
    """unknown, begin, end, padding, image, and what else the chat template writes."""

    @property
    def words(self) -> int:
        """Entries of the tokenizer: public vocabularies are padded past it."""
        return self.text["vocab_size"] - 56


_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAMA3 = (
    "<unk>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<pad>",
    "<image>",
    "<|start_header_id|>",
    "<|end_header_id|>",
)
_GRID = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SHAPES = (
    Shape(
        preset="llava-1.5-7b",
        model_type="llava",
        vision=_CLIP,
        text={
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    Shape(
        preset="llava-next-8b",
        model_type="llava_next",
        vision=_CLIP,
        text={
            "vocab_size": 128320,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
        pinpoints=_GRID,
        specials=_LLAMA3,
    ),
)
SCORER_TEXT = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
SCORER_SPECIALS = ("<unk>", "<|im_start|>", "<|im_end|>", "<pad>")
SCORER_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QUESTION = (
    "Which of the two lines in the picture is higher at the end of the year , and by how much ?"
)
SENTENCES = (
    "The red line starts at 3 and the blue line starts at 5 .",
    "Over the year the red line rises in every month .",
    "The blue line falls after the first months and stays flat .",
    "At the end of the year the red line is at 9 and the blue line is at 4 .",
    "So the red line is higher at the end , and the difference is 9 - 4 = 5 .",
)
TEMPLATE_WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT: Answer: "
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language. system user assistant Question: Reference: Facts: First: Second: What is shown? "
)


def smaller(shape: Shape) -> Shape:
    """Returns the shape for `--smoke`: the same classes, a hundred thousand parameters."""
    vision = shape.vision | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "projection_dim": 32}
    heads = 1 if shape.text["num_key_value_heads"] < shape.text["num_attention_heads"] else 2
    return Shape(
        shape.preset,
        shape.model_type,
        vision,
        _smaller_text(shape.text) | {"num_key_value_heads": heads},
        tuple((height // 12, width // 12) for height, width in shape.pinpoints),
        shape.specials,
    )


def _smaller_text(text: dict[str, int]) -> dict[str, int]:
    return text | {
        "vocab_size": 512,
        # Heads of 32, the smallest that vLLM has a kernel for on a CPU.
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


@dataclass
class Bench:
    """What all parts share: the card, the settings, and the table that they fill."""

    device: str
    work: Path
    smoke: bool
    deadline: float
    overrides: Sequence[str] = ()
    """Of every preset."""
    bandwidth: float = math.nan
    """Bytes per second that a copy reads and writes together."""
    rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self, model: str, name: str, part: Callable[..., Any], *given: Any) -> Any:
        """Runs a part, times it, and catches what it raises.

        Args:
            model: What the part is about.
            name: Its name in the table.
            part: Called with this bench, a list to which it adds its results, and what is given.
            given: Its further arguments; nothing is run if one is None: an earlier part failed.

        Returns:
            What the part returned, or None if it failed.
        """
        began = time.monotonic()
        if began > self.deadline or any(each is None for each in given):
            reason = "the time was used up" if began > self.deadline else "an earlier part failed"
            self.failed.append(f"{model}: {name}: not run, {reason}")
            return None
        self.free()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results: list[str] = []
        returned = None
        try:
            returned = part(self, results, *given)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            results.append(f"**failed** ({reason})")
            self.failed.append(f"{model}: {name}: {reason}")
        peak = float(torch.cuda.max_memory_allocated()) if self.device == "cuda" else 0.0
        memory, seconds = f"{peak / GIB:.1f}" if peak else "", time.monotonic() - began
        self.rows.append((model, name, "; ".join(results), memory, f"{seconds:.1f}"))
        print(" | ".join(self.rows[-1]), flush=True)
        self.free()
        return returned

    def free(self) -> None:
        """Returns memory that nothing refers to any longer."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> float:
        """Waits for the card, and returns the time."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()


def main() -> None:
    """Runs all parts and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for the table and the trainings' logs")
    parser.add_argument("--work", type=Path, help="folder for 40 GB of checkpoints (a RAM disk)")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no part after this")
    parser.add_argument("--models", nargs="+", choices=[shape.preset for shape in SHAPES])
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="NAME=VALUE"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU. Pass --smoke to run the parts with tiny models.")
    if arguments.smoke:
        IMAGES[:] = [(width // 8, height // 8) for width, height in IMAGES]
    known = {shape.preset: shape for shape in SHAPES}
    shapes = [known[name] for name in arguments.models or known]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="gpu-") as work:
        bench = Bench(
            device="cpu" if arguments.smoke else "cuda",
            work=Path(work),
            smoke=arguments.smoke,
            deadline=began + 60 * arguments.minutes,
            overrides=arguments.overrides,
        )
        bench.run("card", "copy", measure_card)
        bench.run("qwen2.5-1.5b", "scoring", score)
        configs = [run_model(bench, smaller(each) if bench.smoke else each) for each in shapes]
        # Last: once a profiler has been used, every kernel of the process starts more slowly.
        for config in configs:
            bench.run(config.name, "profile of decoding", profile, config)
    text = table(bench, time.monotonic() - began)
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "gpu.md").write_text(text, encoding="utf-8")
    sys.exit(1 if bench.failed else 0)


def table(bench: Bench, seconds: float) -> str:
    """Writes the results as Markdown."""
    import peft
    import transformers
    import trl

    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU, tiny models"
    lines = [
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, TRL {trl.__version__}; {date.today()}; {seconds:.0f} s in all.",
        "",
        "| model | part | result | peak GiB | seconds |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in bench.rows),
        "",
        *(f"* {each}" for each in bench.failed),
    ]
    return "\n".join(lines)


def measure_card(bench: Bench, results: list[str]) -> None:
    """Measures what a large copy reads and writes: the limit of decoding."""
    count = 2**20 if bench.smoke else 2**31
    source = torch.ones(count, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        began = bench.wait()
        target.copy_(source)
        times.append(bench.wait() - began)
    bench.bandwidth = 2 * count / statistics.median(times[1:])
    results.append(f"{bench.bandwidth / 1e12:.2f} TB/s read and written")


def tokenizer(words: int, specials: Sequence[str], texts: Sequence[str]) -> Any:
    """Makes a byte-level BPE tokenizer, as large as a real one.

    Args:
        words: Entries of its vocabulary.
        specials: Special tokens: unknown, begin, end, padding, and others.
        texts: Whose words become tokens. The rest is made up; one in twenty ends a sentence.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = split
    trainer = BpeTrainer(
        vocab_size=min(words, 4000),
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator([*texts, TEMPLATE_WORDS], trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    for number in range(words - len(vocabulary)):
        vocabulary[f"Ġ{number}word" + "." * (number % 20 == 0)] = len(vocabulary)
    merges = [(left, right) for left, right in model["merges"]]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.decoder = decoders.ByteLevel()
    image = {"extra_special_tokens": {"image_token": "<image>"}} if "<image>" in specials else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        bos_token=specials[1],
        eos_token=specials[2],
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        **image,
    )


def make_checkpoint(bench: Bench, results: list[str], shape: Shape, config: RunConfig) -> Path:
    """Makes a checkpoint with random weights, drawn on the device.

    Returns:
        The folder for all that is made of it.
    """
    import transformers

    words = tokenizer(shape.words, shape.specials, [QUESTION, *responses(2)])
    vision = transformers.CLIPVisionConfig(**shape.vision)
    text = transformers.LlamaConfig(
        **shape.text, bos_token_id=1, eos_token_id=2, pad_token_id=3, rope_theta=500_000.0
    )
    side, patch = shape.vision["image_size"], shape.vision["patch_size"]
    shared = {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": 4,
        "image_seq_length": (side // patch) ** 2,
        "tie_word_embeddings": False,
    }
    pixels = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    counting = {
        "tokenizer": words,
        "patch_size": patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    if shape.pinpoints:
        grid = [list(each) for each in shape.pinpoints]
        made = transformers.LlavaNextConfig(**shared, image_grid_pinpoints=grid)
        images = transformers.LlavaNextImageProcessorPil(**pixels, image_grid_pinpoints=grid)
        processor = transformers.LlavaNextProcessor(image_processor=images, **counting)
    else:
        made = transformers.LlavaConfig(**shared)
        images = transformers.CLIPImageProcessorPil(**pixels)
        processor = transformers.LlavaProcessor(image_processor=images, **counting)
    torch.manual_seed(0)
    base = Path(config.model.path)
    with torch.device(bench.device):
        model = transformers.AutoModelForImageTextToText.from_config(made, dtype=torch.bfloat16)
    save_in_public_names(model, base)
    processor.save_pretrained(base)
    results.append(f"{_size(base) / 1e9:.1f} GB made and saved")
    return base.parent


def make_scorer(folder: Path, bench: Bench) -> None:
    """Makes a text model of R-Scorer's shape, as `train-scorer` writes it."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = _smaller_text(SCORER_TEXT) if bench.smoke else SCORER_TEXT
    config = Qwen2Config(**shape, tie_word_embeddings=True, eos_token_id=2, pad_token_id=3)
    torch.manual_seed(0)
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    texts = [QUESTION, *responses(2)]
    words = tokenizer(shape["vocab_size"], SCORER_SPECIALS, texts)
    words.chat_template = SCORER_TEMPLATE
    words.save_pretrained(folder)


def responses(count: int) -> list[str]:
    """Writes responses of like length that differ in the order of their sentences."""
    chooser = random.Random(0)
    texts = []
    for number in range(count):
        sentences = chooser.sample(SENTENCES, len(SENTENCES))
        texts.append(response.write(" ".join(sentences), str(number % 10)))
    return texts


def images(count: int) -> list[Image.Image]:
    """Makes images of several shapes, of noise: nothing about them compresses or repeats."""
    chooser = random.Random(0)
    made = []
    for number in range(min(count, 2 * len(IMAGES))):
        width, height = IMAGES[number % len(IMAGES)]
        small = Image.frombytes(
            "RGB", (width // 8, height // 8), chooser.randbytes(width * height // 64 * 3)
        )
        made.append(small.resize((width, height)))
    return [made[number % len(made)] for number in range(count)]


def prompts(count: int) -> list[Prompt]:
    """Makes prompts with different images."""
    return [
        Prompt(lambda image=image: image, QUESTION, f"sample-{n}")
        for n, image in enumerate(images(count))
    ]


def preferences(count: int) -> list[PreferenceExample]:
    """Makes preferences between responses of like length."""
    texts = responses(2 * count)
    return [
        PreferenceExample(QUESTION, chosen, rejected, lambda image=image: image)
        for chosen, rejected, image in zip(texts[::2], texts[1::2], images(count), strict=True)
    ]


def score(bench: Bench, results: list[str]) -> None:
    """Rates all pairs of some samples with a model of R-Scorer's shape."""
    from transformers import AutoTokenizer

    folder = bench.work / "scorer"
    make_scorer(folder, bench)
    batch_tokens = load_config("llava-1.5-7b").scoring.batch_tokens
    engine = rating_engine(folder, bench.device, batch_tokens)
    samples, candidates = (2, 3) if bench.smoke else (16, 6)
    texts = responses(samples * candidates)
    asked = [
        f"Question: {QUESTION}\nReference: 5\nFacts: {said[0]}\nFirst: {a}\nSecond: {b}"
        for said in (texts[start::samples] for start in range(samples))
        for a, b in itertools.permutations(said, 2)
    ]
    levels = [str(level) for level in RATING_LEVELS]
    engine.next_token_distribution(asked[: candidates * (candidates - 1)], levels)
    began = bench.wait()
    found = engine.next_token_distribution(asked, levels)
    seconds = bench.wait() - began
    if not all(math.isclose(sum(each.probabilities), 1, rel_tol=1e-6) for each in found):
        raise AssertionError("The probabilities of a rating do not sum to 1.")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = len(encode_rating_prompts(tokenizer, asked[:1])[0])
    results.append(
        f"{len(asked) / seconds:.0f} pairs/s of {tokens} tokens, at most {batch_tokens} at once"
    )
    shutil.rmtree(folder)


def run_model(bench: Bench, shape: Shape) -> RunConfig:
    """Runs all parts of one model, except the profile.

    Returns:
        Its configuration.
    """
    name, folder = shape.preset, bench.work / shape.preset
    overrides = [f"model.path={folder / 'base'}"]
    # Bounds the time: a random model neither ends a response nor writes one that parses.
    overrides += ["search.max_sentences=3", "search.max_sentence_tokens=48"]
    overrides += ["search.fill_attempts=1"]
    if bench.smoke:
        overrides += [
            "search.batch_tokens=1",
            "evaluation.batch_tokens=1",
            "evaluation.max_tokens=16",
        ]
        overrides += ["dpo.lora.rank=4", "model.dtype=float32"]
        overrides += ["dpo.batch_size=2", "rationale.batch_size=2"]
        overrides += [f"{each}.gradient_accumulation_steps=1" for each in ("rationale", "dpo")]
    else:
        overrides += ["evaluation.max_tokens=96"]
    config = load_config(name, [*overrides, *bench.overrides])
    folder.mkdir()
    made = bench.run(name, "checkpoint", make_checkpoint, shape, config)
    engine = bench.run(name, "load", load, config, made)
    bench.run(name, "greedy decoding against generate", compare_greedy, engine)
    bench.run(name, "evaluation", answer, engine, config)
    bench.run(name, "search", search_batch, engine, config)
    del engine
    if importlib.util.find_spec("vllm"):
        bench.run(name, "search on vLLM", search_on_vllm, config, made)
    bench.run(name, "stage 1", tune, config, made)
    policy = bench.run(name, "DPO, interrupted and resumed", align, config, made)
    bench.run(name, "load with two adapters", load_folded, config, policy)
    bench.run(name, "DPO loss against TRL", compare_losses, config, made)
    for trained in ("stage-1", "dpo", "ours", "trl"):
        shutil.rmtree(folder / trained, ignore_errors=True)
    return config


def load(bench: Bench, results: list[str], config: RunConfig, folder: Path) -> SamplingEngine:
    """Loads the base policy into the sampling engine."""
    write_policy(folder, Policy(base=config.model))
    began = bench.wait()
    engine = sampling_engine(folder / "policy.json", bench.device)
    results.append(f"{_size(folder / 'base') / 1e9 / (bench.wait() - began):.2f} GB/s")
    return engine


def load_folded(bench: Bench, results: list[str], config: RunConfig, policy: Policy) -> None:
    """Loads a policy whose adapters are folded into its weights."""
    began = bench.wait()
    load_policy(policy, bench.device)
    results.append(f"{bench.wait() - began:.1f} s")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compare_greedy(bench: Bench, results: list[str], engine: Any) -> None:
    """Compares greedy decoding with `generate` on the same batch, token by token."""
    model, processor = engine._model, engine._processor
    asked = prompts(len(IMAGES))
    nodes = engine.open(engine.prepare(asked))
    ours = draw_all(engine, [Draw(node, GREEDY_TOKENS, greedy=True, whole=True) for node in nodes])
    inputs = encode_prompts(processor, asked).to(bench.device, model.dtype)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        theirs = model.generate(
            **inputs,
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            suppress_tokens=banned_tokens(model, processor),
            output_logits=True,
            return_dict_in_generate=True,
        )
    equal, gaps = 0, []
    for row, drawn in enumerate(ours):
        wanted, found = theirs.sequences[row, length:].tolist(), drawn.node.tokens
        pairs = zip(found, wanted, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        equal += same
        if same < min(len(wanted), len(found)):
            logits = theirs.logits[same][row].float()
            gaps.append(abs(float(logits[wanted[same]] - logits[found[same]])))
    results.append(f"{equal} of {GREEDY_TOKENS * len(ours)} tokens equal before a row differs")
    results.append(f"{len(gaps)} rows differ, logits there {max(gaps, default=0):.3f} apart")
    if max(gaps, default=0) > GAP:
        raise AssertionError(f"Greedy tokens differ although their logits are {max(gaps)} apart.")


def fitting(engine: Any, batch_tokens: int) -> list[Prompt]:
    """As many prompts as a batch of the preset has, and at least two."""
    longest = engine.prepare(prompts(len(IMAGES)))["input_ids"].shape[1]
    return prompts(max(2, batch_tokens // longest))


def answer(bench: Bench, results: list[str], engine: Any, config: RunConfig) -> None:
    """Answers a batch greedily, and compares a decoding step with the bandwidth's limit."""
    settings = config.evaluation
    batch = fitting(engine, settings.batch_tokens)
    started = bench.wait()
    nodes = engine.open(engine.prepare(batch))
    opened = bench.wait()
    draws = [Draw(node, settings.max_tokens, greedy=True, whole=True) for node in nodes]
    del nodes
    drawn = draw_all(engine, draws)
    ended = bench.wait()
    del draws
    steps = max(each.token_count for each in drawn)
    tokens = sum(each.token_count for each in drawn)
    sampled = batch[: len(IMAGES)]
    began = time.monotonic()
    inputs = engine.prepare(sampled)
    processing = len(sampled) / (time.monotonic() - began)
    context = int(inputs["attention_mask"].sum()) / len(sampled)
    text = engine._model.config.get_text_config()
    heads = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    cache = 2 * 2 * heads * text.num_hidden_layers * (context + steps / 2) * len(batch)
    weights = 2 * sum(
        each.numel()
        for name, each in engine._model.named_parameters()
        if ("language_model" in name or "lm_head" in name) and "embed_tokens" not in name
    )
    limit = (weights + cache) / bench.bandwidth
    step = (ended - opened) / steps
    results += [
        f"batch {len(batch)}, {context:.0f} prompt tokens",
        f"prompts {len(batch) * context / (opened - started):.0f} tokens/s",
        f"images {processing:.0f}/s on the CPU",
        f"decoding {tokens / (ended - opened):.0f} tokens/s, {1000 * step:.1f} ms a step",
        f"{limit / step:.0%} of the bandwidth limit",
    ]


def search_batch(bench: Bench, results: list[str], engine: Any, config: RunConfig) -> None:
    """Searches candidates for one batch."""
    batch = fitting(engine, config.search.batch_tokens)
    results.append(f"batch {len(batch)}")
    search_batches(bench, results, engine, config, [batch])


def search_on_vllm(bench: Bench, results: list[str], config: RunConfig, folder: Path) -> None:
    """Searches candidates with as many samples in flight as the preset allows."""
    settings = config.search
    engine_config = settings.engine.model_copy(update={"name": "vllm", "max_length": 4096})
    if bench.smoke:
        engine_config = engine_config.model_copy(update={"max_length": 1024, "sequences": 16})
    engine = sampling_engine(
        folder / "policy.json",
        bench.device,
        engine_config,
        draws=settings.width * settings.branch,
    )
    with contextlib.closing(engine):
        asked = prompts(2 * engine.in_flight)
        results.append(f"{len(asked)} samples, {engine.in_flight} in flight")
        search_batches(bench, results, engine, config, [[each] for each in asked])


def search_batches(
    bench: Bench,
    results: list[str],
    engine: Any,
    config: RunConfig,
    batches: Sequence[Sequence[Prompt]],
) -> None:
    """Searches candidates, and counts what is drawn."""
    drawn = []

    def counted(root: Node, prompt: Prompt) -> Steps[CandidateSet]:
        steps = search.search(
            root, sample_id=prompt.key, config=config.search, seed=0, round_number=1
        )
        continuations = None
        while True:
            try:
                continuations = yield steps.send(continuations)
            except StopIteration as end:
                return end.value
            drawn.extend(each.token_count for each in continuations)

    began = bench.wait()
    for _ in drive(
        engine,
        [[Search(each, partial(counted, prompt=each)) for each in batch] for batch in batches],
    ):
        pass
    seconds = bench.wait() - began
    results.append(f"{len(drawn)} draws")
    results.append(f"{sum(drawn) / seconds:.0f} tokens/s")


def profile(bench: Bench, results: list[str], config: RunConfig) -> None:
    """Counts the kernels of a decoding step of the search, and how long they keep the card busy."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    policy = Path(config.model.path).parent / "policy.json"
    engine = sampling_engine(policy, bench.device)
    count = config.search.width * config.search.branch
    nodes = engine.open(engine.prepare(fitting(engine, config.search.batch_tokens)))
    draws = [Draw(node, PROFILED, seed=n, whole=True) for node in nodes for n in range(count)]
    draw_all(engine, draws)
    began = bench.wait()
    draw_all(engine, draws)
    seconds = bench.wait() - began
    activities = [ProfilerActivity.CUDA] if bench.device == "cuda" else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as seen:
        draw_all(engine, draws)
        bench.wait()
    device = DeviceType.CUDA if bench.device == "cuda" else DeviceType.CPU
    times = [
        each.time_range.elapsed_us() / 1e6 for each in seen.events() if each.device_type == device
    ]
    results.append(f"{len(draws)} rows, {1000 * seconds / PROFILED:.1f} ms a step")
    results.append(f"{len(times) / PROFILED:.0f} kernels a step")
    if bench.device == "cuda":
        results.append(f"busy {sum(times) / seconds:.0%} of the time")


class StepClock:
    """Notes when each optimiser step ends; may interrupt the training after one."""

    def __init__(self, bench: Bench, stop: int | None = None) -> None:
        self.bench, self.stop, self.done = bench, stop, 0
        self.times: list[float] = []
        self._last = math.nan

    def __call__(self, done: int, _total: int) -> None:
        """Receives the progress of a training."""
        now = self.bench.wait()
        self.times.append(now - self._last)
        self.restart()
        self.done += 1
        if done == self.stop:
            raise InterruptedTrainingError

    def restart(self) -> None:
        """Begins a step: what happened since the last one is not part of it."""
        self._last = self.bench.wait()

    @property
    def seconds(self) -> float:
        """The median step, without the first, which includes loading."""
        return statistics.median(self.times[1:])


class TimedCheckpoints(Checkpoints):
    """Checkpoints that are not counted as part of a step."""

    def __init__(self, folder: Path, steps: StepClock) -> None:
        super().__init__(folder)
        self.steps, self.seconds, self.size, self.step = steps, 0.0, 0, 0

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Saves, and notes how long that took."""
        began = time.monotonic()
        super().save(step, write)
        self.seconds, self.step = time.monotonic() - began, step
        self.size = sum(path.stat().st_size for path in self.folder.rglob("*.*"))
        self.steps.restart()


class InterruptedTrainingError(Exception):
    """Stands for the loss of a pod."""


def tune(bench: Bench, results: list[str], config: RunConfig, folder: Path) -> None:
    """Trains stage 1 for a few steps of the preset's batch."""
    settings = config.rationale
    batch = settings.batch_size * settings.gradient_accumulation_steps
    examples = [
        RationaleExample(QUESTION, text, lambda image=image: image)
        for text, image in zip(responses(STEPS * batch), images(STEPS * batch), strict=True)
    ]
    steps = StepClock(bench)
    out = folder / "stage-1"
    out.mkdir()
    machine = Machine(bench.device, steps)
    outcome = tune_rationale(
        Policy(base=config.model), examples, settings, out, seed=0, machine=machine
    )
    results.append(
        f"{steps.seconds:.2f} s a step of {batch} = {settings.batch_size} x "
        f"{settings.gradient_accumulation_steps}"
    )
    results.append(f"loss {outcome.first_loss:.3f} to {outcome.last_loss:.3f}")


def align(bench: Bench, results: list[str], config: RunConfig, folder: Path) -> Policy:
    """Trains DPO for a few steps, loses the process after a checkpoint, and resumes."""
    settings = config.dpo
    batch = settings.batch_size * settings.gradient_accumulation_steps
    examples = preferences(STEPS * batch)
    policy = Policy(base=config.model).with_adapter(folder / "stage-1" / "adapter")
    out = folder / "dpo"
    out.mkdir()
    attempts = []
    for stop in (LOST_AFTER, None):
        steps = StepClock(bench, stop)
        checkpoints = TimedCheckpoints(out / CHECKPOINTS, steps)
        machine = Machine(bench.device, steps, checkpoints)
        with contextlib.suppress(InterruptedTrainingError):
            outcome = train_dpo(policy, examples, settings, out, seed=0, machine=machine)
        attempts.append((steps, checkpoints))
        bench.free()
    (lost, saved), (resumed, _) = attempts
    results += [
        f"{statistics.median([lost.seconds, resumed.seconds]):.2f} s a step of {batch} = "
        f"{settings.batch_size} x {settings.gradient_accumulation_steps}",
        f"checkpoint of {saved.size / 1e9:.1f} GB in {saved.seconds:.1f} s",
        f"lost after step {lost.done}, resumed for {resumed.done} of {STEPS}",
        f"loss {outcome.training.first_loss:.3f} to {outcome.training.last_loss:.3f}",
    ]
    # Slow checkpoints are written less often, so the steps since the newest one are lost, too.
    if not 0 < saved.step == STEPS - resumed.done:
        raise AssertionError(
            f"Resumed for {resumed.done} steps after a checkpoint of {saved.step}."
        )
    return policy.with_adapter(out / "adapter")


def compare_losses(bench: Bench, results: list[str], config: RunConfig, folder: Path) -> None:
    """Trains a few steps with our trainer and with TRL's, and compares the losses."""
    # Steps so large that policy and reference soon differ; both normalise the SFT term alike.
    settings = config.dpo.model_copy(
        update={
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-5,
            "warmup_ratio": 0.0,
            "sft_normalization": "token",
        }
    )
    examples = preferences(COMPARED * settings.batch_size)
    policy, machine = Policy(base=config.model), Machine(bench.device)
    (folder / "ours").mkdir()
    outcome = train_dpo(policy, examples, settings, folder / "ours", seed=0, machine=machine)
    ours = (outcome.training.first_loss, outcome.training.last_loss)
    bench.free()
    (folder / "trl").mkdir()
    _, trainer = train_adapter(
        policy,
        [
            Row(each.question, {"chosen": each.chosen, "rejected": each.rejected}, each.image)
            for each in examples
        ],
        settings,
        folder / "trl",
        seed=0,
        machine=machine,
        trainer=functools.partial(trl_trainer, settings),
    )
    losses = step_figures(trainer, "loss")
    theirs = (losses[0], losses[-1])
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    results.append(f"first loss {ours[0]:.4f}, TRL {theirs[0]:.4f}")
    results.append(f"loss of step {len(losses)} {ours[1]:.4f}, TRL {theirs[1]:.4f}")
    if difference > LOSS_TOLERANCE:
        raise AssertionError(f"The losses differ by {difference}.")


if __name__ == "__main__":
    main()
