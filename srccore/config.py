"""The configuration of a run: one frozen model per stage, presets, overrides by dotted name.

A preset is a YAML file of these models' fields. Unknown names are refused, with the names that
exist, and so are invalid values; nothing that the paper or the preset should give has a silent
default.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from srccore.errors import UserError
from srccore.shown import has_credentials, shown

__all__ = [
    "MAX_CANDIDATES",
    "AnnotationConfig",
    "AugmentationConfig",
    "CurationConfig",
    "DataConfig",
    "DpoConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LoraSettings",
    "ModelConfig",
    "PolicyTrainingSettings",
    "RationaleTuningConfig",
    "RunConfig",
    "ScorerConfig",
    "ScoringConfig",
    "SearchConfig",
    "TextModelConfig",
    "apply_overrides",
    "explain",
    "identity",
    "load_config",
    "preset_names",
    "read_yaml",
    "read_yaml_file",
    "texts",
    "validate_config",
]

TeacherName = Literal["facts", "endpoint"]
MAX_CANDIDATES = 8
"""The most candidates of one sample: with the reference, 72 ratings (reconstruction)."""
MAX_YAML_BYTES = 100_000
"""Of a preset or profile; the shipped ones have less than 10,000."""
MAX_YAML_VALUES = 10_000
"""Of a preset or profile, counting those that an alias (``*name``) repeats each time."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""As numpy takes it."""
OPERATIONAL = object()
"""Marks a field that says how the work is done and does not change what comes out: see
`identity`."""


class Section(BaseModel):
    """Base of all configuration: frozen, no unknown fields, no passwords in URLs."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _no_credentials(cls, value: Any) -> Any:
        """Refuses what would be stored with the run: in run.json, manifests, the report, jobs."""
        if any(has_credentials(text) for text in texts(value)):
            raise ValueError(
                "a URL must not have a user name or password in it, which would be stored with the "
                "run; pass them in environment variables, on a cluster from a Secret"
            )
        return value


def texts(value: Any) -> Iterator[str]:
    """Yields all texts in JSON-like values, except those of sections, which check their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for each in value.values() for text in texts(each))
    elif isinstance(value, list | tuple):
        yield from (text for each in value for text in texts(each))


def identity(section: BaseModel) -> dict[str, Any]:
    """Returns what identifies a configuration: all but the `OPERATIONAL` fields.

    Args:
        section: A configuration or a section of one.

    Returns:
        JSON-like values by dotted name.
    """
    found: dict[str, Any] = {}
    dumped = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found |= {f"{name}.{inner}": each for inner, each in identity(value).items()}
        elif OPERATIONAL not in info.metadata:
            found[name] = dumped[name]
    return found


def _pattern(text: str | None) -> str | None:
    try:
        re.compile(text or "")
    except (re.error, RecursionError) as error:
        raise ValueError(f"not a regular expression ({error})") from None
    return text


class DataConfig(Section):
    """Where the samples come from, and how many of each split are used.

    Either ``source: embedded`` (generated from a seed), or a data set that is split by a stable
    hash of the sample ids.
    """

    source: str = "embedded"
    """``embedded``, or the path or ``s3://...`` of a data set (see ``srccore data validate``)."""
    seed: Seed = 0
    train: int = Field(default=1200, ge=4)
    """Samples of stage 1 and of R-Scorer's training."""
    calibration: int = Field(default=900, ge=4)
    """Samples from which the rounds draw."""
    heldout: int = Field(default=600, ge=4)
    """Samples that only `evaluate` reads."""


