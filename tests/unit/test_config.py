"""Presets and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from srccore.config import RunConfig, identity, load_config, preset_names, validate_config
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
        ("name=2020-13-45", "not YAML"),
        ("name=\0", "not YAML"),
        ("seed=" + "1" * 5000, "not YAML"),
        ("name=" + "[" * 5000, "not YAML"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("seed=4294967296", "seed must be less than"),
        ("dpo.lora.target_modules=(", "dpo.lora.target_modules: not a regular expression"),
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


# YAML that is not what it seems


def preset(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
)
MERGES = "\n".join(
    ["a0: &a0 {k: v}"]
    + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, r"it stands for 1,2\d\d,\d\d\d,\d\d\d,\d\d\d values, more than 10,000"),
        (MERGES, "values, more than 10,000"),
        ("a: &a [*a]", "an alias is inside what it stands for"),
        ("name: x\nseed: 1\nname: y", "'name' is there twice, the second time in line 3"),
        ("search: {width: 1, width: 2}", "'width' is there twice"),
        ("name: " + "x" * 100_000, "it has more than 100,000 bytes"),
        ("[" * 50_000, "it is nested too deeply"),
        ("name: 0000-00-00", "year 0 is out of range|year must be in"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=range(9),
)
def test_yaml_that_is_too_large_or_repeats_a_key_is_refused(
    tmp_path: Path, text: str, told: str
) -> None:
    with pytest.raises(UserError, match=f"is not YAML in UTF-8: .*({told})"):
        load_config(preset(tmp_path, text))


def test_an_alias_may_be_used(tmp_path: Path) -> None:
    values = load_config("tiny").model_dump(mode="json")
    values["rationale"]["lora"] = values["dpo"]["lora"]
    text = yaml.safe_dump(values)
    assert "*id001" in text
    config = load_config(preset(tmp_path, text))
    assert config.rationale.lora == config.dpo.lora


@pytest.mark.parametrize("path", ["~no-such-user/model", "x" * 5000, "a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_kept_as_it_is(path: str) -> None:
    values = load_config("tiny").model_dump(mode="json")
    values["model"]["path"] = path
    try:
        assert validate_config(values, "configuration").model.path == path
    except UserError as error:
        assert "model.path" in str(error)  # what is not Unicode is not text


def test_a_preset_with_a_name_that_no_file_can_have_does_not_exist() -> None:
    with pytest.raises(UserError, match="There is no preset"):
        load_config("x" * 5000 + ".yaml")
