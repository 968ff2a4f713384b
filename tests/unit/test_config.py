"""Presets and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from srccore.config import RunConfig, identity, load_config, preset_names
from srccore.errors import UserError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    assert isinstance(load_config(name), RunConfig)


@pytest.mark.parametrize(
    ("name", "rank", "alpha"), [("llava-1.5-7b", 4, 8), ("llava-next-8b", 32, 64)]
)
def test_the_llava_presets_hold_the_numbers_of_the_paper(name: str, rank: int, alpha: int) -> None:
    config = load_config(name)
    assert (config.rationale.lora.rank, config.rationale.lora.alpha) == (rank, alpha)
    assert config.rationale.learning_rate == 1e-5
    assert config.rationale.samples == 20_000
    assert (config.dpo.lora.rank, config.dpo.lora.alpha) == (256, 512)
    assert (config.dpo.beta, config.dpo.sft_weight, config.dpo.learning_rate) == (0.1, 0.02, 5e-7)
    assert config.dpo.sft_normalization == "response"
    # R-Scorer learns from samples that stage 1 does not use.
    assert config.data.train >= config.rationale.samples + config.annotation.samples
    assert (config.search.samples, config.rounds) == (12_000, 3)
    assert (config.search.width, config.search.branch, config.search.candidates) == (4, 3, 5)


def test_an_override_reaches_a_nested_value_and_leaves_its_neighbours() -> None:
    config = load_config("tiny", ["search.width=6", "dpo.lora.rank=8", "seed=3"])
    assert (config.search.width, config.dpo.lora.rank, config.seed) == (6, 8, 3)
    assert config.search.branch == load_config("tiny").search.branch


def test_a_bare_off_closes_no_gate() -> None:
    assert load_config("tiny", ["curation.answer_gate=off"]).curation.answer_gate == "off"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("search.widht=6", "Did you mean search.width"),
        ("serach.width=6", "Did you mean search"),
        ("search.width=wide", "search.width must be an integer, got 'wide'"),
        ("search.width=0", "search.width must be at least 1, got 0"),
        ("search.temperature=0", "search.temperature must be greater than 0, got 0"),
        ("dpo.learning_rate=inf", "dpo.learning_rate must be finite, got 'inf'"),
        ("dpo.learning_rate=.inf", "dpo.learning_rate must be finite, got inf"),
        ("curation.min_margin=.nan", "curation.min_margin must be finite, got nan"),
        ("device=tpu", "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("search=3", "search must be a mapping, got 3"),
        ("data={trian: 3}", "data.trian does not exist"),
        ("seed.x=1", "seed is not a section"),
        ("search.width", "NAME=VALUE"),
        ("search.diverse=9", "diverse must not be larger than width"),
        ("search.width=[", "not YAML"),
    ],
)
def test_a_bad_override_is_told_with_its_mend(override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config("tiny", [override])


def test_up_to_five_errors_are_told_at_once() -> None:
    bad = [f"search.{name}=x" for name in ("samples", "width", "branch", "diverse", "candidates")]
    with pytest.raises(UserError) as caught:
        load_config("tiny", [*bad, "dpo.beta=-1", "dpo.sft_weight=-1"])
    told = str(caught.value)
    assert told.startswith("Invalid configuration (tiny): search.samples must be an integer, got")
    assert "search.candidates must be an integer, got 'x'; and 2 more. " in told
    assert told.endswith("Fix it in the preset or pass --set search.samples=VALUE.")


def test_a_preset_in_another_encoding_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not YAML in UTF-8"):
        load_config(str(path))


def test_an_unknown_preset_is_told_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"no preset 'huge'.*llava-1.5-7b.*tiny"):
        load_config("huge")


def test_a_preset_of_ones_own_is_a_yaml_file(tmp_path) -> None:
    values = load_config("tiny").model_dump(mode="json") | {"name": "mine"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    assert load_config(str(path)).name == "mine"


def test_a_folder_is_kept_absolute_so_that_a_run_goes_on_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny", ["model.path=model", "rating_model.path=org/name"])
    assert config.model.path == str(tmp_path / "model")
    assert config.rating_model.path == "org/name"
    assert config.data.source == "embedded"


def test_how_the_work_is_done_makes_no_other_configuration() -> None:
    config = load_config("tiny")
    same = load_config("tiny", ["threads=3", "rounds=5", "annotation.endpoint.url=http://other/v1"])
    other = load_config("tiny", ["annotation.endpoint.model=other"])
    assert identity(config) == identity(same)
    assert [n for n, v in identity(other).items() if identity(config)[n] != v] == [
        "annotation.endpoint.model"
    ]
    assert {"rationale.lora.rank", "search.width", "seed"} <= identity(config).keys()


def test_the_engine_of_all_stages_gives_way_to_that_of_one() -> None:
    settings = ["engine.name=vllm", "engine.sequences=8", "search.engine.sequences=16"]
    config = load_config("tiny", [*settings, "scoring.engine.name=transformers"])
    assert (config.search.engine.name, config.search.engine.sequences) == ("vllm", 16)
    assert (config.scoring.engine.name, config.scoring.engine.sequences) == ("transformers", 8)
    assert config.evaluation.engine == config.engine


def test_an_override_of_all_engines_also_holds_where_a_preset_names_each(tmp_path: Path) -> None:
    # As `run.json` does, which has every field.
    dumped = load_config("tiny", ["engine.name=vllm", "search.engine.sequences=9"])
    preset = tmp_path / "dumped.yaml"
    preset.write_text(yaml.safe_dump(dumped.model_dump(mode="json")))
    config = load_config(str(preset), ["engine.name=transformers"])
    assert {config.search.engine.name, config.scoring.engine.name} == {"transformers"}
    assert config.search.engine.sequences == 9
    later = load_config(str(preset), ["engine.name=transformers", "search.engine.name=vllm"])
    assert (later.search.engine.name, later.scoring.engine.name) == ("vllm", "transformers")


def test_the_engines_name_changes_what_is_drawn_and_its_memory_does_not() -> None:
    plain = identity(load_config("tiny").search)
    assert identity(load_config("tiny", ["engine.memory_share=0.5"]).search) == plain
    assert identity(load_config("tiny", ["engine.name=vllm"]).search) != plain


def test_a_wrong_engine_is_refused_once_by_name() -> None:
    with pytest.raises(UserError, match=r"engine\.name must be 'transformers' or 'vllm'"):
        load_config("tiny", ["engine.name=vlm"])
