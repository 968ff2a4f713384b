from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from srccore.config import ModelConfig
from srccore.embedded.model import MODELS
from srccore.errors import UserError
from srccore.models.policy import (
    Policy,
    load_policy,
    load_processor,
    pinned,
    prompt_text,
    read_policy,
    resolve_model_path,
    response_text,
    write_policy,
)
from srccore.training.checkpoints import export_adapter, export_merged

base = tiny_models.base


def test_a_policy_file_moves_with_its_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "round-1" / "adapter").mkdir(parents=True)
    policy = Policy(base=ModelConfig(path="some/hub")).with_adapter(run / "round-1" / "adapter")
    write_policy(run, policy)
    assert read_policy(run) == policy
    shutil.move(run, tmp_path / "moved")
    assert read_policy(tmp_path / "moved").adapters == (
        str(tmp_path / "moved" / "round-1" / "adapter"),
    )


@pytest.mark.parametrize("change", [{"version": 2}, {"record": "samples"}, {"surplus": 1}])
def test_a_policy_file_of_another_kind_or_version_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    write_policy(tmp_path, Policy(base=ModelConfig(path="some/hub")))
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match="version 1"):
        read_policy(tmp_path)


def test_a_policy_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_bytes(b'{"record": "\xff"}')
    with pytest.raises(UserError, match="cannot be read"):
        read_policy(tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tokenizer.json", '"version": "1.0"', '"version": 1.0'),
        ("config.json", '"projection_dim": 128', '"projection_dim": "x"'),
        ("config.json", "{", "[" * 100_000),
        ("chat_template.jinja", "endif", "endf"),
        ("processor_config.json", "{", "\x00"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, name: str, old: str, new: str) -> None:
    shutil.copytree(MODELS / "lvlm", tmp_path / "model")
    file = tmp_path / "model" / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=r"The checkpoint .*model cannot be loaded: "):
        load_processor(ModelConfig(path=str(tmp_path / "model")))


def test_a_checkpoint_that_lacks_weights_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base.path, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "q_proj" in name)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model lacks 1 of the model's weights: .*q_proj\.weight"):
        load_policy(Policy(base=base.model_copy(update={"path": str(tmp_path / "model")})))


def test_model_paths_are_folders_hub_ids_or_embedded_names(tmp_path: Path) -> None:
    assert resolve_model_path("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_model_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        resolve_model_path(str(tmp_path))
    with pytest.raises(UserError, match="embedded:lvlm or embedded:rating"):
        resolve_model_path("embedded:other")


COMMIT = "a1" * 20


@pytest.fixture
def hub(base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A checkpoint of the model hub that is in this machine's cache; the hub is out of reach."""
    cached = tmp_path / "models--some--checkpoint"
    shutil.copytree(base.path, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return base.model_copy(update={"path": "some/checkpoint"})


def test_a_checkpoint_of_the_hub_is_pinned_to_the_commit_that_is_loaded(hub: ModelConfig) -> None:
    assert hub.revision is None
    assert pinned(hub).revision == COMMIT
    # Later stages read the commit from policy.json, whatever the hub has by then.
    assert pinned(pinned(hub)) == pinned(hub)
    load_policy(Policy(base=pinned(hub)))


def test_a_folder_is_not_pinned(base: ModelConfig) -> None:
    assert pinned(base) == base


def test_a_checkpoint_that_cannot_be_pinned_is_an_error(hub: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"checkpoint some/checkpoint cannot be loaded.*'v2'"):
        pinned(hub.model_copy(update={"revision": "v2"}))


def test_an_unknown_chat_template_is_refused_with_the_names(base: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"llava-1\.5 or llava-next-llama3"):
        load_processor(base.model_copy(update={"chat_template": "chatml"}))


def test_folding_one_adapter_equals_pefts_merge(base: ModelConfig, tmp_path: Path) -> None:
    from peft import PeftModel

    path = tiny_models.adapter(base, tmp_path / "a", rank=4, seed=1)
    folded = load_policy(Policy(base=base).with_adapter(path)).model
    plain = load_policy(Policy(base=base)).model
    merged = PeftModel.from_pretrained(plain, path).merge_and_unload()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_two_adapters_are_both_folded(base: ModelConfig, tmp_path: Path) -> None:
    from peft import PeftModel

    first = tiny_models.adapter(base, tmp_path / "a", rank=4, seed=1)
    second = tiny_models.adapter(base, tmp_path / "b", rank=2, seed=2)
    folded = load_policy(Policy(base=base).with_adapter(first).with_adapter(second)).model
    model = load_policy(Policy(base=base)).model
    for path in (first, second):
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_small_deltas_add_up_before_the_cast() -> None:
    # One bfloat16 step above 1 is 2^-7. Four deltas of 2^-9 make 2^-7 together, but each alone
    # rounds back to 1.
    from srccore.models.folding import Adapter, fold_adapters

    linear = torch.nn.Linear(1, 1, bias=False)
    inside = torch.nn.ModuleDict({"language_model": torch.nn.ModuleDict({"layer": linear})})
    model = torch.nn.ModuleDict({"model": inside}).to(torch.bfloat16)
    model.config = SimpleNamespace(model_type="llava")
    ones = (torch.ones(1, 1), torch.ones(1, 1))
    with torch.no_grad():
        linear.weight.fill_(1.0)
    pairs = {"model.language_model.layer": ones}
    small = Adapter(scale=2.0**-9, pairs=pairs, target_modules="x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srccore.models.folding.read_adapter", lambda path: small)
        fold_adapters(model, ["a", "b", "c", "d"])
    assert linear.weight.item() == 1 + 2.0**-7


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}],
)
def test_an_adapter_that_is_more_than_lora_is_refused(
    base: ModelConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tiny_models.adapter(base, tmp_path / "a", rank=2, seed=1)
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=f"has {next(iter(change))} ="):
        load_policy(Policy(base=base).with_adapter(path))