class TextModelConfig(Section):
    """A pretrained checkpoint in Hugging Face layout."""

    path: str
    """A folder, ``s3://...``, a hub id, or ``embedded:lvlm`` / ``embedded:rating``."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ModelConfig(TextModelConfig):
    """A vision-language checkpoint."""

    chat_template: str | None = None
    """A template of `srccore/presets/templates`, for a checkpoint whose own has no EOS."""
    pad_to_square: bool = False
    """Pads images to squares with the processor's mean colour before they are scaled, as LLaVA-1.5
    was trained. Without it, its processor cuts off what is outside the centre square. Only for
    checkpoints of LLaVA-1.5."""


class EngineConfig(Section):
    """What runs a model that writes responses or rates them."""

    name: Literal["transformers", "vllm"] = "transformers"
    """``vllm`` draws and rates several times as fast on a GPU. It draws other random numbers."""
    tensor_parallel_size: Annotated[int, OPERATIONAL] = Field(default=1, ge=1)
    """GPUs that vLLM spreads the model over."""
    memory_share: Annotated[float, OPERATIONAL] = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that vLLM takes."""
    max_length: Annotated[int, OPERATIONAL] = Field(default=8192, ge=1)
    """Tokens of the longest sequence that vLLM has room for: a prompt with its image, and the
    response. No longer than the model allows."""
    sequences: Annotated[int, OPERATIONAL] = Field(default=256, ge=1)
    """Responses that vLLM decodes at the same time."""


class LoraSettings(Section):
    """A LoRA adapter on the language model's linear layers."""

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: Annotated[str | None, AfterValidator(_pattern)] = None
    """A regular expression for names of modules; None is all linear layers of the language model's
    blocks. ``all-linear`` would match the vision tower too."""


class OptimizerSettings(Section):
    """What all training stages share."""

    learning_rate: float = Field(gt=0)
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=8, ge=1)
    """Samples of one forward pass, when one process trains."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes of one optimiser step. Several processes share the step's samples."""
    warmup_ratio: float = Field(default=0.05, ge=0, le=1)
    gradient_checkpointing: bool = False
    report_to: Annotated[str, OPERATIONAL] = "none"
    """Passed on to TRL: ``tensorboard``, ``wandb``, ..."""
    checkpoint_minutes: Annotated[float, OPERATIONAL] = Field(default=10.0, ge=0)
    """Longest time between two checkpoints, from which an interrupted training resumes; 0 keeps
    none. There are at least ten, unless saving them would take a tenth of the time."""


class PolicyTrainingSettings(OptimizerSettings):
    """What the trainings of a policy share."""

    image_workers: Annotated[int, OPERATIONAL] = Field(default=0, ge=0)
    """Processes that read and preprocess images ahead of the training, for each process that
    trains; with 0, it waits for its images."""
    lora: LoraSettings


class EndpointConfig(Section):
    """An OpenAI-compatible endpoint. The key comes from the environment variable named here."""

    url: Annotated[str | None, OPERATIONAL] = None
    model: str | None = None
    api_key_env: Annotated[str, OPERATIONAL] = "OPENAI_API_KEY"
    concurrency: Annotated[int, OPERATIONAL] = Field(default=8, ge=1)
    retries: Annotated[int, OPERATIONAL] = Field(default=5, ge=0)
    timeout: Annotated[float, OPERATIONAL] = Field(default=120.0, gt=0)
    """Seconds for one attempt of a request, in total."""
    temperature: float = Field(default=0.0, ge=0)
    max_tokens: int = Field(default=512, ge=1)

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("must be the name of an environment variable, and not the key")
        return value


class AugmentationConfig(Section):
    """`augment-rationales`: rationales for samples that have none."""

    teacher: TeacherName = "facts"
    endpoint: EndpointConfig = EndpointConfig()


class RationaleTuningConfig(PolicyTrainingSettings):
    """`tune-rationale`: stage 1 of the paper."""

    samples: int = Field(ge=1)
    min_format_rate: Annotated[float, OPERATIONAL] = Field(default=0.8, ge=0, le=1)
    """Share of responses that must have a rationale and an answer after the training, or the run
    stops before anything expensive is done."""


