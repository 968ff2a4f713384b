"""The little world of preset `tiny`: images made of real material, questions, facts.

Every item has its own seed (a SHA-256 of seed, split and number), so any item can be made on its
own. Splits share no instance: every digit image, every country's table rows, every background and
arrangement belongs to one split. Kinds (which flags and objects exist) are shared: a model cannot
name a flag that it has never seen.

The categories are mixed 2:1:1 as in the paper: perception (flags and objects on varied
backgrounds), charts (bars and lines from gapminder's rows) and math (handwritten digits).
"""

from __future__ import annotations

import csv
import functools
import gzip
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from srccore.data.records import Category, Fact, Sample
from srccore.embedded.vendor import ASSETS
from srccore.hashing import stable_hash
from srccore.method.facts import gold_rationale

__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "KIND_NAMES",
    "SPLITS",
    "TASKS",
    "Item",
    "Reasoning",
    "make_item",
    "reason",
    "world_facts",
]

IMAGE_SIZE = 72
UNIT = 8
"""Pixels of one unit of a chart's height."""
COLOURS = {
    "red": "#d62728",
    "blue": "#1f4fd8",
    "green": "#2ca02c",
    "orange": "#ff8c0e",
    "purple": "#8e44ad",
}
ARTICLES = {"apple": "an", "airplane": "an", "elephant": "an", "accordion": "an"}
KIND_NAMES = {
    "animal": "an animal",
    "food": "a food",
    "vehicle": "a vehicle",
    "instrument": "an instrument",
}
SPLITS = {"pretrain": 0.5, "train": 0.1, "calibration": 0.2, "heldout": 0.2}
"""Share of the instances (digit images, countries of the table) in each split."""

TASKS: dict[Category, tuple[str, ...]] = {
    Category.PERCEPTION: ("capital", "continent", "kind", "count"),
    Category.CHART: ("highest", "lowest", "difference", "sum", "trend"),
    Category.MATH: ("total", "product", "larger", "parity"),
}
MIXTURE = (Category.PERCEPTION, Category.CHART, Category.PERCEPTION, Category.MATH)


@dataclass(frozen=True)
class Item:
    """One generated sample with its image and what the image was made of."""

    sample: Sample
    image: Image.Image
    task: str
    instances: tuple[str, ...]
    """Names of the material used: no two splits have one in common."""
    seen: dict[str, str]
    """What is visible where, from left to right: ``{"bar_red": "3", ...}``."""
    asked: tuple[str, ...]
    """What the question is about: two bars, a place, a kind of thing."""


@dataclass(frozen=True)
class Reasoning:
    """A question with the facts and the answer that follow from what is seen and believed."""

    question: str
    answer: str
    facts: tuple[Fact, ...]


def make_item(seed: int, split: str, number: int) -> Item:
    """Makes item ``number`` of a split.

    Args:
        seed: The data set's seed.
        split: One of `SPLITS`.
        number: The item's number; any four consecutive items have the mixture 2:1:1.

    Returns:
        The item; the same arguments always give the same item.
    """
    name = f"{split}-{number:05d}"
    rng = random.Random(stable_hash(f"{seed}/{name}"))
    category = MIXTURE[number % len(MIXTURE)]
    task = rng.choice(TASKS[category])
    scene = None
    while scene is None:
        scene = _SCENES[task](rng, task, split)
    reasoning = reason(task, scene.seen, scene.asked)
    sample = Sample(
        id=name,
        category=category,
        question=reasoning.question,
        answer=reasoning.answer,
        rationale=gold_rationale(reasoning.facts),
        facts=reasoning.facts,
    )
    instances = (f"background:{seed}:{name}", *scene.instances)
    return Item(sample, scene.image, task, instances, scene.seen, scene.asked)


def reason(
    task: str,
    seen: Mapping[str, str],
    asked: Sequence[str],
    beliefs: Mapping[str, str] | None = None,
) -> Reasoning:
    """Reasons from what is seen to an answer.

    Args:
        task: A task of `TASKS`.
        seen: What is seen where, correctly or not.
        asked: What the question is about.
        beliefs: Facts of the world that replace the true ones: ``{"capital of France": ...}``.

    Returns:
        The question, the answer and the facts that lead to it, the last of which states it.
    """
    return _REASONS[task](task, seen, asked, {**world_facts(), **(beliefs or {})})


@functools.cache
def world_facts() -> dict[str, str]:
    """Returns what is true beyond the image: capitals, continents, kinds of things."""
    facts = {}
    for country in _countries():
        facts[f"capital of {country['name']}"] = country["capital"]
        facts[f"continent of {country['name']}"] = country["continent"]
    return facts | {f"kind of {name}": kind for name, kind in _object_kinds().items()}


