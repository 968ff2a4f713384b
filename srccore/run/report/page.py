"""The report of a run: one self-contained HTML page, also while the run is going on.

`render` is pure: it takes what the stages measured and gives the page. Python decides the numbers
(where a curve runs, which sentences differ); the template `report.html.j2` decides the
looks. The page loads nothing: no script, no font, no address; images are ``data:`` URIs.

All text of models and data sets is hostile. Jinja escapes every value, and characters that could
turn the direction of the text around them are written out by their code point.
"""

from __future__ import annotations

import base64
import difflib
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Annotated, Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from srccore.method import response, sentences
from srccore.method.evaluation import FIGURE_NAMES, SHOWN, Figure

__all__ = [
    "CategoryFigures",
    "Change",
    "RatingRow",
    "ReportData",
    "RoundCuration",
    "RoundFigures",
    "RoundScoring",
    "SampleCard",
    "ScorerHealth",
    "StageTime",
    "render",
]

Interval = tuple[float, float]
Probabilities = tuple[float, float, float, float, float]


class Part(BaseModel):
    """Base of what the report shows: frozen; fields that the report does not show are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Change(Part):
    """A figure against another policy's, as a fraction (0.1 is 10 points)."""

    difference: float
    interval: Interval | None = None
    """Bootstrap 95% interval of the difference."""


class CategoryFigures(Part):
    """The figures of method.md on some samples, fractions in [0, 1]."""

    values: dict[str, float | None]
    """By figure; None where it is not defined on these samples."""
    n: int = Field(ge=0)
    interval: dict[str, Interval | None] = {}
    """Bootstrap 95% interval by figure."""

    @model_validator(mode="before")
    @classmethod
    def _gather_values(cls, given: Any) -> Any:
        """Takes the form of ``figures.json``, where the figures are fields."""
        if not isinstance(given, dict) or "values" in given:
            return given
        return {**given, "values": {name: given.get(name) for name in FIGURE_NAMES}}

    def value(self, figure: str) -> float | None:
        """The value of a figure by its key."""
        return self.values.get(figure)

    def bounds(self, figure: str) -> Interval | None:
        """The figure's interval; the value twice where none was computed."""
        value = self.value(figure)
        if value is None:
            return None
        return self.interval.get(figure) or (value, value)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


class RoundFigures(CategoryFigures):
    """One policy's figures, in the form of ``figures.json``."""

    round: int = Field(ge=0)
    """0 is the policy after stage 1."""
    change: dict[str, Change | None] | None = None
    """By figure, against the policy of the round before."""
    by_category: dict[str, CategoryFigures] = {}


class RatingRow(Part):
    """R-Scorer's verdict on an ordered pair, as the sample card shows it."""

    first: str
    """What was shown first: ``chosen``, for instance."""
    second: str
    probabilities: Probabilities
    """Over the rating tokens 1..5; 5 says that the first is much better."""

    @property
    def expected(self) -> float:
        """The expected rating, 1 to 5."""
        return sum(level * p for level, p in enumerate(self.probabilities, start=1))


class SampleCard(Part):
    """One preference, with what led to it."""

    sample_id: str
    category: str
    round: int
    image_png: bytes | None = None
    question: str
    reference_answer: str
    chosen: str
    rejected: str
    margin: float
    confidence: float
    ratings: tuple[RatingRow, ...] = ()
    """The pair in both orders."""


class RoundCuration(Part):
    """What one round's curation made of its samples."""

    round: int
    samples: int = Field(ge=0)
    preferences: int = Field(ge=0)
    reasons: dict[str, int] = {}
    """Why samples gave no preference, and how many."""
    margins: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    length_difference: float | None = None
    """Mean tokens of chosen minus rejected."""


class ScorerHealth(Part):
    """R-Scorer on its validation pairs."""

    teacher_agreement: float | None = None
    """Share of pairs with the teacher's side: first, equal or second."""
    teacher_agreement_both_right: float | None = None
    """The same where both answers are right, so that only the rationale tells."""
    swap_consistency: float | None = None
    length_slope: float | None = None
    """Expected rating per word of length difference."""
    rating_mass: float | None = None
    validation_pairs: int | None = None


