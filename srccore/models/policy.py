"""A policy: a base checkpoint plus LoRA adapters, folded into its weights in order when it loads.

Assumes a checkpoint of one of `srccore.models.families`, in Hugging Face layout with safetensors
weights; code from a checkpoint is never run. The texts of prompts and responses are built only
here, so that training and inference see the same token ids.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from srccore import storage
from srccore.config import ModelConfig, TextModelConfig
from srccore.errors import UserError
from srccore.files import write_json
from srccore.models.families import family_of, image_tokens, load_processor_of
from srccore.models.folding import Folding, fold_adapters
from srccore.models.plain_text import without_control_tokens

__all__ = [
    "LoadedPolicy",
    "Policy",
    "checkpoint_family",
    "drawn_text",
    "load_policy",
    "load_processor",
    "load_weights",
    "loading",
    "parse_policy",
    "pinned",
    "policy_document",
    "prompt_text",
    "prompt_tokens",
    "read_policy",
    "resolve_model_path",
    "response_text",
    "write_policy",
]

Checkpoint = TypeVar("Checkpoint", bound=TextModelConfig)
EMBEDDED = {"embedded:lvlm": "lvlm", "embedded:rating": "rating"}
VERSION = 1
POLICY_FILE = "policy.json"


class Policy(BaseModel):
    """The LVLM being calibrated, by reference: a base model and adapter folders in order."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    base: ModelConfig
    adapters: tuple[str, ...] = ()
    """PEFT adapter folders: absolute paths after reading, or ``s3://...``."""

    def with_adapter(self, adapter: Path) -> Policy:
        """Returns this policy with one more adapter on top."""
        return self.model_copy(update={"adapters": (*self.adapters, str(adapter.resolve()))})


class _PolicyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    record: Literal["policy"]
    version: Literal[1]
    policy: Policy


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy in memory: the model with all adapters folded in, and its processor."""

    model: Any
    """A model for conditional generation of one of `srccore.models.families`, in eval mode."""
    processor: Any
    folding: Folding
    """How much of the adapters is in the weights."""


def write_policy(path: Path, policy: Policy) -> None:
    """Writes a policy file; paths of local adapters are relative to it, so a run can be moved.

    Args:
        path: The file, or the folder in which to write ``policy.json``.
        policy: The policy.
    """
    if path.is_dir():
        path = path / POLICY_FILE
    folder = path.parent.resolve()
    adapters = tuple(
        name if storage.is_remote(name) else os.path.relpath(Path(name).resolve(), folder)
        for name in policy.adapters
    )
    write_json(path, policy_document(policy.model_copy(update={"adapters": adapters})))


def read_policy(path: Path) -> Policy:
    """Reads a policy file.

    Args:
        path: The file, or the folder with ``policy.json``.

    Returns:
        The policy, with absolute adapter paths or URIs.

    Raises:
        UserError: The file is missing, of another version, or not a policy.
    """
    if path.is_dir():
        path = path / POLICY_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"The policy {path} cannot be read ({reason}).",
            "Pass a folder that a training stage wrote.",
        ) from None
    policy = parse_policy(text, str(path))
    folder = path.parent.resolve()
    adapters = tuple(
        name if storage.is_remote(name) else os.path.realpath(folder / name)
        for name in policy.adapters
    )
    return policy.model_copy(update={"adapters": adapters})


def parse_policy(text: str, source: str) -> Policy:
    """Parses the text of a policy file.

    Args:
        text: The JSON.
        source: Where it comes from, for the error.

    Returns:
        The policy; adapter paths are unchanged, relative to the file or not.

    Raises:
        UserError: The text is of another version, or not a policy.
    """
    try:
        return _PolicyFile.model_validate_json(text).policy
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{source} is not a policy of version {VERSION}: {name}: {first['msg']}.",
            "Pass a policy.json written by this version of srccore.",
        ) from None


def policy_document(policy: Policy) -> dict[str, Any]:
    """Returns the content of a policy file, with adapter paths unchanged."""
    document = _PolicyFile(record="policy", version=VERSION, policy=policy)
    return document.model_dump(mode="json")


def resolve_model_path(path: str) -> str:
    """Finds a checkpoint.

    Args:
        path: ``embedded:lvlm``, ``embedded:rating``, a folder, ``s3://...`` or a hub id.

    Returns:
        A folder (a checkpoint in a bucket is fetched first), or the hub id unchanged.

    Raises:
        UserError: The folder is not a checkpoint with safetensors weights, or there is no such
            embedded model.
    """
    if path.startswith("embedded:"):
        if path not in EMBEDDED:
            raise UserError(
                f"There is no embedded model {path!r}.", f"Use {' or '.join(EMBEDDED)}."
            )
        models = resources.files("srccore") / "embedded" / "models"
        folder = Path(str(models)) / EMBEDDED[path]
    elif storage.is_remote(path):
        folder = storage.fetch(path)
    else:
        folder = Path(path).expanduser()
        looks_like_hub_id = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
        if not folder.exists() and looks_like_hub_id:
            return path
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The folder {folder} has no config.json, so it is not a model checkpoint.",
            "Pass a folder in Hugging Face layout, or a hub id.",
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"The checkpoint {folder} has no *.safetensors weights.",
            "Convert it with save_pretrained; pickled weights are not loaded.",
        )
    return str(folder)


def pinned(base: Checkpoint) -> Checkpoint:
    """Pins a checkpoint of the model hub to the commit that its revision names at present.

    Args:
        base: The checkpoint.

    Returns:
        It, with the commit as its revision if it is of the hub. Where the hub cannot be reached,
        the commit is that of the copy on this machine.

    Raises:
        UserError: The hub has no such checkpoint or revision, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionResolutionError

    path = resolve_model_path(base.path)
    if Path(path).is_dir():
        return base
    with loading(base.path):
        try:
            commit = HfApi().resolve_revision(path, revision=base.revision).resolved
        except RevisionResolutionError as error:
            raise OSError(str(error)) from None
    return base.model_copy(update={"revision": commit})