def _fact(
    subject: str, value: str, relation: str = "is", *, visual: bool = False, needed: bool = True
) -> Fact:
    return Fact(subject=subject, relation=relation, value=value, visual=visual, needed=needed)


def _about_flag(
    task: str, seen: Mapping[str, str], _asked: Sequence[str], world: Mapping[str, str]
) -> Reasoning:
    name = seen["flag"]
    flag = _fact("the flag", name, "is of", visual=True)
    answer = world[f"{task} of {name}"]
    if task == "capital":
        question = "What is the capital of the country with this flag?"
        return Reasoning(question, answer, (flag, _fact(f"the capital of {name}", answer)))
    question = "Which continent is the country with this flag in?"
    return Reasoning(question, answer, (flag, _fact(name, answer, "is in")))


def _about_objects(
    task: str, seen: Mapping[str, str], asked: Sequence[str], world: Mapping[str, str]
) -> Reasoning:
    places = {
        place: _fact(f"the {place} object", _with_article(name), visual=True)
        for place, name in seen.items()
    }
    (subject,) = asked
    if task == "kind":
        kind = world[f"kind of {seen[subject]}"]
        step = _fact(_with_article(seen[subject]), KIND_NAMES[kind])
        rest = (
            fact.model_copy(update={"needed": False})
            for place, fact in places.items()
            if place != subject
        )
        question = f"What kind of thing is on the {subject}?"
        return Reasoning(question, kind, (places[subject], step, *rest))
    count = str(sum(world[f"kind of {name}"] == subject for name in seen.values()))
    step = _fact(f"the number of {subject}s", count)
    return Reasoning(f"How many {subject}s are there?", count, (*places.values(), step))


def _about_bars(
    task: str, seen: Mapping[str, str], asked: Sequence[str], _world: Mapping[str, str]
) -> Reasoning:
    values = {colour: int(value) for colour, value in seen.items()}
    bars = {colour: _fact(f"the {colour} bar", seen[colour], visual=True) for colour in seen}
    if task in ("highest", "lowest"):
        answer = (max if task == "highest" else min)(values, key=lambda colour: values[colour])
        step = _fact(f"the {task} bar", answer)
        return Reasoning(f"Which bar is the {task}?", answer, (*bars.values(), step))
    if task == "difference":
        high, low = max(values.values()), min(values.values())
        step = _fact(f"{high} minus {low}", str(high - low))
        question = "What is the difference of the highest and the lowest bar?"
        return Reasoning(question, step.value, (*bars.values(), step))
    first, second = asked
    step = _fact(f"{seen[first]} plus {seen[second]}", str(values[first] + values[second]))
    rest = (
        fact.model_copy(update={"needed": False})
        for colour, fact in bars.items()
        if colour not in asked
    )
    question = f"What is the sum of the {first} bar and the {second} bar?"
    return Reasoning(question, step.value, (bars[first], bars[second], step, *rest))


def _about_line(
    _task: str, seen: Mapping[str, str], _asked: Sequence[str], _world: Mapping[str, str]
) -> Reasoning:
    answer = "rising" if int(seen["end"]) > int(seen["start"]) else "falling"
    facts = (
        _fact("the line", seen["start"], "starts at", visual=True),
        _fact("the line", seen["end"], "ends at", visual=True),
        _fact("the line", answer),
    )
    return Reasoning("Is the line rising or falling?", answer, facts)


def _about_digits(
    task: str, seen: Mapping[str, str], _asked: Sequence[str], _world: Mapping[str, str]
) -> Reasoning:
    left, right = seen["left"], seen["right"]
    digits = (
        _fact("the left digit", left, visual=True),
        _fact("the right digit", right, visual=True),
    )
    if task == "larger":
        answer = max(left, right)
        return Reasoning(
            "Which digit is larger?", answer, (*digits, _fact("the larger digit", answer))
        )
    if task == "product":
        step = _fact(f"{left} times {right}", str(int(left) * int(right)))
        return Reasoning("What is the product of the digits?", step.value, (*digits, step))
    step = _fact(f"{left} plus {right}", str(int(left) + int(right)))
    if task == "total":
        return Reasoning("What is the sum of the digits?", step.value, (*digits, step))
    answer = "odd" if int(step.value) % 2 else "even"
    question = "Is the sum of the digits even or odd?"
    return Reasoning(question, answer, (*digits, step, _fact(step.value, answer)))