class AnnotationConfig(Section):
    """`annotate-ratings`: teacher ratings on pairs of sampled responses."""

    teacher: TeacherName = "facts"
    endpoint: EndpointConfig = EndpointConfig()
    samples: int = Field(ge=1)
    """Samples of the train split that are sampled and annotated."""
    candidates: int = Field(default=5, ge=2, le=MAX_CANDIDATES)
    """Responses sampled for each of them."""
    temperature: float = Field(default=1.0, gt=0)
    pairs: int = Field(default=6, ge=1)
    """Unordered pairs annotated per sample."""
    reference_pairs: int = Field(default=2, ge=0)
    """Further pairs of a sample: a response and the reference response, which R-Scorer also rates
    against each other."""
    validation_share: float = Field(default=0.15, gt=0, lt=1)
    """Share of the samples that R-Scorer is tested on and not trained on."""


class ScorerConfig(OptimizerSettings):
    """`train-scorer`: R-Scorer, a text-only language model."""

    lora: LoraSettings | None = None
    """None trains all weights."""


class SearchConfig(Section):
    """`search-candidates`: sentence-level beam search (reconstruction; see docs/method.md)."""

    strategy: Literal["beam", "sample"] = "beam"
    """``sample`` draws whole responses: the baseline."""
    samples: int = Field(ge=1)
    """Samples of a round, drawn 2:1:1."""
    width: int = Field(default=4, ge=1)
    branch: int = Field(default=3, ge=1)
    diverse: int = Field(default=1, ge=0)
    candidates: int = Field(default=5, ge=2, le=MAX_CANDIDATES)
    temperature: float = Field(default=0.8, gt=0)
    similarity: float = Field(default=0.9, gt=0, le=1)
    """Siblings that differ only in words without content, such as articles, are merged if at least
    this share of their words match in sequence."""
    max_sentences: int = Field(default=10, ge=1)
    max_sentence_tokens: int = Field(default=96, ge=1)
    fill_attempts: int = Field(default=2, ge=1)
    """How often whole responses are drawn, `candidates` at a time, for a sample that has too few
    candidates: after the beams, or instead of them (``strategy: sample``)."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Most tokens of the prompts, their images included, that the engine transformers searches
    together; a longer prompt is searched by itself."""
    engine: EngineConfig = EngineConfig()
    """What draws responses, those of `sample-responses`, too."""

    @model_validator(mode="after")
    def _diverse_fits(self) -> SearchConfig:
        if self.diverse > self.width:
            raise ValueError("diverse must not be larger than width")
        return self


class ScoringConfig(Section):
    """`score-candidates`: R-Scorer's ratings of all ordered pairs."""

    batch_tokens: int = Field(default=8192, ge=1)
    """Most tokens of one forward pass of the engine transformers; what prompts share at their start
    counts once."""
    engine: EngineConfig = EngineConfig()
    """What runs R-Scorer."""
    require_reference: bool = True
    """Leave samples unrated that have neither a reference rationale nor facts: R-Scorer sees no
    image and could only compare with the answer."""


class CurationConfig(Section):
    """`curate-preference`: ratings to preferences."""

    min_margin: float = Field(default=0.2, ge=0, le=1)
    """The least folded verdict, in [-1, 1], on the chosen against the rejected response."""
    rejected: Literal["worst", "likeliest"] = "worst"
    """Which response is rejected: the one with the lowest value (paper), or the likeliest of those
    that are worse than the chosen one by at least `min_margin`."""
    anchor_tolerance: float = Field(default=0.5, ge=0, le=1)
    """How much worse than the reference response R-Scorer may find the chosen one: the folded
    verdict on chosen against reference is at least minus this. 0.5 is that of a sure rating "the
    reference is better", but not "much better". 1 turns this off."""
    # YAML reads a bare `off` as false.
    answer_gate: Annotated[
        Literal["chosen", "strict", "off"],
        BeforeValidator(lambda value: "off" if value is False else value),
    ] = "chosen"
    keep_fraction: float = Field(default=1.0, gt=0, le=1)