def checkpoint_family(base: ModelConfig) -> str:
    """Returns the family of a checkpoint, one of `srccore.models.families`.

    Raises:
        UserError: The checkpoint does not exist, or its family is not supported.
    """
    path = resolve_model_path(base.path)
    with loading(base.path):
        return family_of(path, base.revision)


def load_processor(base: ModelConfig) -> Any:
    """Loads a checkpoint's processor, with the chat template that the configuration names.

    Args:
        base: The checkpoint.

    Returns:
        The processor of its family, for images and text.

    Raises:
        UserError: The checkpoint or the template does not exist, or its family is not supported.
    """
    family, path = checkpoint_family(base), resolve_model_path(base.path)
    with loading(base.path):
        processor = load_processor_of(family, path, base.revision)
    if base.pad_to_square:
        processor.image_processor = _padding(processor.image_processor, family, base.path)
    if base.chat_template is not None:
        processor.chat_template = _template(base.chat_template)
    with loading(base.path):
        prompt_text(processor, "What is shown?")  # A template is only read when it is used.
    return processor


def _padding(images: Any, family: str, path: str) -> Any:
    """Makes the image processor of LLaVA-1.5, which pads to squares, from the one that crops.

    Public checkpoints name CLIP's processor, which scales the shorter side and cuts the rest off,
    but LLaVA-1.5 was trained on images padded with the mean colour.
    """
    from transformers import LlavaImageProcessorPil

    if family != "llava":
        raise UserError(
            f"model.pad_to_square is for checkpoints of LLaVA-1.5, but {path} is of the family "
            f"{family!r}, whose processor shows the model the whole image.",
            "Set model.pad_to_square to false.",
        )
    return LlavaImageProcessorPil.from_dict({**images.to_dict(), "do_pad": True})


@contextlib.contextmanager
def loading(path: str | Path) -> Iterator[None]:
    """Explains what goes wrong when a library reads a checkpoint.

    Args:
        path: A folder or a hub id.

    Raises:
        UserError: It cannot be read, or only by code that comes with it.
    """
    try:
        yield
    except (UserError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as error:  # Damaged files raise all kinds of errors in the libraries.
        reason = " ".join(str(error).split())
        # The checkpoint is in order: the GPU is not, or is too small.
        if type(error).__name__ == "OutOfMemoryError" or "CUDA error" in reason:
            raise
        if "trust_remote_code" in reason:
            raise UserError(
                f"The checkpoint {path} can only be loaded by code that comes with it, which is "
                "never run.",
                "Use a checkpoint of a class that transformers has.",
            ) from None
        raise UserError(
            f"The checkpoint {path} cannot be loaded: {reason[:300]}",
            "Check the path: a name that is not a folder is looked up on the model hub.",
        ) from None


def load_weights(model: Any, path: str | Path, **settings: Any) -> Any:
    """Loads a model with all its weights: transformers draws those that are missing at random.

    Args:
        model: One of transformers' ``AutoModel`` classes.
        path: A folder or a hub id.
        settings: Further arguments of its ``from_pretrained``.

    Returns:
        The model.

    Raises:
        UserError: The checkpoint cannot be loaded, or is not whole.
    """
    with loading(path):
        loaded, report = model.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"The checkpoint {path} lacks {len(missing)} of the model's weights: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}.",
            "Copy it again, or use another one of the same family.",
        )
    return loaded


