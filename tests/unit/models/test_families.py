from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from awkward.checkpoints import CHECKPOINTS
from PIL import Image

from srccore.config import ModelConfig, load_config
from srccore.errors import UserError
from srccore.models.families import FAMILIES, language_model_targets
from srccore.models.policy import (
    Policy,
    load_policy,
    load_processor,
    prompt_text,
    response_text,
)
from srccore.training.checkpoints import export_merged

Awkward = Callable[[str], ModelConfig]


@pytest.mark.parametrize("model_type", ["paligemma", "minicpmv", ""])
def test_another_family_is_refused_with_those_that_are_supported(
    tmp_path: Path, model_type: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    base = ModelConfig(path=str(tmp_path))
    for load in (load_processor, lambda base: load_policy(Policy(base=base))):
        with pytest.raises(UserError, match=rf"family '{model_type}'.*no stage has been") as error:
            load(base)
        assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_lora_goes_on_all_linear_layers_of_the_language_model_and_no_others(
    awkward: Awkward, name: str
) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_policy(Policy(base=awkward(name))).model
    config = LoraConfig(r=2, target_modules=language_model_targets(model))
    wrapped = get_peft_model(model, config)
    trained = {
        name.partition(".lora_")[0].removeprefix("base_model.model.")
        for name, weight in wrapped.named_parameters()
        if weight.requires_grad
    }
    inside = FAMILIES[model.config.model_type].language_model
    # Two layers, each with four projections of the attention and three of the MLP.
    assert len(trained) == 14
    assert all(name.startswith(f"{inside}.layers.") for name in trained)


def test_a_pattern_of_ones_own_stays_inside_the_language_model(awkward: Awkward) -> None:
    model = load_policy(Policy(base=awkward("cropping"))).model
    own = r"model\.language_model\..*\.q_proj"
    assert language_model_targets(model, own) == own
    with pytest.raises(UserError, match=r"matches model\.vision_tower\..*q_proj, which is outside"):
        language_model_targets(model, r".*\.q_proj")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_question_cannot_contain_a_special_token(awkward: Awkward, name: str) -> None:
    processor = load_processor(awkward(name))
    tokenizer = processor.tokenizer
    marks = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    plain = prompt_text(processor, "What?")
    assert prompt_text(processor, f"<image>\n{processor.image_token}What?") == plain
    assert prompt_text(processor, "".join(marks) + "What?") == plain
    assert response_text(processor, f"It is{marks[2]}.") == response_text(processor, "It is.")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prompt_and_response_apart_give_the_ids_of_the_whole(awkward: Awkward, name: str) -> None:
    processor = load_processor(awkward(name))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": tiny_models.RESPONSE}]},
    ]
    whole = processor.apply_chat_template(turns, tokenize=False).rstrip("\n")
    encode = processor.tokenizer.encode
    texts = (prompt_text(processor, "What?"), response_text(processor, tiny_models.RESPONSE))
    apart = [token for text in texts for token in encode(text, add_special_tokens=False)]
    assert apart == encode(whole, add_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "public"),
    [
        (
            "qwen2.5-vl",
            [
                "model.layers.0.self_attn.q_proj.weight",
                "visual.blocks.0.attn.qkv.weight",
                "visual.merger.mlp.0.weight",
                "lm_head.weight",
            ],
        ),
        (
            "smolvlm",
            [
                "model.text_model.layers.0.self_attn.q_proj.weight",
                "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
                "model.connector.modality_projection.proj.weight",
                "lm_head.weight",
            ],
        ),
        (
            "internvl",
            [
                "language_model.model.layers.0.self_attn.q_proj.weight",
                "vision_tower.encoder.layer.0.attention.q_proj.weight",
                "multi_modal_projector.linear_1.weight",
                "language_model.lm_head.weight",
            ],
        ),
    ],
)
def test_an_export_has_the_names_of_public_checkpoints(
    awkward: Awkward, tmp_path: Path, name: str, public: list[str]
) -> None:
    from safetensors import safe_open

    export_merged(Policy(base=awkward(name)), tmp_path / "merged", "# A policy\n")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert set(public) <= names


@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl"])
def test_an_export_keeps_the_settings_for_videos(
    awkward: Awkward, tmp_path: Path, name: str
) -> None:
    export_merged(Policy(base=awkward(name)), tmp_path / "merged", "# A policy\n")
    videos = json.loads((tmp_path / "merged" / "video_preprocessor_config.json").read_text())
    assert videos["image_mean"]


# Padding to a square


def padded(awkward: Awkward) -> ModelConfig:
    return awkward("cropping").model_copy(update={"pad_to_square": True})


def pixels(processor: Any, image: Image.Image) -> torch.Tensor:
    text = prompt_text(processor, "What?")
    batch = processor(images=[[image]], text=[text], return_tensors="pt", add_special_tokens=False)
    found: torch.Tensor = batch["pixel_values"]
    return found


def test_llava_1_5_sees_the_edges_of_a_wide_image_only_if_it_is_padded(awkward: Awkward) -> None:
    image = Image.new("RGB", (120, 30), "navy")
    marked = image.copy()
    marked.paste((255, 0, 0), (0, 0, 20, 30))
    cropping, padding = load_processor(awkward("cropping")), load_processor(padded(awkward))
    assert torch.equal(pixels(cropping, image), pixels(cropping, marked))
    assert not torch.equal(pixels(padding, image), pixels(padding, marked))


def test_the_padding_has_the_processors_mean_colour(awkward: Awkward) -> None:
    # A column of 60 x 20 in the middle of 60 x 60; the mean colour is 0 once normalised, up to the
    # rounding to a whole number of 255: 0.5 / 255 / 0.26 = 0.008.
    image = Image.new("RGB", (20, 60), "white")
    seen = pixels(load_processor(padded(awkward)), image)[0]
    assert seen.shape == (3, tiny_models.SIDE, tiny_models.SIDE)
    left, middle = seen[:, :, 2], seen[:, :, tiny_models.SIDE // 2]
    assert left.abs().max() < 0.016
    assert middle.min() > 1


def test_an_export_pads_as_the_policy_did(awkward: Awkward, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    base = padded(awkward)
    export_merged(Policy(base=base), tmp_path / "merged", "# A policy\n")
    image = tiny_models.image(120, 30)
    exported = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert torch.equal(pixels(exported, image), pixels(load_processor(base), image))


def test_only_llava_1_5_is_padded(awkward: Awkward) -> None:
    base = awkward("llava-next-shapes").model_copy(update={"pad_to_square": True})
    with pytest.raises(UserError, match=r"pad_to_square.*'llava_next'"):
        load_processor(base)


def test_the_preset_of_llava_1_5_pads() -> None:
    assert load_config("llava-1.5-7b").model.pad_to_square
