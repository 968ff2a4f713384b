"""The engine on vLLM against vLLM's own n-sampling, in tokens per second, on a CPU.

    make vllm-env
    .venv-vllm/bin/python benchmarks/vllm_sampling.py

Whole responses of the embedded model, 12 to each of 24 prompts. The engine draws each with a seed
and looks at every token; plain n-sampling does neither.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from peers.vllm_sampling import OfflineSampling
from timing import arguments

# Both engines in this process, so that they share its one core.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

PROMPTS, RESPONSES, TOKENS = 24, 12, 64


def main() -> None:
    """Runs the benchmark."""
    import statistics

    from srccore.config import EngineConfig, ModelConfig
    from srccore.embedded.world import make_item
    from srccore.method.driver import Search, drive
    from srccore.method.engine import Draw, Node, Prompt, Steps
    from srccore.models.merged import save_merged
    from srccore.models.policy import Policy
    from srccore.models.vllm import VllmSamplingEngine

    given = arguments(__doc__)
    policy = Policy(base=ModelConfig(path="embedded:lvlm"))
    items = [make_item(0, "heldout", number) for number in range(PROMPTS)]
    prompts = [
        Prompt(partial(_image, each), each.sample.question, each.sample.id) for each in items
    ]
    engine = VllmSamplingEngine(policy, "cpu", EngineConfig(name="vllm"), draws=RESPONSES)
    with tempfile.TemporaryDirectory() as folder:
        loaded = save_merged(policy, Path(folder))
        offline = OfflineSampling(Path(folder), loaded.processor, 512)

    def steps(root: Node) -> Steps[int]:
        drawn = yield [Draw(root, TOKENS, seed=seed, whole=True) for seed in range(RESPONSES)]
        return sum(each.token_count for each in drawn)

    def ours() -> int:
        found = drive(engine, [[Search(prompt, steps)] for prompt in prompts])
        return sum(count for each in found for count in each)

    def theirs() -> int:
        return offline(prompts, RESPONSES, TOKENS)

    speeds: dict[str, list[float]] = {"vLLM's n-sampling": [], "srccore": []}
    for turn in range(given.repetitions + 1):
        for name, way in (("vLLM's n-sampling", theirs), ("srccore", ours)):
            began = time.perf_counter()
            tokens = way()
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - began))
    ratios = [own / their for their, own in zip(*speeds.values(), strict=True)]
    print("| way | tokens per second, median | slowest to fastest |\n| --- | ---: | --- |")
    for name, found in speeds.items():
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"| {name} | {statistics.median(found):.0f} | {spread} |")
    print(f"\nRatio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _image(item: Any) -> Any:
    return item.image


if __name__ == "__main__":
    main()