def load_policy(policy: Policy, device: str = "cpu") -> LoadedPolicy:
    """Loads the base model and folds the adapters into its weights.

    Args:
        policy: The policy.
        device: ``cpu`` or ``cuda`` (or ``cuda:N``).

    Returns:
        The model in eval mode and its processor.

    Raises:
        UserError: A checkpoint, template or adapter is missing, the checkpoint's family is not
            supported, or an adapter is not plain LoRA.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    checkpoint_family(policy.base)
    model = load_weights(
        AutoModelForImageTextToText,
        resolve_model_path(policy.base.path),
        revision=policy.base.revision,
        dtype=getattr(torch, policy.base.dtype),
        # Straight to the device: processes of one machine would each need host memory for it.
        device_map={"": device},
    )
    folding = fold_adapters(model, policy.adapters)
    return LoadedPolicy(model=model.eval(), processor=load_processor(policy.base), folding=folding)


def prompt_text(processor: Any, question: str) -> str:
    """Writes the prompt of a question about one image, ready for the processor.

    Tokenise it with ``add_special_tokens=False``: the template has already written the BOS.

    Args:
        processor: The policy's processor.
        question: The question.

    Returns:
        The prompt with one placeholder for the image, up to where the response starts.
    """
    asked = _plain(processor, question).strip()
    content = [{"type": "image"}, {"type": "text", "text": asked}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def prompt_tokens(processor: Any, prompt: str, size: tuple[int, int]) -> int:
    """Counts the tokens of a prompt, those of its image included.

    Args:
        processor: The policy's processor.
        prompt: What `prompt_text` wrote.
        size: Width and height of the image.
    """
    # The prompt's own placeholder already counts as one token.
    return len(_encode(processor.tokenizer, prompt)) + image_tokens(processor, size) - 1


def response_text(processor: Any, response: str) -> str:
    """Writes a response as it follows the prompt, with the token that ends it.

    Surrounding white space of the response is stripped. The text is meant to be tokenised
    separately from the prompt (``add_special_tokens=False``), as TRL does, and then gives the same
    ids as the whole: for a tokenizer that puts a space before every text (Llama's), the
    template's own space is left out. So join token ids, never the two texts.

    Args:
        processor: The policy's processor.
        response: What the policy said, or should say.

    Returns:
        The text of the response, including the end-of-turn token.

    Raises:
        UserError: The chat template writes no end after a response, or changes the prompt.
    """
    question = "What is shown?"
    prompt = prompt_text(processor, question)
    said = _plain(processor, response).strip()
    whole: str = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ],
        tokenize=False,
    )
    rest = whole.removeprefix(prompt)
    # Some templates write a line break after the end of a turn; a model stops before it.
    text = rest.rstrip("\n")
    tokenizer = processor.tokenizer
    ids = _encode(tokenizer, text)
    special = tokenizer.added_tokens_decoder
    if not whole.startswith(prompt) or ids[-1] not in special or not special[ids[-1]].special:
        raise UserError(
            "The checkpoint's chat template writes no end-of-turn token after a response, "
            "or a different prompt before it, so the policy would not learn to stop.",
            "Set model.chat_template to a template of srccore/presets/templates.",
        )
    before, wanted = _encode(tokenizer, prompt), _encode(tokenizer, prompt + text)
    for candidate in (text, text.removeprefix(" ")):
        if before + _encode(tokenizer, candidate) == wanted:
            return candidate
    raise UserError(
        "The chat template's prompt does not end on a token boundary.",
        "Set model.chat_template to a template of srccore/presets/templates.",
    )


def drawn_text(processor: Any, drawn: str) -> str:
    """Writes a response that the policy drew, as `response_text` does, but byte by byte.

    The policy may have begun without the template's space; with one, it would be another text.

    Args:
        processor: The policy's processor.
        drawn: What the policy wrote.

    Returns:
        The text of the response, including the end-of-turn token.

    Raises:
        UserError: As in `response_text`.
    """
    return _plain(processor, drawn) + _end_of_turn(processor)


@functools.lru_cache(maxsize=2)
def _end_of_turn(processor: Any) -> str:
    said = "Yes."
    return response_text(processor, said).partition(said)[2]


def _plain(processor: Any, text: str) -> str:
    """Removes control tokens, and LLaVA's placeholder for an image.

    Many data sets repeat ``<image>`` in the question, whatever the model's own placeholder is.
    """
    named = (value for name, value in vars(processor).items() if name.endswith("_token"))
    own = [value for value in named if isinstance(value, str) and value]
    return without_control_tokens(processor.tokenizer, text, ["<image>", *own])


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _template(name: str) -> str:
    folder = resources.files("srccore") / "presets" / "templates"
    names = sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir())
    if name not in names:
        raise UserError(f"There is no chat template {name!r}.", f"Use {' or '.join(names)}.")
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")