class DpoConfig(PolicyTrainingSettings):
    """`train-dpo`: preference fine-tuning."""

    beta: float = Field(default=0.1, gt=0)
    sft_weight: float = Field(default=0.02, ge=0)
    """Weight of the SFT term on the chosen response (paper: 0.02)."""
    reference: Literal["computed", "drawn"] = "computed"
    """Where the reference's log-probabilities come from: a forward pass, once per preference and
    training, or the search that drew the responses, which saves that pass. A response that isn't
    encoded as it was drawn is computed anyway. The search must have drawn from the same policy.
    Its kernels round differently: in bfloat16, log ratios don't start from 0 exactly."""
    sft_normalization: Literal["response", "token"] = "response"
    """What the SFT term is a mean over: responses, whose tokens are added up (RPO, which the paper
    cites), or all tokens. Per token the same weight is weaker by the length of a response."""


class EvaluationConfig(Section):
    """`evaluate`: greedy responses on the held-out split."""

    batch_tokens: int = Field(default=32768, ge=1)
    """Most tokens of the prompts, their images included, that the engine transformers answers
    together; a longer prompt is answered by itself."""
    engine: EngineConfig = EngineConfig()
    """What writes the responses."""
    max_tokens: int = Field(default=512, ge=1)
    resamples: int = Field(default=1000, ge=100)
    """Bootstrap resamples of an interval."""
    judge: Literal["none", "endpoint"] = "none"
    """Who judges rationales if the data have no facts; facts are always checked by program."""
    endpoint: EndpointConfig = EndpointConfig()


ENGINE_SECTIONS = ("search", "scoring", "evaluation")
"""The sections of stages that run an engine."""


class RunConfig(Section):
    """A whole run, as `srccore run` reads it from a preset."""

    name: str
    seed: Seed = 0
    rounds: Annotated[int, OPERATIONAL] = Field(default=3, ge=1)
    shards: int = Field(default=1, ge=1)
    """Parts of a round's samples that are searched and scored separately."""
    threads: Annotated[int | None, OPERATIONAL] = Field(default=None, ge=1)
    """CPU threads of torch; None keeps torch's default."""
    device: Annotated[Literal["auto", "cpu", "cuda"], OPERATIONAL] = "auto"
    on_regression: Literal["continue", "keep_previous"] = "continue"
    """What to do when a round lowers the aligned accuracy on the calibration split by more than its
    interval (the accuracy, if the data have no facts)."""
    engine: EngineConfig = EngineConfig()
    """The engine of `search`, `scoring` and `evaluation`, where these do not say otherwise."""
    data: DataConfig = DataConfig()
    model: ModelConfig
    rating_model: TextModelConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    rationale: RationaleTuningConfig
    annotation: AnnotationConfig
    scorer: ScorerConfig
    search: SearchConfig
    scoring: ScoringConfig = ScoringConfig()
    curation: CurationConfig = CurationConfig()
    dpo: DpoConfig
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _spread_engine(cls, values: Any) -> Any:
        """Gives the sections that run an engine the settings of all."""
        shared = values.get("engine") if isinstance(values, Mapping) else None
        if not isinstance(shared, Mapping):
            return values
        spread = dict(values)
        for name in ENGINE_SECTIONS:
            section = values.get(name, {})
            own = section.get("engine", {}) if isinstance(section, Mapping) else None
            if isinstance(own, Mapping):
                spread[name] = {**section, "engine": {**shared, **own}}
        return spread