_Reason = Callable[[str, Mapping[str, str], Sequence[str], Mapping[str, str]], Reasoning]
_REASONS: dict[str, _Reason] = {
    **dict.fromkeys(("capital", "continent"), _about_flag),
    **dict.fromkeys(("kind", "count"), _about_objects),
    **dict.fromkeys(("highest", "lowest", "difference", "sum"), _about_bars),
    "trend": _about_line,
    **dict.fromkeys(("total", "product", "larger", "parity"), _about_digits),
}


@dataclass(frozen=True)
class _Scene:
    image: Image.Image
    seen: dict[str, str]
    asked: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()


def _draw_flag(rng: random.Random, _task: str, _split: str) -> _Scene:
    country = rng.choice(_countries())
    image = _background(rng, rng.choice(("light", "dark")))
    size = rng.randint(48, 66)
    _paste(rng, image, f"flags/{country['iso']}", size, (IMAGE_SIZE - size, 0))
    return _Scene(image, {"flag": country["name"]})


def _draw_objects(rng: random.Random, task: str, _split: str) -> _Scene:
    kinds = _object_kinds()
    image = _background(rng, rng.choice(("light", "dark")))
    if task == "kind":
        places: tuple[str, ...] = ("left", "right")
        names = rng.sample(sorted(kinds), 2)
        asked = rng.choice(places)
    else:
        places = ("left", "middle", "right")
        asked = rng.choice(sorted(KIND_NAMES))
        inside = [name for name in sorted(kinds) if kinds[name] == asked]
        outside = [name for name in sorted(kinds) if kinds[name] != asked]
        count = rng.choice((1, 2, 2, 3))
        names = rng.sample(inside, count) + rng.sample(outside, 3 - count)
        rng.shuffle(names)
    width = IMAGE_SIZE // len(places)
    for number, name in enumerate(names):
        size = rng.randint(30, 35) if task == "kind" else rng.randint(21, 24)
        _paste(rng, image, f"objects/{name}", size, (width - size, number * width))
    return _Scene(image, dict(zip(places, names, strict=True)), (asked,))


def _draw_bars(rng: random.Random, task: str, split: str) -> _Scene | None:
    column = rng.choice(("life", "gdp"))
    rows = _chart_rows(split)
    year = rng.choice(sorted({row.year for row in rows}))
    by_value: dict[int, list[_Row]] = {}
    for row in rows:
        if row.year == year and getattr(row, column) > 0:
            by_value.setdefault(getattr(row, column), []).append(row)
    if len(by_value) < 3:
        return None
    values = rng.sample(sorted(by_value), 3)
    used = [rng.choice(by_value[value]) for value in values]
    colours = rng.sample(list(COLOURS), 3)
    image = _background(rng, "light")
    draw = ImageDraw.Draw(image)
    bottom = IMAGE_SIZE - rng.randint(2, 4)
    width = rng.randint(12, 16)
    left = rng.randint(4, 8)
    draw.line([(2, bottom), (IMAGE_SIZE - 2, bottom)], fill="black")
    for number, (colour, value) in enumerate(zip(colours, values, strict=True)):
        start = left + number * 22
        draw.rectangle([start, bottom - value * UNIT, start + width, bottom], fill=COLOURS[colour])
    seen = {colour: str(value) for colour, value in zip(colours, values, strict=True)}
    asked = tuple(sorted(rng.sample(colours, 2), key=colours.index)) if task == "sum" else ()
    return _Scene(image, seen, asked, tuple(row.instance for row in used))


def _draw_line(rng: random.Random, _task: str, split: str) -> _Scene | None:
    rows = _chart_rows(split)
    column = rng.choice(("life", "gdp"))
    country = rng.choice(sorted({row.country for row in rows}))
    series = [row for row in rows if row.country == country and getattr(row, column) > 0]
    points = sorted(rng.sample(series, min(4, len(series))), key=lambda row: row.year)
    values = [getattr(row, column) for row in points]
    # Real tables mostly rise, so half of the charts are drawn from right to left.
    if rng.random() < 0.5:
        values.reverse()
    if len(values) < 4 or values[0] == values[-1]:
        return None
    image = _background(rng, "light")
    draw = ImageDraw.Draw(image)
    bottom = IMAGE_SIZE - rng.randint(2, 4)
    left = rng.randint(5, 9)
    draw.line([(2, bottom), (IMAGE_SIZE - 2, bottom)], fill="black")
    colour = rng.choice(list(COLOURS.values()))
    places = [(left + number * 18, bottom - value * UNIT) for number, value in enumerate(values)]
    draw.line(places, fill=colour, width=3)
    for x, y in places:
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    seen = {"start": str(values[0]), "end": str(values[-1])}
    return _Scene(image, seen, (), tuple(row.instance for row in points))


