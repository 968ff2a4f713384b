"""The report of a run, finished or still in progress: one self-contained HTML page.

`render` is pure: it turns what the stages measured into the page. Python decides what is shown
(which metrics are drawn, which sentences differ), `charts` and `format` how it is drawn and
written, and the template `report.html.j2` how it looks. The page loads no external resources: no
scripts, no fonts, no URLs; images are ``data:`` URIs.

All text from models and data sets is untrusted. Jinja escapes every value, and characters that
could change the direction of the text around them are replaced by their code points.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from srccore.method import response, sentences
from srccore.method.evaluation import FIGURE_NAMES, HEADLINE, SHOWN, Figure
from srccore.run.report.charts import PLOT, Panel, Point, Series, histograms, line_charts
from srccore.run.report.format import FILTERS, Interval, visible

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

Probabilities = tuple[float, float, float, float, float]


class Part(BaseModel):
    """Base class: frozen, and fields that the report does not show are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Change(Part):
    """The difference of a figure between two policies, as a fraction (0.1 is 10 points)."""

    difference: float
    interval: Interval | None = None
    """Bootstrap 95% interval of the difference."""


class CategoryFigures(Part):
    """The figures of `srccore.method.evaluation` over some samples."""

    values: dict[str, float | None]
    """By figure; None where it is undefined on these samples."""
    n: int = Field(ge=0)
    interval: dict[str, Interval | None] = {}
    """Bootstrap 95% interval by figure."""

    @model_validator(mode="before")
    @classmethod
    def _gather_values(cls, given: Any) -> Any:
        """Accepts the format of ``figures.json``, where each figure is a field."""
        if not isinstance(given, dict) or "values" in given:
            return given
        return {**given, "values": {name: given.get(name) for name in FIGURE_NAMES}}

    def value(self, figure: str) -> float | None:
        """The value of a figure by its key."""
        return self.values.get(figure)

    def bounds(self, figure: str) -> Interval | None:
        """The interval of a figure; the value twice if none was computed."""
        value = self.value(figure)
        if value is None:
            return None
        return self.interval.get(figure) or (value, value)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value


class RoundFigures(CategoryFigures):
    """The figures of one policy, in the format of ``figures.json``."""

    round: int = Field(ge=0)
    """0 is the policy after stage 1."""
    change: dict[str, Change | None] | None = None
    """By figure, against the policy of the previous round."""
    by_category: dict[str, CategoryFigures] = {}


class RatingRow(Part):
    """R-Scorer's rating of an ordered pair, as the sample card shows it."""

    first: str
    """Which response was shown first, such as ``chosen``."""
    second: str
    probabilities: Probabilities
    """Over the rating tokens 1 to 5; 5 means that the first is much better."""

    @property
    def expected(self) -> float:
        """The expected rating, 1 to 5."""
        return sum(level * p for level, p in enumerate(self.probabilities, start=1))


class SampleCard(Part):
    """One preference with its sample and ratings."""

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
    """R-Scorer's ratings of the pair, in both orders."""


class RoundCuration(Part):
    """The outcome of one round's curation."""

    round: int
    samples: int = Field(ge=0)
    preferences: int = Field(ge=0)
    reasons: dict[str, int] = {}
    """Number of samples without a preference, by reason."""
    margins: tuple[float, ...] = ()
    confidences: tuple[float, ...] = ()
    length_difference: float | None = None
    """Mean length of chosen minus rejected responses, in tokens."""


class ScorerHealth(Part):
    """How R-Scorer does on its validation pairs."""

    teacher_agreement: float | None = None
    """Share of pairs where it picks the teacher's side: first, equal or second."""
    teacher_agreement_both_right: float | None = None
    """The same over pairs whose answers are both right, so that only the rationales differ."""
    swap_consistency: float | None = None
    length_slope: float | None = None
    """Expected rating per word of length difference."""
    rating_mass: float | None = None
    validation_pairs: int | None = None


class RoundScoring(Part):
    """How R-Scorer does on one round's candidates, which have no teacher's ratings."""

    round: int
    swap_consistency: float | None = None
    rating_mass: float | None = None


class StageTime(Part):
    """Time and memory of one stage."""

    name: str
    round: int | None = None
    seconds: float = Field(ge=0)
    peak_memory_mb: float | None = None