class RoundScoring(Part):
    """R-Scorer on one round's candidates, where no teacher is asked."""

    round: int
    swap_consistency: float | None = None
    rating_mass: float | None = None


class StageTime(Part):
    """What one stage took."""

    name: str
    round: int | None = None
    seconds: float = Field(ge=0)
    peak_memory_mb: float | None = None


class ReportData(Part):
    """All that the report shows. What a run has not got to yet stays empty."""

    title: str
    created: datetime
    finished: bool = False
    rounds_planned: int | None = None
    rounds: tuple[Annotated[RoundFigures, BeforeValidator(_plain)], ...] = ()
    overall_change: dict[str, Change | None] | None = None
    """By figure, the last policy against round 0; without it the page shows no interval."""
    curation: tuple[RoundCuration, ...] = ()
    scorer: ScorerHealth | None = None
    scoring: tuple[RoundScoring, ...] = ()
    samples: tuple[SampleCard, ...] = ()
    stages: tuple[StageTime, ...] = ()
    versions: dict[str, str] = {}
    """Package to version."""
    hashes: dict[str, str] = {}
    """Name of an input to its sha256."""
    config_yaml: str | None = None
    notes: tuple[str, ...] = ()


FRACTIONS = tuple(figure for figure in SHOWN if figure.unit == "fraction")
"""The figures that are drawn and compared in points."""


@dataclass(frozen=True)
class Dot:
    """A measured value of a curve, in the chart's units."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart with its interval band (the points of a polygon)."""

    style: Literal["main", "side"]
    dots: tuple[Dot, ...]
    band: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A drawing without looks: ticks are (position, label)."""

    title: str
    description: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...] = ()
    bars: tuple[tuple[float, float, float, float, str], ...] = ()
    """x, y, width, height, label."""


WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 326, 12, 164
"""The plotting area inside the drawing."""


def render(data: ReportData) -> str:
    """Renders the report.

    Args:
        data: What is known of the run so far.

    Returns:
        A whole HTML page that loads nothing from anywhere.
    """
    environment = Environment(
        loader=PackageLoader("srccore.run.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters.update(_FILTERS)
    rounds = sorted(data.rounds, key=lambda figures: figures.round)
    page = environment.get_template("report.html.j2").render(
        data=data,
        rounds=rounds,
        figures=SHOWN,
        fractions=FRACTIONS,
        overall={figure.key: _overall(data, rounds, figure.key) for figure in SHOWN},
        figure_charts=_figure_charts(rounds, data.rounds_planned),
        category_charts=_category_charts(rounds, data.rounds_planned),
        margin_charts=_histograms(
            "Margin", [(part.round, part.margins) for part in data.curation], widest=2.0
        ),
        confidence_charts=_histograms(
            "Confidence", [(part.round, part.confidences) for part in data.curation], widest=1.0
        ),
        reasons=list(dict.fromkeys(r for part in data.curation for r in part.reasons)),
        sample_rounds=sorted({card.round for card in data.samples}),
        compare=_compare,
        answer_is_right=response.gives_answer,
        verdict=_verdict,
        plot={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
    )
    return page.lstrip()


# Controls, and the characters that steer or hide the direction of text (bidi, tags); ordinary
# joiners stay, for scripts and emoji need them. Lone surrogates could not be written as UTF-8.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def _visible(value: object) -> object:
    """Writes unsafe characters out; Jinja calls it on every value before it escapes."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return _UNSAFE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)
    return value


# Changes


def _overall(data: ReportData, rounds: Sequence[RoundFigures], key: str) -> Change | None:
    """The last policy against the first one; an interval only where one was computed."""
    if len(rounds) < 2:
        return None
    if data.overall_change and (change := data.overall_change.get(key)):
        return change
    first, last = rounds[0].value(key), rounds[-1].value(key)
    if first is None or last is None:
        return None
    if len(rounds) == 2 and rounds[-1].change and (change := rounds[-1].change.get(key)):
        return change
    return Change(difference=last - first)


