"""What bad input does: seeded mutations of good input, given to everything that reads input.

    python benchmarks/badinput.py --n 10000 --json badinput.json

Counts what must never happen: a traceback (any exception but `UserError`), a hang (a case that
takes longer than its alarm), and a silent acceptance (input that is known to be bad, or that could
not be used later, but was taken). Everything runs in this process; no model is run. A case is made
from the seed and its number alone: ``--only NUMBER`` repeats one and shows its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from srccore.cluster.task import StageTask
from srccore.config import EndpointConfig, load_config, preset_names, validate_config
from srccore.data import records
from srccore.data.dataset import open_data, read_samples, stream_data, validate, write_data
from srccore.data.records import Sample, read_records
from srccore.embedded.model import MODELS
from srccore.errors import UserError
from srccore.method.response import parse, same_answer, write
from srccore.models.policy import read_policy
from srccore.models.teacher import EndpointTeacher, PairRequest, RationaleRequest
from srccore.pipelines.profile import load_profile
from srccore.run.folder import RunFolder
from srccore.run.loop import load_run
from srccore.stages.manifest import read_manifest

SEED = 20261127
ALARM = 20.0
"""CPU seconds; a case takes milliseconds."""
LONGEST_WAIT = 300.0
"""Seconds, for a case that waits: the machine may be busy."""
LONGEST_MESSAGE = 3_000
ROOT = Path(__file__).resolve().parents[1]

Run = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """Something to read."""

    what: str
    """How it was made."""
    run: Run
    """Reads it; raises `UserError` if it is refused, and `UnusableError` if it should have been."""
    is_bad: bool = False
    """Whether it must be refused."""


class UnusableError(Exception):
    """What was accepted cannot be used."""


class Hang(BaseException):
    """The alarm went off. Not an `Exception`, which the code under test may catch."""


Kind = Callable[[random.Random, Path], Case]


# Mutations of bytes and of values


def mangled(rng: random.Random, data: bytes) -> bytes:
    """Changes some bytes: flipped, removed, repeated, inserted or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 100))
        match rng.randrange(6):
            case 0 if changed:
                changed[min(place, len(changed) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length]
            case 3:
                changed[place:place] = rng.randbytes(length)
            case 4:
                changed[place : place + length] = rng.choice(
                    (b"\xff" * length, b"\0" * length, b"\x7f\xff\xff\xff", b"1" * 400)
                )
            case _:
                del changed[place:]
    return bytes(changed)


NOT_NUMBERS: tuple[Any, ...] = ("wide", [], {}, [1], float("nan"), float("inf"), -float("inf"), -1)
ODD: tuple[Any, ...] = (
    *NOT_NUMBERS,
    *(None, True, 0, 10**400, -(2**63), 1e308, 5e-324, "", " ", "\n", "\0", "\x1b[31m", "\u202e"),
    *("a" * 5000, "../" * 40, "~nobody", "/dev/zero", "s3://", "s3://b", "s3:///x", "\u0661"),
    *({"a": {"b": [1]}}, [[[[]]]], {"": 0}, "{x}", "%s", "$(HOME)", "1e400", "2020-13-45"),
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields the path and the value of everything that is not a mapping or a list."""
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def changed_value(rng: random.Random, document: Any) -> tuple[str, bool]:
    """Changes one value of a document in place.

    Returns:
        What was changed, and whether the result is certainly bad.
    """
    if not isinstance(document, dict):
        return "nothing", False
    path, old = rng.choice(list(leaves(document)))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    match rng.randrange(4):
        case 0 if isinstance(inner, dict):
            inner["no_such_name"] = rng.choice(ODD)
            return f"{path[:-1]} has an unknown name", False
        case 1 if isinstance(inner, dict):
            del inner[path[-1]]
            return f"{path} is removed", False
        case 2 if is_number:
            inner[path[-1]] = value = rng.choice(NOT_NUMBERS)
            return f"{path} is {value!r}", True
        case _:
            inner[path[-1]] = value = rng.choice(ODD)
            return f"{path} is {str(value)[:40]!r}", False


# Data sets


def png(size: tuple[int, int] = (4, 3)) -> bytes:
    """A small image."""
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


GOOD = png()
NARROW = png((1, 150))
FACT = {"subject": "the bar", "relation": "is", "value": "3", "aliases": ["three"]}


def good_row(number: int) -> dict[str, Any]:
    """A row of a data set, without its image."""
    return {
        "id": f"s{number}",
        "category": "chart",
        "question": "How many bars?",
        "answer": "3",
        "rationale": "There is a red bar. There are two more.",
        "facts": [dict(FACT, aliases=["three"])],
    }


BAD_VALUES: dict[str, tuple[Any, ...]] = {
    "id": ("", " ", 7, None, "s1", "x" * 300, "\ud800"),
    "category": ("poetry", "", None, 3, ["chart"]),
    "question": ("", "\n", None, 3, {"a": 1}, "x" * 20_001, "\udfff"),
    "answer": ("", "3\n4", "?!", "Answer: 3\nAnswer: 4", None, 3, "x" * 1_001, "a\n\nb"),
    "rationale": ("Answer: 3", "So.\nANSWER :x\nThus.", 3, ["So."], "x" * 20_001),
    "facts": (3, "a", [3], [{}], [FACT] * 101, [{**FACT, "value": ""}], [{**FACT, "more": 1}]),
}


def checked_data(path: Path) -> None:
    """Reads a data set in every way; what is accepted must be usable everywhere."""
    report = validate(path)
    if report.problems:
        first = report.problems[0]
        # Images are only decoded by `validate`; everything else must be refused by all.
        if not any("image" in problem.reason for problem in report.problems):
            for read in (open_data, read_samples):
                with contextlib.suppress(UserError):
                    read(path)
                    raise UnusableError(f"{read.__name__} accepts what validate does not: {first}")
        raise UserError(f"Row {first.row}: {first.reason}.", "Fix it.")
    data = open_data(path)
    if not list(data) == read_samples(path) == [sample for sample, _ in stream_data(path)]:
        raise UnusableError("three ways of reading differ")
    if len(data) != report.rows:
        raise UnusableError(f"{report.rows} rows are {len(data)} samples")
    for sample in data:
        image = data.image(sample.id)
        if image.mode != "RGB" or image.size != data.size(sample.id):
            raise UnusableError(f"an image of {image.mode}, {image.size}")
        usable(sample.rationale or "", sample.answer)


def usable(rationale: str, answer: str) -> None:
    """Checks that a response made of a sample's texts can be read back and is right."""
    parsed = parse(write(rationale, answer))
    if parsed is None or parsed.rationale != rationale.strip():
        raise UnusableError(f"a response that cannot be read back: {rationale!r}, {answer!r}")
    if not same_answer(parsed.answer, answer):
        raise UnusableError(f"an answer that is never right: {answer!r}")


def json_lines(rng: random.Random, folder: Path) -> Case:
    """A folder with samples.jsonl and images."""
    (folder / "good.png").write_bytes(GOOD)
    rows = [good_row(number) | {"image": "good.png"} for number in (1, 2, 3)]
    lines, is_bad = [], True
    match rng.randrange(7):
        case 0:
            name = rng.choice(list(BAD_VALUES))
            value = rng.choice(BAD_VALUES[name])
            rows[1][name] = value
            what = f"{name} is {str(value)[:30]!r}"
            is_bad = not (value is None and name in ("rationale", "facts"))
        case 1:
            names = [
                "none.png",
                "../x.png",
                "/etc/passwd",
                "",
                3,
                "a\0b",
                "x" * 5000,
                "samples.jsonl",
            ]
            rows[1]["image"] = rng.choice(names)
            what = f"image is {str(rows[1]['image'])[:20]!r}"
        case 2:
            (folder / "bad.png").write_bytes(
                rng.choice((b"", GOOD[:20], NARROW, GOOD[:16] + b"\0\xff" * 4 + GOOD[24:]))
            )
            rows[1]["image"] = "bad.png"
            what = "the image is bad"
        case 3:
            what, _ = changed_value(rng, rows[1])
            is_bad = "no_such_name" in rows[1]
        case 4:
            key = rng.choice(list(rows[1]))
            lines = [json.dumps(row) for row in rows]
            lines[1] = lines[1][:-1] + f', "{key}": {json.dumps(rows[1][key])}}}'
            what = f"{key} is there twice"
        case 5:
            (folder / "bad.png").write_bytes(mangled(rng, GOOD))
            rows[1]["image"] = "bad.png"
            what, is_bad = "the image is mangled", False
        case _:
            what, is_bad = "bytes are mangled", False
    text = "\n".join(lines or [json.dumps(row) for row in rows]).encode()
    path = folder / "samples.jsonl"
    path.write_bytes(mangled(rng, text) if what == "bytes are mangled" else text)
    return Case(what, lambda: checked_data(folder), is_bad)


def parquet(rng: random.Random, folder: Path) -> Case:
    """A Parquet file from elsewhere."""
    path = folder / "data.parquet"
    rows = [good_row(number) | {"image": {"bytes": GOOD, "path": None}} for number in (1, 2, 3)]
    settings = {
        "compression": rng.choice(("none", "snappy", "zstd")),
        "use_dictionary": rng.random() < 0.5,
        "data_page_version": rng.choice(("1.0", "2.0")),
        "row_group_size": rng.choice((1, 2, 100)),
    }
    is_bad = True
    match rng.randrange(7):
        case 0:
            name = rng.choice(("id", "category", "question", "answer", "rationale"))
            texts = [value for value in BAD_VALUES[name] if isinstance(value, str)]
            value = rng.choice([text for text in texts if text.isprintable()] or [""])
            rows[1][name] = value
            what = f"{name} is {value[:30]!r}"
            is_bad = not (name == "rationale" and value != "Answer: 3" and len(value) < 20_000)
        case 1:
            name = rng.choice(("id", "category", "question", "answer", "image"))
            for row in rows:
                del row[name]
            what = f"{name} is missing"
        case 2:
            name = rng.choice(("id", "category", "question", "answer", "facts", "image"))
            value = rng.choice((3, 2.5, True, b"\xff", [1], {"a": 1}, None))
            for row in rows:
                row[name] = value
            what = f"{name} is {value!r}"
            # Null facts are none; bytes are an image, but not this one.
            is_bad = not (name == "facts" and value is None)
        case 3:
            names = [f"c{n}" for n in range(rng.choice((1, 50, 200)))]
            rows[0] |= dict.fromkeys(names, 1)
            what = f"{len(names)} unknown columns"
        case 4 if rng.random() < 0.3:
            return _bomb(rng, path)
        case 4:
            rows[1]["image"]["bytes"] = rng.choice((b"", GOOD[:30], NARROW, b"GIF89a", None))
            what = "the image is bad"
        case _:
            what, is_bad = "bytes are mangled", False
    table = pa.Table.from_pylist(rows)
    if what == "bytes are mangled":
        pq.write_table(table, path, **settings)
        data = path.read_bytes()
        # Half of them in the footer, which is small and decides how the rest is read.
        footer = len(data) - struct.unpack("<I", data[-8:-4])[0] - 8
        split = footer if rng.random() < 0.5 else 0
        path.write_bytes(data[:split] + mangled(rng, data[split:]))
    else:
        if rng.random() < 0.1:
            table = table.append_column("answer", [["4"] * 3]) if "answer" in rows[0] else table
        pq.write_table(table, path, **settings)
    return Case(what, lambda: checked_data(path), is_bad)


def _bomb(rng: random.Random, path: Path) -> Case:
    """A few kilobytes that stand for a gigabyte."""
    count, long = 1000, "x" * 2**20
    values = {"id": [f"s{n}" for n in range(count)], "category": ["math"] * count}
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [long])
    name = rng.choice(("question", "answer", "rationale", "image"))
    texts = dict.fromkeys(("question", "answer", "rationale"), ["3"] * count)
    columns = {**values, "image": [GOOD] * count, **texts, name: column}
    pq.write_table(pa.table(columns), path, compression="zstd")
    return Case(f"{name} stands for a gigabyte", lambda: checked_data(path), True)


def split(rng: random.Random, folder: Path) -> Case:
    """A Parquet file with its index; one of them was changed."""
    path = folder / "train.parquet"
    write_data(path, ((Sample.model_validate(good_row(n)), GOOD) for n in (1, 2)))
    index, is_bad = folder / "train.index.jsonl", False
    lines = index.read_bytes().splitlines(keepends=True)
    match rng.randrange(4):
        case 0:
            index.write_bytes(lines[0] + lines[0] + lines[-1])
            what, is_bad = "a line of the index is there twice", True
        case 1:
            entry = json.loads(lines[0])
            what, is_bad = changed_value(rng, entry["image"])
            index.write_bytes(json.dumps(entry).encode() + b"\n" + b"".join(lines[1:]))
        case 2:
            index.write_bytes(mangled(rng, b"".join(lines)))
            what = "the index is mangled"
        case _:
            path.write_bytes(mangled(rng, path.read_bytes()))
            what = "the file is mangled"
    return Case(what, lambda: checked_data(path), is_bad)


# Configurations


def configuration(rng: random.Random, folder: Path) -> Case:
    """The values of a run's configuration, as run.json has them."""
    values = load_config(rng.choice(NAMES)).model_dump(mode="json")
    what, is_bad = changed_value(rng, values)
    is_bad = is_bad or "unknown name" in what

    def run() -> None:
        config = validate_config(values, "configuration")
        if validate_config(json.loads(config.model_dump_json()), "again") != config:
            raise UnusableError("a configuration that is another one when it is read again")

    return Case(what, run, is_bad)


def override(rng: random.Random, folder: Path) -> Case:
    """A ``--set``."""
    values = load_config("tiny").model_dump(mode="json")
    path, old = rng.choice(list(leaves(values)))
    name = ".".join(map(str, path))
    value, is_bad = str(rng.choice(ODD)), False
    match rng.randrange(4):
        case 0:
            name, is_bad = mangled(rng, name.encode()).decode("latin-1"), False
        case 1:
            name, is_bad = name + ".no_such_name", True
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            value, is_bad = (
                rng.choice(("wide", "[]", "{a: 1}", ".nan", "-.inf", "-1", "[" * 90)),
                True,
            )
        case _:
            value = mangled(rng, str(old).encode()).decode("latin-1")
    return Case(
        f"{name[:60]}={value[:60]}", lambda: _used(load_config("tiny", [f"{name}={value}"])), is_bad
    )


def preset(rng: random.Random, folder: Path) -> Case:
    """A preset of one's own."""
    path = folder / "mine.yaml"
    values = load_config(rng.choice(NAMES)).model_dump(mode="json")
    data, what, is_bad = _as_yaml(rng, values)
    path.write_bytes(data)
    return Case(what, lambda: _used(load_config(str(path))), is_bad)


def profile(rng: random.Random, folder: Path) -> Case:
    """A profile."""
    path = folder / "profile.yaml"
    source = rng.choice(sorted((ROOT / "manifests" / "overlays").glob("*/profile.yaml")))
    data, what, is_bad = _as_yaml(rng, yaml.safe_load(source.read_text()))
    path.write_bytes(data)
    return Case(what, lambda: _used(load_profile(path, TINY)), is_bad)


def _used(config: Any) -> None:
    if hasattr(config, "model_dump_json"):
        json.loads(config.model_dump_json())


def _as_yaml(rng: random.Random, values: dict[str, Any]) -> tuple[bytes, str, bool]:
    text = yaml.safe_dump(values, sort_keys=False)
    match rng.randrange(5):
        case 0:
            what, is_bad = changed_value(rng, values)
            is_bad = is_bad or ("unknown name" in what and what.startswith("() "))
            return (
                yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "replace"),
                what,
                is_bad,
            )
        case 1:
            key = rng.choice(list(values))
            again = yaml.safe_dump({key: values[key]})
            return f"{text}\n{again}".encode(), f"{key} is there twice", True
        case 2:
            depth, width = rng.randrange(2, 20), rng.randrange(5, 20)
            laughs = ["a0: &a0 {x: 1}"]
            for n in range(1, depth):
                many = ", ".join([f"*a{n - 1}"] * width)
                laughs.append(f"a{n}: &a{n} " + rng.choice((f"[{many}]", f"{{<<: [{many}]}}")))
            return "\n".join([text, *laughs]).encode(), f"aliases, {width}^{depth}", True
        case 3:
            odd = rng.choice(
                ("[" * 2000, "{" * 2000, "- " * 2000, "a: " * 900, "&a [*a]", "\t", "? ")
            )
            return f"{text}\nno_such_name: {odd}\n".encode(), f"{odd[:5]!r} at the end", True
        case _:
            return mangled(rng, text.encode()), "bytes are mangled", False