class ReportData(Part):
    """Everything that the report shows. What the run has not reached yet is empty."""

    title: str
    created: datetime
    finished: bool = False
    rounds_planned: int | None = None
    rounds: tuple[Annotated[RoundFigures, BeforeValidator(_plain)], ...] = ()
    overall_change: dict[str, Change | None] | None = None
    """By figure, the last policy against round 0; without it, the page shows no interval."""
    curation: tuple[RoundCuration, ...] = ()
    scorer: ScorerHealth | None = None
    scoring: tuple[RoundScoring, ...] = ()
    samples: tuple[SampleCard, ...] = ()
    stages: tuple[StageTime, ...] = ()
    versions: dict[str, str] = {}
    """Version by package."""
    hashes: dict[str, str] = {}
    """SHA-256 by stage output."""
    config_yaml: str | None = None
    notes: tuple[str, ...] = ()


FRACTIONS = tuple(figure for figure in SHOWN if figure.unit == "fraction")
"""The figures that are drawn, and whose changes are in percentage points."""


def render(data: ReportData) -> str:
    """Renders the report.

    Args:
        data: What is known about the run so far.

    Returns:
        A complete HTML page that loads no external resources.
    """
    environment = Environment(
        loader=PackageLoader("srccore.run.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters.update(FILTERS)
    rounds = sorted(data.rounds, key=lambda figures: figures.round)
    last = max([data.rounds_planned or 0, 1, *(figures.round for figures in rounds)])
    page = environment.get_template("report.html.j2").render(
        data=data,
        rounds=rounds,
        figures=SHOWN,
        fractions=FRACTIONS,
        overall={figure.key: _overall(data, rounds, figure.key) for figure in SHOWN},
        figure_charts=line_charts(_figure_panels(rounds), last),
        category_charts=line_charts(_category_panels(rounds), last),
        margin_charts=histograms(
            "Margin", [(part.round, part.margins) for part in data.curation], widest=2.0
        ),
        confidence_charts=histograms(
            "Confidence", [(part.round, part.confidences) for part in data.curation], widest=1.0
        ),
        reasons=list(dict.fromkeys(r for part in data.curation for r in part.reasons)),
        sample_rounds=sorted({card.round for card in data.samples}),
        compare=_compare,
        answer_is_right=response.gives_answer,
        verdict=_verdict,
        plot=PLOT,
    )
    return page.lstrip()


def _overall(data: ReportData, rounds: Sequence[RoundFigures], key: str) -> Change | None:
    """The last policy against the first one, with an interval only if one was computed."""
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
    """``better`` or ``worse`` if the interval excludes zero, otherwise ``open``."""
    if change is None or change.interval is None or figure.better is None:
        return "open"
    low, high = change.interval
    if low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (figure.better == "higher") else "worse"


def _compare(text: str, other: str) -> list[tuple[str, bool]]:
    """Splits a text into sentences, each with whether the other text lacks it."""
    own, others = sentences.split(text), sentences.split(other)
    differs = [True] * len(own)
    for block in difflib.SequenceMatcher(None, own, others, autojunk=False).get_matching_blocks():
        differs[block.a : block.a + block.size] = [False] * block.size
    return list(zip(own, differs, strict=True))


def _figure_panels(rounds: Sequence[RoundFigures]) -> list[Panel]:
    """One panel per figure that has a value."""
    panels = [
        Panel(figure.heading, (_series(figure, [(part.round, part) for part in rounds]),))
        for figure in FRACTIONS
    ]
    return [panel for panel in panels if panel.series[0].points]


def _category_panels(rounds: Sequence[RoundFigures]) -> list[Panel]:
    """One panel per category: aligned accuracy and accuracy."""
    figures = [figure for figure in FRACTIONS if figure.key in (HEADLINE, "accuracy")]
    panels = []
    for name in dict.fromkeys(name for part in rounds for name in part.by_category):
        parts = [
            (part.round, part.by_category[name]) for part in rounds if name in part.by_category
        ]
        panels.append(Panel(name, tuple(_series(figure, parts) for figure in figures)))
    return panels


def _series(figure: Figure, parts: Sequence[tuple[int, CategoryFigures]]) -> Series:
    points = [
        Point(number, value, bounds)
        for number, part in parts
        if (value := part.value(figure.key)) is not None
        and (bounds := part.bounds(figure.key)) is not None
    ]
    return Series(figure.heading, tuple(points))
