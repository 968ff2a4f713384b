"""The search and plain sampling against `generate`, on the embedded model and on a wide one.

    python benchmarks/search.py --json search.json

On `tiny`, both engines run the real search on the embedded model, with random numbers of their own.
On `wide` (30 million random parameters, 576 image tokens), responses of a random model have no
sentences, so the tree has a fixed shape: 12 draws of 12 tokens from the root, then twice 3 draws
from each of 4 beams.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers.generate import PerNode, sample_responses
from timing import alternate, arguments, report
from wide import wide_checkpoint

from srccore.config import ModelConfig, load_config
from srccore.embedded.world import make_item
from srccore.method.driver import Search, drive
from srccore.method.engine import Draw, Node, Prompt, SamplingEngine, Steps
from srccore.method.search import search
from srccore.models.policy import LoadedPolicy, Policy, load_policy
from srccore.models.transformers import TransformersSamplingEngine

SAMPLES = {"tiny": 8, "wide": 2}
WIDTH, BRANCH, SENTENCES, TOKENS = 4, 3, 3, 12


def prompts(count: int) -> list[Prompt]:
    """Questions and images of the embedded world."""
    items = [make_item(0, "heldout", number) for number in range(count)]
    return [Prompt(partial(_image, item), item.sample.question, item.sample.id) for item in items]


def _image(item: Any) -> Any:
    return item.image


def tree(root: Node, key: str) -> Steps[int]:
    """Draws a tree of fixed shape; the first beams survive."""
    beams, seed = [root], 0
    for sentence in range(SENTENCES):
        count = BRANCH if sentence else WIDTH * BRANCH
        drawn = yield [
            Draw(beam, TOKENS, seed=hash((key, seed, n)) % 2**63, whole=True)
            for seed, beam in enumerate(beams, start=seed)
            for n in range(count)
        ]
        seed += len(beams)
        beams = [each.node for each in drawn if each.node is not None][:WIDTH]
    return seed


def searched(engine: SamplingEngine, asked: Sequence[Prompt], start: Callable[..., Any]) -> None:
    """Runs a search per prompt."""
    for _ in drive(engine, [[Search(prompt, start(prompt)) for prompt in asked]]):
        pass


def sampled(engine: SamplingEngine, asked: Sequence[Prompt], count: int, max_tokens: int) -> None:
    """Draws whole responses to each prompt."""

    def steps(root: Node) -> Steps[None]:
        yield [Draw(root, max_tokens, seed=seed, whole=True) for seed in range(count)]

    for _ in drive(engine, [[Search(prompt, steps) for prompt in asked]]):
        pass


def work_per_sample(engine: SamplingEngine, way: Callable[[SamplingEngine], None]) -> str:
    """Counts what one run of a way computes."""
    before = {**vars(engine.work)}
    way(engine)
    counted = {name: value - before[name] for name, value in vars(engine.work).items()}
    return ", ".join(
        f"{counted[name] / counted['prompts']:.1f} {name.replace('_', ' ')}"
        for name in ("image_encodings", "prefilled_tokens", "decoded_tokens", "forward_passes")
    )


def compare(
    policy: LoadedPolicy,
    asked: Sequence[Prompt],
    start: Callable[[Prompt], Any],
    repetitions: int,
) -> Any:
    """Times the search on both engines, and counts their work."""
    ours = TransformersSamplingEngine(policy.model, policy.processor)
    theirs = PerNode(policy.model, policy.processor)
    way = partial(searched, asked=asked, start=start)
    found = alternate(
        {"a call of generate per node": partial(way, theirs), "ours": partial(way, ours)},
        repetitions,
    )
    return found, work_per_sample(theirs, way), work_per_sample(ours, way)


def never_ending(policy: LoadedPolicy) -> LoadedPolicy:
    """Makes a random model's responses as long as they may be."""
    ends = [policy.processor.tokenizer.eos_token_id]

    def forbid(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(ends), -1e4)

    policy.model.get_output_embeddings().register_forward_hook(forbid)
    return policy


def main() -> None:
    """Runs the benchmark."""
    given = arguments(__doc__)
    torch.set_num_threads(1)
    results, notes = {}, {}
    config = load_config("tiny").search
    tiny = load_policy(Policy(base=ModelConfig(path="embedded:lvlm")))

    def real(prompt: Prompt) -> Any:
        return partial(search, sample_id=prompt.key, config=config, seed=0, round_number=1)

    with tempfile.TemporaryDirectory() as folder:
        wide = never_ending(load_policy(Policy(base=wide_checkpoint(Path(folder)))))
    for name, policy, start in (
        ("tiny", tiny, real),
        ("wide", wide, lambda prompt: partial(tree, key=prompt.key)),
    ):
        asked = prompts(SAMPLES[name])
        title = f"Search, {name}, {len(asked)} samples"
        results[title], theirs, ours = compare(policy, asked, start, given.repetitions)
        notes[f"{title}: per sample, generate"] = theirs
        notes[f"{title}: per sample, ours"] = ours
    count, tokens = 12, 32
    for name, policy in (("tiny", never_ending(tiny)), ("wide", wide)):
        asked = prompts(SAMPLES[name])
        engine = TransformersSamplingEngine(policy.model, policy.processor)
        results[f"{count} responses of {tokens} tokens, {name}, {len(asked)} samples"] = alternate(
            {
                "generate, one batch": partial(
                    sample_responses, policy.model, policy.processor, asked, count, tokens
                ),
                "ours": partial(sampled, engine, asked, count, tokens),
            },
            given.repetitions,
        )
    report(results, given.json, notes)


if __name__ == "__main__":
    main()