# Models and adapters


def adapter(rng: random.Random, folder: Path) -> Case:
    """An adapter, to be folded into a small matrix."""
    import torch
    from safetensors.torch import save_file

    from srccore.models.folding import fold_adapters

    name = "model.language_model.layers.0.q_proj"
    a, b = torch.ones(2, 4), torch.full((6, 2), 0.01)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4.0,
        "target_modules": ["q_proj"],
        "use_dora": False,
        "modules_to_save": None,
    }
    is_bad = False
    what = ""
    match rng.randrange(6):
        case 0:
            what, is_bad = changed_value(rng, config)
        case 1:
            tensor = rng.choice((a, b))
            tensor[0, rng.randrange(2)] = rng.choice((float("nan"), float("inf"), -float("inf")))
            what, is_bad = "a number is not finite", True
        case 2:
            name = rng.choice(("lm_head", "model.vision_tower.q_proj", "", "model.language_model"))
            what, is_bad = f"changes {name!r}", True
        case 3:
            a, b = rng.choice(((a[:1], b), (a, b[:, :1]), (a[:, :3], b), (a.int(), b), (a[0], b)))
            what, is_bad = "wrong shapes", True
    halves = {"A": a.contiguous(), "B": b.contiguous()}
    save_file(
        {f"base_model.model.{name}.lora_{half}.weight": each for half, each in halves.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if not what:
        file = folder / rng.choice(("adapter_model.safetensors", "adapter_config.json"))
        file.write_bytes(mangled(rng, file.read_bytes()))
        what = f"{file.name} is mangled"

    def run() -> None:
        model = torch.nn.ModuleDict()
        inner = model
        for part in ("model", "language_model", "layers", "0"):
            inner[part] = torch.nn.ModuleDict()
            inner = inner[part]
        inner["q_proj"] = torch.nn.Linear(4, 6, bias=False)
        model.config = SimpleNamespace(model_type="llava")
        fold_adapters(model, [folder])
        if not bool(inner["q_proj"].weight.isfinite().all()):
            raise UnusableError("weights that are not finite")

    return Case(what, run, is_bad)


def model_folder(rng: random.Random, folder: Path) -> Case:
    """A checkpoint's folder, of which all but the weights is loaded; sometimes the weights, too."""
    from safetensors.torch import load_file, save_file

    from srccore.config import ModelConfig
    from srccore.models.policy import Policy, load_policy, load_processor, prompt_text

    if rng.random() < 0.2:
        shutil.copytree(MODELS / "lvlm", folder, dirs_exist_ok=True)
        file = folder / "model.safetensors"
        is_bad, what = rng.random() < 0.5, "the weights' header is mangled"
        if is_bad:
            weights = load_file(file)
            name = rng.choice(sorted(weights))
            if rng.random() < 0.5:
                del weights[name]
            else:
                weights[name] = weights[name].flatten()[:-1].clone()
            save_file(weights, file, metadata={"format": "pt"})
            what = f"{name} is missing or of another shape"
        else:
            data = file.read_bytes()
            header = 8 + struct.unpack("<Q", data[:8])[0]
            file.write_bytes(mangled(rng, data[:header]) + data[header:])
        policy = Policy(base=ModelConfig(path=str(folder)))
        return Case(what, lambda: _used(load_policy(policy)), is_bad)

    for file in (MODELS / "lvlm").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    (folder / "model.safetensors").write_bytes(b"")
    file = rng.choice(
        sorted(each for each in folder.iterdir() if each.suffix in (".json", ".jinja"))
    )
    is_bad = False
    match rng.randrange(4):
        case 0 if file.suffix == ".json":
            document = json.loads(file.read_text())
            what, _ = changed_value(rng, document)
            file.write_text(json.dumps(document))
        case 1:
            missing = rng.choice(("config.json", "model.safetensors", "tokenizer.json"))
            (folder / missing).unlink()
            what, is_bad = f"{missing} is missing", True
        case _:
            file.write_bytes(mangled(rng, file.read_bytes()))
            what = "mangled"

    def run() -> None:
        processor = load_processor(ModelConfig(path=str(folder)))
        prompt_text(processor, "How many?")

    return Case(f"{file.name}: {what}", run, is_bad)


# Artifacts

CANDIDATE = {"id": "c", "text": "So.\nAnswer: 3", "log_probability": -1.5, "token_count": 4}
RECORDS: dict[type[records.Record], dict[str, Any]] = {
    records.Rationale: {"sample_id": "s", "rationale": "So it is."},
    records.Response: {"sample_id": "s", "text": "x", "token_count": 1, "finished": True},
    records.Judgement: {"sample_id": "s", "rationale_right": True, "derived_answer": "3"},
    records.CandidateSet: {"sample_id": "s", "candidates": [CANDIDATE], "unfinished": 0},
    records.Rating: {
        "sample_id": "s",
        "first": "a",
        "second": "b",
        "probabilities": [0.1, 0.2, 0.4, 0.2, 0.1],
        "mass": 0.99,
    },
    records.LabelledPair: {"sample_id": "s", "first": "a", "second": "b", "rating": 4},
    records.Preference: {
        "sample_id": "s",
        "chosen": CANDIDATE,
        "rejected": CANDIDATE | {"id": "d"},
        "margin": 0.5,
        "confidence": 0.9,
    },
}


def record_file(rng: random.Random, folder: Path) -> Case:
    """The output of a stage, of this schema or of another one."""
    kind, good = rng.choice(list(RECORDS.items()))
    header: Any = {"record": kind.record, "version": kind.version}
    good = json.loads(json.dumps(good))
    line = json.loads(json.dumps(good))
    is_bad = False
    match rng.randrange(4):
        case 0:
            header = rng.choice(
                (header | {"version": kind.version + 1}, header | {"record": "x"}, [], 3, {})
            )
            what, is_bad = f"the header is {header}", True
        case 1:
            what, _ = changed_value(rng, line)
            is_bad = "unknown name" in what
        case 2:
            what, is_bad = "a field is missing", True
            del line["sample_id"]
        case _:
            what = "bytes are mangled"
    lines = [json.dumps(each) for each in (header, good, line)]
    data = "\n".join([*lines, ""]).encode()
    path = folder / "records.jsonl"
    path.write_bytes(mangled(rng, data) if what == "bytes are mangled" else data)

    def run() -> None:
        for record in read_records(path, kind):
            if kind.model_validate_json(record.model_dump_json()) != record:
                raise UnusableError("a record that is another one when it is read again")

    return Case(f"{kind.record}: {what}", run, is_bad)


MANIFEST = {
    "schema_version": 1,
    "stage": "prepare-data",
    "key": "0" * 64,
    "config": {"seed": 0},
    "inputs": {"source": "embedded"},
    "outputs": {"train.parquet": "0" * 64},
    "figures": {"samples": {"train": 4}},
    "versions": {"srccore": "0.1.0"},
    "seconds": 1.0,
    "peak_memory_mb": 100.0,
}
POLICY = {"record": "policy", "version": 1, "policy": {"base": {"path": "embedded:lvlm"}}}
TASK = {
    "stage": "train-dpo",
    "artifact_root": "s3://bucket/root",
    "inputs": {"policy": "{}"},
    "settings": {"seed": 0},
}


def document(rng: random.Random, folder: Path) -> Case:
    """A JSON document that a stage or a run wrote."""
    config = load_config("tiny").model_dump(mode="json")
    name, good, read = rng.choice(
        (
            ("manifest.json", MANIFEST, lambda: _used(read_manifest(folder))),
            ("policy.json", POLICY | {"adapters": []}, lambda: _used(read_policy(folder))),
            ("policy.json", POLICY, lambda: _used(read_policy(folder))),
            ("run.json", config, lambda: _used(load_run(folder))),
            ("figures.json", {"rounds": []}, lambda: _used(RunFolder(folder).known_figures())),
            ("round-1/kept.json", {"aligned": True}, lambda: _used(RunFolder(folder).is_kept(1))),
            ("task.json", TASK, lambda: _used(StageTask.from_json(path.read_text("utf-8")))),
        )
    )
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    values, is_bad = json.loads(json.dumps(good)), False
    match rng.randrange(3):
        case 0:
            what, _ = changed_value(rng, values)
            path.write_text(json.dumps(values))
        case 1:
            what = rng.choice(("", "[]", "3", "null", "{}", "[" * 100_000, '"x"'))
            is_bad = not (name == "figures.json" and what == "[]")
            path.write_text(what)
        case _:
            # A task is an argument, and always text.
            data = mangled(rng, json.dumps(values).encode())
            path.write_bytes(
                data.decode("utf-8", "replace").encode() if name == "task.json" else data
            )
            what = "bytes are mangled"
    return Case(f"{name}: {what[:80]}", read, is_bad)


# Teachers


class _Endpoint:
    """A server on this machine that sends the replies it gets from the benchmark."""

    def __init__(self) -> None:
        self.body, self.status = b"", 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(outer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()


@functools.cache
def _endpoint() -> _Endpoint:
    return _Endpoint()


SAMPLE = Sample.model_validate(good_row(1))
RATIONALES = (
    "So it is.",
    "So it is.\nAnswer: 4",
    "Answer: 3",
    "So.\nAnswer: 3\nAnswer: 3",
    "So </s>.\nAnswer: 3",
    "So \u2028.\nAnswer: 3",
    "So.\nAnswer: 3\nNo.",
    "",
    "\ud800\nAnswer: 3",
    None,
    3,
    ["So.\nAnswer: 3"],
)
RATINGS = (
    *("5", "{}", '{"rating": 6}', '{"rating": "5"}', '{"rating": 4.5}', '{"rating": true}', "[5]"),
    *('{"rating": 5, "why": "x"}', 'Sure: {"rating": 5}', '{"rating": NaN}', "[" * 5000, "", None),
)


def teacher(rng: random.Random, folder: Path) -> Case:
    """A teacher that lies, rambles or breaks off."""
    rates, is_bad = rng.random() < 0.5, False
    said: Any = '{"rating": 4}' if rates else "There are three.\nAnswer: 3"
    status, what = 200, ""
    match rng.randrange(4):
        case 0:
            said, is_bad = rng.choice(RATINGS if rates else RATIONALES), True
            what = f"says {str(said)[:40]!r}"
        case 1:
            said = mangled(rng, said.encode()).decode("latin-1")
            what = f"says {said[:40]!r}"
        case 2:
            status, is_bad = rng.choice((201, 204, 301, 400, 404, 418, 429, 500, 503)), False
            what = f"status {status}"
    message = {"role": "assistant", "content": said}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    reply: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "choices": [choice],
    }
    if not what:
        what, _ = changed_value(rng, reply)
    body = json.dumps(reply).encode()
    if rng.random() < 0.2:
        body, what = mangled(rng, body), f"{what}, then mangled"
        is_bad = False
    server = _endpoint()
    settings = EndpointConfig(url=server.url, model="m", retries=0, timeout=10)

    def run() -> None:
        server.body, server.status = body, status
        endpoint = EndpointTeacher(settings)
        image = Image.new("RGB", (2, 2))
        found: Any
        if rates:
            (found,) = endpoint.ratings([PairRequest(SAMPLE, "a", "b")])
        else:
            (found,) = endpoint.rationales([RationaleRequest(SAMPLE, lambda: image)])
        if found.found is None:
            raise UserError(f"{found.problem}.", "It is an item's problem.")
        if rates and found.found not in (1, 2, 3, 4, 5):
            raise UnusableError(f"a rating of {found.found!r}")
        if not rates:
            usable(found.found, SAMPLE.answer)

    return Case(f"{'rating' if rates else 'rationale'}: {what}", run, is_bad)


NAMES = preset_names()
TINY = load_config("tiny")
KINDS: dict[str, Kind] = {
    "data set, JSON Lines": json_lines,
    "data set, Parquet": parquet,
    "split with an index": split,
    "configuration": configuration,
    "override": override,
    "preset": preset,
    "profile": profile,
    "adapter": adapter,
    "model folder": model_folder,
    "record file": record_file,
    "manifest, policy, run, task": document,
    "teacher": teacher,
}


# Running them


@dataclass
class Tally:
    """What became of the cases of a kind."""

    cases: int = 0
    known_bad: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    accepted_silently: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """What must not happen."""
        return self.tracebacks + self.hangs + self.accepted_silently


def attempt(number: int, seed: int, tally: dict[str, Tally], *, loud: bool = False) -> None:
    """Makes a case and runs it."""
    names = list(KINDS)
    name = names[number % len(names)]
    mine = tally.setdefault(name, Tally())
    with tempfile.TemporaryDirectory() as scratch:
        case = KINDS[name](random.Random(f"{seed}/{number}"), Path(scratch))
        began = time.perf_counter()
        fault = ""
        signal.setitimer(signal.ITIMER_PROF, ALARM)
        signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT)
        try:
            case.run()
            if case.is_bad:
                mine.accepted_silently += 1
                fault = "accepted, though it is bad"
        except UserError as error:
            mine.refused += 1
            fault = _wrong_message(str(error))
            mine.tracebacks += bool(fault)
        except UnusableError as error:
            mine.accepted_silently += 1
            fault = f"accepted: {error}"
        except Hang:
            mine.hangs += 1
            fault = "hangs"
        except Exception as error:
            mine.tracebacks += 1
            fault = f"{type(error).__name__}: {str(error)[:200]}"
            if loud:
                traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        mine.cases += 1
        mine.known_bad += case.is_bad
        mine.seconds += (seconds := time.perf_counter() - began)
        mine.slowest = max(mine.slowest, seconds)
        if fault:
            mine.failures.append(f"{number} {name}: {case.what}: {fault}")
        elif loud:
            print(f"{number} {name}: {case.what}: in order")


def _wrong_message(message: str) -> str:
    """Why a message is not one paragraph that fits a terminal; empty if it is."""
    if len(message) > LONGEST_MESSAGE:
        return f"a message of {len(message):,} characters: {message[:100]}"
    return ""


def _ring(*_: object) -> None:
    raise Hang


def measure(numbers: range, seed: int = SEED, *, loud: bool = False) -> dict[str, Tally]:
    """Runs cases; must be called in the main thread, which gets the alarm."""
    tally: dict[str, Tally] = {}
    before = {each: signal.signal(each, _ring) for each in (signal.SIGALRM, signal.SIGPROF)}
    try:
        for number in numbers:
            attempt(number, seed, tally, loud=loud)
            if (number + 1) % 1000 == 0:
                print(f"{number + 1} cases", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"Stopped after {number} cases.", file=sys.stderr)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return tally


def main() -> None:
    """Prints a table and the cases that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000, help="How many cases.")
    parser.add_argument("--start", type=int, default=0, help="The number of the first case.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", type=int, help="Repeat this case alone, with its traceback.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    one = options.only is not None
    numbers = (
        range(options.only, options.only + 1)
        if one
        else range(options.start, options.start + options.n)
    )
    tally = measure(numbers, options.seed, loud=one)
    print(
        "| input | cases | known bad | refused | tracebacks | hangs | accepted silently | ms each |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, each in tally.items():
        print(
            f"| {name} | {each.cases} | {each.known_bad} | {each.refused} | {each.tracebacks} | "
            f"{each.hangs} | {each.accepted_silently} | {1000 * each.seconds / each.cases:.1f} |"
        )
    for each in tally.values():
        print(*each.failures[:20], sep="\n", end="\n" if each.failures else "")
    total: Counter[str] = Counter()
    for each in tally.values():
        total.update(tracebacks=each.tracebacks, hangs=each.hangs, silent=each.accepted_silently)
    print(dict(total))
    if options.json:
        options.json.write_text(
            json.dumps({name: vars(each) for name, each in tally.items()}, indent=2) + "\n"
        )
    sys.exit(bool(sum(total.values())))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from writing about the files that they are given."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


if __name__ == "__main__":
    main()
