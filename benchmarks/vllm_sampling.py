"""The engine on vLLM against vLLM's own n-sampling, per generated token, on a CPU.

    make vllm-env
    .venv-vllm/bin/python benchmarks/vllm_sampling.py wide

The peer draws 12 whole responses to each prompt in one call. The engine does so, too, with a seed
for every draw and a look at every token, and it searches sentence by sentence. What it drops and
draws again at the end of a sentence is not counted as generated. Times are CPU time of the one
process that runs all of them, divided by the tokens that were generated.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Both engines in this process, so that its CPU time is theirs.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from peers.vllm_sampling import OfflineSampling
from search import prompts, tree
from timing import alternate, arguments, report
from wide import wide_checkpoint

PROMPTS = {"tiny": 96, "wide": 12}
RESPONSES, TOKENS = 12, 32
SEQUENCES = 64
"""Decoded at the same time: few enough that most of a run is in full swing."""


def engines(name: str, folder: Path) -> tuple[Any, OfflineSampling]:
    """Loads a model into the engine and into its peer, with the same settings."""
    from srccore.config import EngineConfig, ModelConfig
    from srccore.models.merged import save_merged
    from srccore.models.policy import Policy
    from srccore.models.vllm import VllmSamplingEngine

    base = ModelConfig(path="embedded:lvlm") if name == "tiny" else wide_checkpoint(folder / "base")
    policy = Policy(base=base)
    config = EngineConfig(name="vllm", max_length=1024, sequences=SEQUENCES)
    engine = VllmSamplingEngine(policy, "cpu", config, draws=8)
    loaded = save_merged(policy, folder / "merged")
    length = engine._engine.model_config.max_model_len
    return engine, OfflineSampling(folder / "merged", loaded.processor, length, SEQUENCES)


def per_token(way: Callable[[], int]) -> float:
    """Returns the CPU seconds that a way takes per token."""
    began = time.process_time()
    tokens = way()
    return (time.process_time() - began) / tokens


def main() -> None:
    """Runs the benchmark."""
    from srccore.config import load_config
    from srccore.method.driver import Search, drive
    from srccore.method.engine import Draw, Node, Prompt, Steps
    from srccore.method.search import search

    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=PROMPTS)
    given = arguments(__doc__, parser)
    config = load_config("tiny").search
    asked = prompts(PROMPTS[given.model])
    with tempfile.TemporaryDirectory() as folder:
        engine, offline = engines(given.model, Path(folder))

    def start(prompt: Prompt) -> Any:
        if given.model == "wide":
            return partial(tree, key=prompt.key)
        return partial(search, sample_id=prompt.key, config=config, seed=0, round_number=1)

    turns = itertools.count()

    def fresh() -> list[Prompt]:
        """The prompts, of which no cache has the images."""
        turn = next(turns)
        return [replace(prompt, key=f"{prompt.key}-{turn}") for prompt in asked]

    def sampled(_prompt: Prompt) -> Any:
        def steps(root: Node) -> Steps[None]:
            yield [Draw(root, TOKENS, seed=seed, whole=True) for seed in range(RESPONSES)]

        return steps

    def counted(start: Callable[[Prompt], Any]) -> int:
        before = engine.work.decoded_tokens
        for _ in drive(engine, [[Search(prompt, start(prompt))] for prompt in fresh()]):
            pass
        return int(engine.work.decoded_tokens - before)

    ways = {
        "vLLM's n-sampling": lambda: offline(fresh(), RESPONSES, TOKENS),
        "srccore, whole responses": partial(counted, sampled),
        "srccore, search": partial(counted, start),
    }
    found = alternate(
        {label: partial(per_token, way) for label, way in ways.items()}, given.repetitions
    )
    seen = engine.work
    notes: dict[str, float] = {
        f"{label}: tokens per CPU second": round(1 / timing.median)
        for label, timing in found.items()
    }
    notes["srccore: image encodings per prompt"] = seen.image_encodings / seen.prompts
    title = f"Seconds per token, {given.model}, {len(asked)} prompts"
    report({title: found}, given.json, notes)


if __name__ == "__main__":
    main()
