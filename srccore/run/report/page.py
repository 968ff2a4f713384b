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

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from srccore.data.records import Preference, Sample
from srccore.method import response, sentences
from srccore.method.curation import CurationFigures
from srccore.method.evaluation import HEADLINE, SHOWN, Change, Figure, Figures, FigureSet
from srccore.run.report.charts import PLOT, Chart, Panel, Point, Series, histograms, line_charts
from srccore.run.report.format import FILTERS, finalize

__all__ = [
    "Folded",
    "RatingRow",
    "ReportData",
    "RoundCuration",
    "RoundScoring",
    "RoundSearch",
    "SampleCard",
    "StageTime",
    "render",
]

Probabilities = tuple[float, float, float, float, float]


class Part(BaseModel):
    """Base class: frozen, and fields that the report does not show are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


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

    round: int
    sample: Sample
    image_png: bytes
    preference: Preference
    ratings: tuple[RatingRow, ...] = ()
    """R-Scorer's ratings of the pair, in both orders."""


class RoundCuration(CurationFigures):
    """The outcome of one round's curation."""

    round: int
    reasons: dict[str, int]
    """Number of samples without a preference, by reason."""


class RoundSearch(Part):
    """What one round's search found, over all its shards."""

    round: int
    samples: int
    candidates: int
    fewer_than_two: int
    unparsed: int
    unfinished: int


class RoundScoring(Part):
    """How R-Scorer does on one round's candidates, which have no teacher's ratings."""

    round: int
    swap_consistency: float | None = None
    rating_mass: float | None = None


class Folded(Part):
    """How much of a trained adapter is left after folding, as `srccore.models.folding.Share`."""

    projection: float
    cosine: float


class StageTime(Part):
    """Time and memory of one stage."""

    name: str
    round: int | None = None
    seconds: float = Field(ge=0)
    peak_memory_mb: float | None = None
    peak_gpu_memory_mb: float | None = None
    gpu_seconds: float = 0.0
    work: dict[str, int] | None = None
    """What was computed on its model. Tokens per second are over the time of the whole stage."""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of prompts and responses, over the time of the whole stage."""
        if not self.work or not self.seconds:
            return None
        return (self.work["prefilled_tokens"] + self.work["decoded_tokens"]) / self.seconds


class ReportData(Part):
    """Everything that the report shows. What the run has not reached yet is empty."""

    title: str
    created: datetime
    finished: bool = False
    rounds_planned: int | None = None
    rounds: tuple[Figures, ...] = ()
    """In order; round 0 is the policy after stage 1."""
    overall_change: dict[str, Change] = {}
    """By figure, the last policy against that of round 0."""
    folding: dict[int, Folded] = {}
    """By round, of the adapter that it trained; round 0 is stage 1."""
    curation: tuple[RoundCuration, ...] = ()
    scorer: dict[str, int | float | None] | None = None
    """R-Scorer on its validation pairs, as `srccore.method.scoring.validate` measures it."""
    search: tuple[RoundSearch, ...] = ()
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
        finalize=finalize,
    )
    environment.filters.update(FILTERS)
    last = max([data.rounds_planned or 0, 1, *(figures.round for figures in data.rounds)])
    page = environment.get_template("report.html.j2").render(
        data=data,
        rounds=data.rounds,
        figures=SHOWN,
        fractions=FRACTIONS,
        figure_charts=line_charts(_figure_panels(data.rounds), last),
        category_charts=line_charts(_category_panels(data.rounds), last),
        curation_charts=_curation_charts(data.curation),
        reasons=list(dict.fromkeys(r for part in data.curation for r in part.reasons)),
        sample_rounds=sorted({card.round for card in data.samples}),
        compare=_compare,
        answer_is_right=response.gives_answer,
        verdict=_verdict,
        plot=PLOT,
    )
    return page.lstrip()


def _curation_charts(rounds: Sequence[RoundCuration]) -> list[tuple[str, list[Chart]]]:
    """Histograms of what the settings of curation are chosen by, each with its heading."""
    margins = [(part.round, part.margins) for part in rounds]
    confidences = [(part.round, part.confidences) for part in rounds]
    anchors = [(part.round, part.anchors) for part in rounds]
    charts = [
        ("Margin: chosen against rejected, of every rated sample", "Margin", margins),
        ("Confidence of the same pairs", "Confidence", confidences),
        ("Verdict on the chosen against the reference response", "Verdict", anchors),
    ]
    return [
        (heading, histograms(name, values, signed=name != "Confidence"))
        for heading, name, values in charts
        if any(numbers for _, numbers in values)
    ]


def _verdict(change: Change, figure: Figure) -> str:
    """``better`` or ``worse`` if the interval excludes zero, otherwise ``open``."""
    low, high = change.interval
    if figure.better is None or low <= 0 <= high:
        return "open"
    return "better" if (low > 0) == (figure.better == "higher") else "worse"


def _compare(text: str, other: str) -> list[tuple[str, bool]]:
    """Splits a text into sentences, each with whether the other text lacks it."""
    own, others = sentences.split(text), sentences.split(other)
    differs = [True] * len(own)
    for block in difflib.SequenceMatcher(None, own, others, autojunk=False).get_matching_blocks():
        differs[block.a : block.a + block.size] = [False] * block.size
    return list(zip(own, differs, strict=True))


def _figure_panels(rounds: Sequence[Figures]) -> list[Panel]:
    """One panel per figure that has a value."""
    panels = [
        Panel(figure.heading, (_series(figure, [(part.round, part) for part in rounds]),))
        for figure in FRACTIONS
    ]
    return [panel for panel in panels if panel.series[0].points]


def _category_panels(rounds: Sequence[Figures]) -> list[Panel]:
    """One panel per category: aligned accuracy and accuracy."""
    figures = [figure for figure in FRACTIONS if figure.key in (HEADLINE, "accuracy")]
    panels = []
    for name in dict.fromkeys(name for part in rounds for name in part.by_category):
        parts = [
            (part.round, part.by_category[name]) for part in rounds if name in part.by_category
        ]
        panels.append(Panel(name, tuple(_series(figure, parts) for figure in figures)))
    return panels


def _series(figure: Figure, parts: Sequence[tuple[int, FigureSet]]) -> Series:
    points = [
        Point(number, getattr(part, figure.key), part.interval[figure.key])
        for number, part in parts
        if figure.key in part.interval
    ]
    return Series(figure.heading, tuple(points))