def preset_names() -> list[str]:
    """Returns the names of the presets in the package."""
    folder = resources.files("srccore") / "presets"
    return sorted(
        Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_config(preset: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads a preset and applies overrides.

    Args:
        preset: A name of `preset_names`, or the path of a YAML file.
        overrides: ``dotted.name=value`` each, the value in YAML (``search.width=6``).

    Returns:
        The configuration.

    Raises:
        UserError: The preset does not exist or cannot be read, a name is unknown, or a value is
            invalid.
    """
    start = "Start from a copy of a shipped preset."
    path = _preset_path(preset)
    try:
        values = read_yaml_file(path)
    except OSError as error:
        raise UserError(f"Cannot read the preset {preset}: {error.strerror}.", start) from None
    except ValueError as error:
        raise UserError(f"The preset {preset} is not YAML in UTF-8: {error}.", start) from None
    if not isinstance(values, dict):
        raise UserError(f"The preset {preset} is not a YAML mapping.", start)
    apply_overrides(values, overrides)
    return validate_config(values, f"configuration ({preset})")


def read_yaml_file(path: Path) -> Any:
    """Reads a YAML file; see `read_yaml`.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not such YAML, or not in UTF-8.
    """
    with path.open("rb") as file:
        return read_yaml(file.read(MAX_YAML_BYTES + 1).decode())


def read_yaml(text: str) -> Any:
    """Reads YAML of a size that a configuration may have.

    Args:
        text: One document. Aliases are allowed, but a few lines of them can stand for billions of
            values, so these are counted before anything is made of them.

    Returns:
        What it says; values repeated by an alias are one object.

    Raises:
        ValueError: It is not YAML, is too large, or has a key twice; without a full stop.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"it has more than {MAX_YAML_BYTES:,} bytes")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _values_in(node, {})) > MAX_YAML_VALUES:
            raise ValueError(f"it stands for {count:,} values, more than {MAX_YAML_VALUES:,}")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Besides its own errors: an impossible date, or a number with too many digits.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """Counts the values of a node, those that an alias repeats each time.

    Args:
        node: As PyYAML composed it.
        known: The counts of other nodes by their identity; 0 of those that contain this one.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias is inside what it stands for")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.MappingNode):
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (name := (key.tag, key.value)) in seen:
                    raise ValueError(
                        f"{key.value[:60]!r} is there twice, the second time in line "
                        f"{key.start_mark.line + 1}"
                    )
                seen.add(name)
            count += _values_in(key, known) + _values_in(value, known)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_values_in(value, known) for value in node.value)
    known[id(node)] = count
    return count


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Applies overrides to a configuration's values, in place.

    Args:
        values: As a preset's YAML gives them.
        overrides: ``dotted.name=value`` each, the value in YAML.

    Raises:
        UserError: An override does not have that form, or its name does not exist.
    """
    for override in overrides:
        name, found, text = override.partition("=")
        if not found or not name:
            raise UserError(
                f"--set {override} does not have the form NAME=VALUE.",
                "Write --set search.width=6.",
            )
        try:
            value = read_yaml(text)
        except ValueError:
            raise UserError(f"The value of --set {override} is not YAML.", "Quote it.") from None
        path = name.split(".")
        _override(values, path, value)
        if path[0] == "engine":
            _release_engines(values, path[1:])


def _release_engines(values: dict[str, Any], path: list[str]) -> None:
    """Makes the stages' own engines give way to a later override of the engine of all."""
    for name in ENGINE_SECTIONS:
        section = values.get(name)
        if isinstance(section, Mapping) and isinstance(own := section.get("engine"), Mapping):
            kept = {field: own[field] for field in own if path and field != path[0]}
            values[name] = {**section, "engine": kept}


def validate_config(
    values: Mapping[str, Any],
    source: str,
    advice: str = "Fix it in the preset or pass --set {name}=VALUE.",
) -> RunConfig:
    """Checks a configuration's values.

    Args:
        values: As a preset's YAML gives them.
        source: What they are, for an error: ``configuration (tiny)``.
        advice: How to fix an error; ``{name}`` is the first wrong field.

    Returns:
        The configuration; folders that exist on this machine are absolute.

    Raises:
        UserError: A name is unknown or missing, or a value is invalid.
    """
    try:
        return _with_absolute_folders(RunConfig.model_validate(values))
    except ValidationError as error:
        raise explain(source, error, advice) from None