def _draw_digits(rng: random.Random, _task: str, split: str) -> _Scene | None:
    pool = _digit_numbers(split)
    chosen = [rng.choice(pool), rng.choice(pool)]
    labels, pictures = _digit_table()
    left, right = (str(labels[number]) for number in chosen)
    if left == right:
        return None
    dark = rng.random() < 0.5
    image = _background(rng, "dark" if dark else "light")
    for number, index in enumerate(chosen):
        size = rng.randint(27, 34)
        ink = Image.fromarray((pictures[index] * 15.9).astype(np.uint8))
        mask = ink.resize((size, size), Image.Resampling.BICUBIC)
        x = number * 36 + rng.randint(0, 36 - size)
        y = rng.randint(8, IMAGE_SIZE - size - 8)
        image.paste(Image.new("RGB", mask.size, "white" if dark else "black"), (x, y), mask)
    instances = tuple(f"digit:{index}" for index in chosen)
    return _Scene(image, {"left": left, "right": right}, (), instances)


_SCENES: dict[str, Callable[[random.Random, str, str], _Scene | None]] = {
    **dict.fromkeys(TASKS[Category.PERCEPTION][:2], _draw_flag),
    **dict.fromkeys(TASKS[Category.PERCEPTION][2:], _draw_objects),
    **dict.fromkeys(TASKS[Category.CHART][:4], _draw_bars),
    "trend": _draw_line,
    **dict.fromkeys(TASKS[Category.MATH], _draw_digits),
}
"""Draws a scene of the task, or returns None if the draw does not fit: then draw again."""


@dataclass(frozen=True)
class _Row:
    country: str
    year: int
    life: int
    """Life expectancy in decades."""
    gdp: int
    """Gross domestic product per capita in thousands of dollars; 0 if too high for a chart."""

    @property
    def instance(self) -> str:
        """The row's name."""
        return f"gapminder:{self.country}:{self.year}"


def _read_csv(name: str) -> list[dict[str, str]]:
    with (ASSETS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def _countries() -> list[dict[str, str]]:
    return _read_csv("countries.csv")


@functools.cache
def _object_kinds() -> dict[str, str]:
    return {row["name"]: row["kind"] for row in _read_csv("objects.csv")}


@functools.cache
def _chart_rows(split: str) -> list[_Row]:
    rows = []
    for row in _read_csv("gapminder.csv"):
        if _split_of(f"country/{row['country']}") == split:
            gdp = round(float(row["gdp_per_capita"]) / 1000)
            life = round(float(row["life_expectancy"]) / 10)
            rows.append(_Row(row["country"], int(row["year"]), life, gdp if gdp <= 8 else 0))
    return rows


@functools.cache
def _digit_table() -> tuple[np.ndarray, np.ndarray]:
    with gzip.open(ASSETS / "digits.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    return table[:, 64].astype(int), table[:, :64].reshape(-1, 8, 8)


@functools.cache
def _digit_numbers(split: str) -> list[int]:
    labels, _ = _digit_table()
    return [index for index in range(len(labels)) if _split_of(f"digit/{index}") == split]


def _split_of(instance: str) -> str:
    point = stable_hash(instance) / 2**64
    for split, share in SPLITS.items():
        if point < share:
            return split
        point -= share
    return "heldout"


def _with_article(name: str) -> str:
    return name if name == "grapes" else f"{ARTICLES.get(name, 'a')} {name}"


@functools.cache
def _art(name: str) -> Image.Image:
    return Image.open(ASSETS / f"{name}.png").convert("RGBA")


def _background(rng: random.Random, tone: str) -> Image.Image:
    """Makes a two-colour gradient with grain: no two are the same."""
    low, high = (195, 255) if tone == "light" else (10, 90)
    ends = np.array([[rng.randint(low, high) for _ in range(3)] for _ in range(2)], float)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / IMAGE_SIZE - 0.5
    blend = (np.cos(angle) * x + np.sin(angle) * y + 0.75)[..., None] / 1.5
    grain = np.random.default_rng(rng.getrandbits(32)).normal(0, 4, (IMAGE_SIZE, IMAGE_SIZE, 1))
    pixels = ends[0] * blend + ends[1] * (1 - blend) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _paste(
    rng: random.Random, image: Image.Image, name: str, size: int, spare: tuple[int, int]
) -> None:
    """Pastes an emoji, slightly rotated; ``spare`` is (free width, left edge) of its column."""
    free, edge = spare
    art = _art(name).resize((size, size), Image.Resampling.BICUBIC)
    art = art.rotate(rng.uniform(-10, 10), resample=Image.Resampling.BICUBIC)
    place = (edge + rng.randint(0, free), rng.randint(0, IMAGE_SIZE - size))
    image.paste(art, place, art)