def _verdict(change: Change | None, figure: Figure) -> str:
    """``better`` or ``worse`` where the interval excludes zero, else ``open``."""
    if change is None or change.interval is None or figure.better is None:
        return "open"
    low, high = change.interval
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (figure.better == "higher") else "worse"


# Samples


def _compare(text: str, other: str) -> list[tuple[str, bool]]:
    """Splits a text into sentences and tells which of them the other text lacks."""
    own, others = sentences.split(text), sentences.split(other)
    differs = [True] * len(own)
    for block in difflib.SequenceMatcher(None, own, others, autojunk=False).get_matching_blocks():
        differs[block.a : block.a + block.size] = [False] * block.size
    return list(zip(own, differs, strict=True))


# Charts


def _figure_charts(rounds: Sequence[RoundFigures], planned: int | None) -> list[Chart]:
    """One chart per figure; all span as many points, so that slopes compare."""
    shown = [
        figure
        for figure in FRACTIONS
        if any(figures.value(figure.key) is not None for figures in rounds)
    ]
    bounds = [[figures.bounds(figure.key) for figures in rounds] for figure in shown]
    step = _percent_step(bounds)
    return [
        _line_chart(
            figure.heading,
            [(figure.heading, figure.key)],
            rounds,
            rounds,
            step,
            _last(rounds, planned),
        )
        for figure in shown
    ]


def _category_charts(rounds: Sequence[RoundFigures], planned: int | None) -> list[Chart]:
    """One chart per category, aligned accuracy over accuracy."""
    keys = [("Aligned accuracy", "aligned_accuracy"), ("Accuracy", "accuracy")]
    parts = []
    for name in dict.fromkeys(name for figures in rounds for name in figures.by_category):
        having = [figures for figures in rounds if name in figures.by_category]
        parts.append((name, having, [figures.by_category[name] for figures in having]))
    step = _percent_step(
        [part.bounds(key) for part in of_round for _, key in keys] for _, _, of_round in parts
    )
    return [
        _line_chart(name, keys, having, of_round, step, _last(rounds, planned))
        for name, having, of_round in parts
    ]


def _last(rounds: Sequence[RoundFigures], planned: int | None) -> int:
    return max([planned or 0, 1, *(figures.round for figures in rounds)])


def _percent_step(panels: Iterable[Iterable[Interval | None]]) -> int:
    """The finest tick step, in points, at which five steps hold every panel's intervals."""
    spans = [
        (min(low for low, _ in known), max(high for _, high in known))
        for known in ([bound for bound in panel if bound] for panel in panels)
        if known
    ]
    return next(
        step
        for step in (2, 5, 10, 20)
        if step == 20
        or all(100 * high <= _percent_floor(low, step) + 5 * step for low, high in spans)
    )