def _with_absolute_folders(config: RunConfig) -> RunConfig:
    """Lets a run be resumed from any working directory."""
    update: dict[str, BaseModel] = {}
    for section, name in (("data", "source"), ("model", "path"), ("rating_model", "path")):
        values: BaseModel = getattr(config, section)
        written = getattr(values, name)
        # Not `Path.expanduser`, which fails for a user that does not exist.
        path = Path(os.path.expanduser(written))
        if not written.startswith("embedded") and _exists(path):
            update[section] = values.model_copy(update={name: str(path.resolve())})
    return config.model_copy(update=update)


def _preset_path(preset: str) -> Path:
    if preset in preset_names():
        return Path(str(resources.files("srccore") / "presets" / f"{preset}.yaml"))
    path = Path(preset)
    if path.suffix in (".yaml", ".yml") and _exists(path):
        return path
    raise UserError(
        f"There is no preset {preset!r}.",
        f"Choose one of {', '.join(preset_names())}, or pass the path of a YAML file.",
    )


def _exists(path: Path) -> bool:
    """Whether there is such a file or folder; a path that no file can have is none."""
    try:
        return path.exists()
    except OSError:
        return False


def _override(values: dict[str, Any], path: list[str], value: Any) -> None:
    model: type[BaseModel] = RunConfig
    for depth, name in enumerate(path):
        if name not in model.model_fields:
            raise _unknown(".".join(path), path[:depth], name, model)
        inner = _section(model, name)
        if depth == len(path) - 1:
            values[name] = value
        elif inner is None:
            raise UserError(
                f"--set {'.'.join(path)}: {'.'.join(path[: depth + 1])} is not a section.",
                f"Write --set {'.'.join(path[: depth + 1])}=VALUE.",
            )
        else:
            nested = values.get(name)
            values[name] = values = dict(nested) if isinstance(nested, Mapping) else {}
            model = inner


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation
    for option in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _unknown(whole: str, above: list[str], name: str, model: type[BaseModel]) -> UserError:
    names = sorted(model.model_fields)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {'.'.join([*above, close[0]])}?" if close else ""
    where = f"{'.'.join(above)} has" if above else "The sections and settings are"
    return UserError(f"--set {whole} does not exist.{hint}", f"{where} {', '.join(names)}.")


SHOWN_ERRORS = 5
_NUMBER = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "finite_number": "finite",
}
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "dict": "a mapping",
    "model": "a mapping",
    "list": "a list",
    "tuple": "a list",
}


def explain(
    source: str,
    error: ValidationError,
    advice: str,
) -> UserError:
    """Turns what pydantic found into one paragraph, with up to five of the errors.

    Args:
        source: What was read: ``configuration (tiny)``.
        error: What pydantic found.
        advice: How to fix it; ``{name}`` is the first wrong field.

    Returns:
        The error to raise.
    """
    found = error.errors()
    told = [_problem(each) for each in found[:SHOWN_ERRORS]]
    if rest := len(found) - len(told):
        told.append(f"and {rest} more")
    name = ".".join(str(part) for part in found[0]["loc"]) or "NAME"
    return UserError(f"Invalid {source}: {'; '.join(told)}.", advice.format(name=name))


def _problem(error: ErrorDetails) -> str:
    name = ".".join(str(part) for part in error["loc"]) or "the whole"
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return f"{name} is required"
    if kind == "extra_forbidden":
        return f"{name} does not exist"
    if kind == "value_error":
        return f"{name}: {context['error']}"
    if kind in _NUMBER:
        wanted = _NUMBER[kind].format(**context)
    elif kind == "literal_error":
        wanted = context["expected"]
    elif kind.endswith(("_type", "_parsing", "_from_float")):
        wanted = _TYPES.get(kind.partition("_")[0], "")
    else:
        wanted = ""
    value = error["input"]
    got = "" if isinstance(value, Mapping) else f", got {shown(str(value))[:60]!r}"
    if isinstance(value, int | float | None) and not isinstance(value, bool):
        got = f", got {value}"
    return f"{name} must be {wanted}{got}" if wanted else f"{name}: {error['msg']}{got}"