def test_an_adapter_of_another_model_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_models.adapter(base, tmp_path / "a", rank=2, seed=1)
    weights = path / "adapter_model.safetensors"
    wrong = {name: torch.cat([w, w], 1) for name, w in load_file(weights).items() if "_A." in name}
    save_file({**load_file(weights), **wrong}, weights)
    with pytest.raises(UserError, match="does not fit the base model"):
        load_policy(Policy(base=base).with_adapter(path))


def test_prompt_and_response_have_one_bos_and_end_with_the_turn(base: ModelConfig) -> None:
    processor = load_processor(base)
    tokenizer = processor.tokenizer
    texts = (
        prompt_text(processor, tiny_models.QUESTION),
        response_text(processor, tiny_models.RESPONSE),
    )
    ids = [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(processor.image_token_id) == 1


def test_a_placeholder_in_the_question_does_not_ask_for_a_second_image(base: ModelConfig) -> None:
    processor = load_processor(base)
    assert prompt_text(processor, "<image>\nWhat?") == prompt_text(processor, "What?")


def test_prompt_and_response_apart_give_the_ids_of_the_whole(base: ModelConfig) -> None:
    processor = load_processor(base)
    prompt = prompt_text(processor, tiny_models.QUESTION)
    said = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": tiny_models.QUESTION}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": tiny_models.RESPONSE}]},
    ]
    whole = processor.apply_chat_template(said, tokenize=False)
    encode = processor.tokenizer.encode
    texts = (prompt, response_text(processor, tiny_models.RESPONSE))
    apart = [token for text in texts for token in encode(text, add_special_tokens=False)]
    assert apart == encode(whole, add_special_tokens=False)


def test_a_template_without_an_end_of_turn_is_refused(base: ModelConfig) -> None:
    processor = load_processor(base)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'][-1]['text'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(UserError, match="no end-of-turn token"):
        response_text(processor, "It is red.")


def test_a_merged_export_loads_by_itself_with_the_policys_logits(
    base: ModelConfig, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText, AutoProcessor

    policy = Policy(base=base)
    for seed in (1, 2):
        policy = policy.with_adapter(tiny_models.adapter(base, tmp_path / f"{seed}", 2, seed))
    export_merged(policy, tmp_path / "merged", "# A policy\n")
    assert (tmp_path / "merged" / "README.md").read_text() == "# A policy\n"
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names
    loaded = load_policy(policy)
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.chat_template == loaded.processor.chat_template
    assert torch.equal(
        tiny_models.logits(model.eval(), processor),
        tiny_models.logits(loaded.model, loaded.processor),
    )


def test_an_exported_adapter_equals_the_sum_of_the_policys(
    base: ModelConfig, tmp_path: Path
) -> None:
    from peft import PeftModel

    policy = Policy(base=base).with_adapter(tiny_models.adapter(base, tmp_path / "a", 4, 1))
    fewer = r".*language_model.*\.(q_proj|v_proj)"
    policy = policy.with_adapter(tiny_models.adapter(base, tmp_path / "b", 2, 2, fewer))
    export_adapter(policy, tmp_path / "sum", "# The sum\n")
    loaded = load_policy(policy)
    plain = load_policy(Policy(base=base)).model
    wrapped = PeftModel.from_pretrained(plain, tmp_path / "sum").eval()
    torch.testing.assert_close(
        tiny_models.logits(wrapped, loaded.processor),
        tiny_models.logits(loaded.model, loaded.processor),
        atol=1e-5,
        rtol=1e-5,
    )
    again = load_policy(Policy(base=base).with_adapter(tmp_path / "sum")).model
    torch.testing.assert_close(
        tiny_models.logits(again, loaded.processor),
        tiny_models.logits(loaded.model, loaded.processor),
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_merged_export_keeps_a_delta_below_the_spacing_of_its_weights(
    base: ModelConfig, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    from srccore.models.folding import read_adapter

    coarse = base.model_copy(update={"dtype": "bfloat16"})
    path = tiny_models.adapter(base, tmp_path / "a", rank=16, seed=1)
    # Random weights are about 0.02, with a spacing of 1e-4; these deltas are about 1e-5.
    file = path / "adapter_model.safetensors"
    scale = 1e-5 / max(float((b @ a).std()) for a, b in read_adapter(path).pairs.values())
    save_file({n: w * scale**0.5 for n, w in load_file(file).items()}, file)
    policy = Policy(base=coarse).with_adapter(path)
    export_merged(policy, tmp_path / "merged", "# A policy\n")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype="auto")
    plain = load_policy(Policy(base=coarse)).model
    adapter = read_adapter(path)
    kept = true = lost = 0.0
    for name, (a, b) in adapter.pairs.items():
        delta = adapter.scale * (b.double() @ a.double())
        before = plain.get_submodule(name).weight.detach().double()
        after = exported.get_submodule(name).weight.detach()
        assert after.dtype == torch.bfloat16
        kept += float(((after.double() - before) * delta).sum())
        lost += float((((before + delta).bfloat16().double() - before) * delta).sum())
        true += float((delta * delta).sum())
    assert lost / true < 0.5
    # Some 12,000 weights: the projection has a standard deviation of about 0.03.
    assert kept / true == pytest.approx(1, abs=0.15)
    assert load_policy(policy).folding.newest.projection == pytest.approx(kept / true, abs=1e-3)