def _percent_floor(low: float, step: int) -> int:
    """Where an axis of five steps begins, in percent; it never ends above 100."""
    return max(0, min(int(100 * low // step) * step, 100 - 5 * step))


def _line_chart(
    title: str,
    keys: Sequence[tuple[str, str]],
    rounds: Sequence[RoundFigures],
    parts: Sequence[CategoryFigures],
    step: int,
    last: int,
) -> Chart:
    """Draws figures over rounds; a round whose value is null has no dot.

    Args:
        title: The chart's title.
        keys: Heading and key of each figure, the main one first.
        rounds: Where the parts stand on the x axis.
        parts: The figures, one part per round.
        step: Points between two ticks.
        last: The last round of the x axis.

    Returns:
        The chart, in units of the drawing.
    """
    known = [bound for part in parts for _, key in keys if (bound := part.bounds(key))]
    floor = _percent_floor(min((low for low, _ in known), default=0.0), step)
    to_x = _scale(0, last, LEFT + 12, RIGHT - 12)
    to_y = _scale(floor / 100, (floor + 5 * step) / 100, BOTTOM, TOP)
    curves, told = [], []
    for index, (name, key) in enumerate(keys):
        dots, lows, highs = [], [], []
        for figures, part in zip(rounds, parts, strict=True):
            value, bounds = part.value(key), part.bounds(key)
            if value is None or bounds is None:
                continue
            x = to_x(figures.round)
            label = f"Round {figures.round}: {_percent(value)} ({_span(bounds)})"
            dots.append(Dot(x, to_y(value), f"{name}, {label}"))
            lows.append((x, to_y(bounds[0])))
            highs.append((x, to_y(bounds[1])))
            told.append(f"{name}, {label}")
        style: Literal["main", "side"] = "main" if index == 0 else "side"
        curves.append(Curve(style, tuple(dots), (*highs, *reversed(lows))))
    return Chart(
        title=title,
        description="; ".join(told),
        x_ticks=tuple((to_x(number), str(number)) for number in range(last + 1)),
        y_ticks=tuple(
            (to_y(tick / 100), f"{tick}%") for tick in range(floor, floor + 5 * step + 1, step)
        ),
        curves=tuple(curves),
    )


def _histograms(
    name: str, rounds: Sequence[tuple[int, Sequence[float]]], widest: float, bins: int = 20
) -> list[Chart]:
    """One histogram per round with values; all share both axes, heights are shares."""
    filled = [(number, values) for number, values in rounds if values]
    if not filled:
        return []
    largest = max(max(values) for _, values in filled)
    limit = next((edge for edge in (0.25, 0.5, 1.0) if largest <= edge < widest), widest)
    shares = [_shares(values, limit, bins) for _, values in filled]
    top = math.ceil(10 * max(max(heights) for heights in shares)) / 10
    to_x, to_y = _scale(0, limit, LEFT, RIGHT), _scale(0, top, BOTTOM, TOP)
    edges = [limit * number / bins for number in range(bins + 1)]
    charts = []
    for (number, values), heights in zip(filled, shares, strict=True):
        bars = tuple(
            (
                to_x(left) + 0.75,
                to_y(height),
                to_x(right) - to_x(left) - 1.5,
                BOTTOM - to_y(height),
                f"{left:.2f} to {right:.2f}: {_percent(height)}",
            )
            for (left, right), height in zip(pairwise(edges), heights, strict=True)
            if height
        )
        median = statistics.median(values)
        charts.append(
            Chart(
                title=f"Round {number}",
                description=f"{name}: {len(values)} samples, median {median:.2f}",
                x_ticks=tuple((to_x(limit * k / 4), f"{limit * k / 4:g}") for k in range(5)),
                y_ticks=tuple((to_y(top * k / 2), _percent(top * k / 2, 0)) for k in range(3)),
                bars=bars,
            )
        )
    return charts


def _shares(values: Sequence[float], limit: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(max(int(value / limit * bins), 0), bins - 1)] += 1
    return [count / len(values) for count in counts]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end], to a tenth of a unit."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


# Words and numbers

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def _percent(value: float | None, digits: int = 1) -> str:
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def _points(value: float) -> str:
    text = f"{100 * value:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def _span(interval: Interval) -> str:
    low, high = interval
    return f"{100 * low:.1f}{DASH}{100 * high:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _memory(megabytes: float | None) -> str:
    if megabytes is None:
        return DASH
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def _words(name: str) -> str:
    """A name of the code as words with a capital: ``wrong_answer`` is ``Wrong answer``."""
    text = name.replace("_", " ").replace("-", " ").strip()
    return text[:1].upper() + text[1:]


def _signed(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def _moment(moment: datetime) -> str:
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _measured(value: float | None, figure: Figure) -> str:
    if figure.unit == "tokens":
        return DASH if value is None else f"{value:.1f}"
    return _percent(value)


_FILTERS: dict[str, Callable[..., str]] = {
    "measured": _measured,
    "percent": _percent,
    "points": _points,
    "span": _span,
    "duration": _duration,
    "memory": _memory,
    "words": _words,
    "signed": _signed,
    "moment": _moment,
    "data_uri": _data_uri,
}
