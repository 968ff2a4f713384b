"""The awkward checkpoints load, see images of all shapes, and are awkward as they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny_models
import torch
from awkward.checkpoints import CHECKPOINTS, images

from srccore.config import ModelConfig
from srccore.models.families import FAMILIES
from srccore.models.policy import LoadedPolicy, Policy, load_policy, response_text
from srccore.models.transformers import encode_prompts

Awkward = Callable[[str], ModelConfig]


def load(awkward: Awkward, name: str) -> LoadedPolicy:
    return load_policy(Policy(base=awkward(name)))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_checkpoint_reads_images_of_all_shapes_in_one_batch(
    awkward: Awkward, name: str
) -> None:
    policy = load(awkward, name)
    prompts = [tiny_models.prompt(image) for image in images()]
    inputs = encode_prompts(policy.processor, prompts)
    inputs["pixel_values"] = inputs["pixel_values"].to(policy.model.dtype)
    with torch.no_grad():
        assert policy.model(**inputs).logits.isfinite().all()
    assert sum(weight.numel() for weight in policy.model.parameters()) < 1_000_000


def test_every_family_has_a_checkpoint(awkward: Awkward) -> None:
    built = {load(awkward, name).model.config.model_type for name in CHECKPOINTS}
    assert built == set(FAMILIES)


@pytest.mark.parametrize("name", ["padded-vocabulary", "qwen2.5-vl", "smolvlm", "internvl"])
def test_the_vocabulary_is_padded_past_the_tokenizer(awkward: Awkward, name: str) -> None:
    policy = load(awkward, name)
    assert policy.model.get_output_embeddings().out_features > len(policy.processor.tokenizer)


def test_the_templates_end_of_turn_is_not_in_generation_config(awkward: Awkward) -> None:
    policy = load(awkward, "other-eos")
    end = policy.processor.tokenizer.encode(response_text(policy.processor, "It is red."))[-1]
    assert policy.model.generation_config.eos_token_id == [5]
    assert end == 2


def test_weights_are_in_half_precision_and_in_several_files(awkward: Awkward) -> None:
    from pathlib import Path

    assert load(awkward, "bfloat16").model.dtype == torch.bfloat16
    assert load(awkward, "float16-shards").model.dtype == torch.float16
    assert len(list(Path(awkward("float16-shards").path).glob("*.safetensors"))) > 1


def test_images_of_other_shapes_have_other_numbers_of_tokens(awkward: Awkward) -> None:
    for name in ("llava-next-shapes", "qwen2.5-vl", "smolvlm", "internvl"):
        processor = load(awkward, name).processor
        counts = {
            int(encode_prompts(processor, [tiny_models.prompt(image)])["input_ids"].numel())
            for image in images()
        }
        assert len(counts) > 1, name
