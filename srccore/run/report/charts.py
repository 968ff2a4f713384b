"""The geometry of the report's charts: positions of lines, bands and bars, for the template."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from srccore.run.report.format import Interval, percent, span

__all__ = ["PLOT", "Chart", "Curve", "Dot", "Panel", "Point", "Series", "histograms", "line_charts"]

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 326, 12, 164
"""The plotting area inside the drawing."""
PLOT = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM}


@dataclass(frozen=True)
class Point:
    """A fraction measured after a round, with its interval."""

    round: int
    value: float
    bounds: Interval


@dataclass(frozen=True)
class Series:
    """One line of a chart: a fraction over rounds. A round without a value has no point."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """The content of one line chart, the main series first."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Dot:
    """A measured value of a curve, in units of the drawing."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart with its interval band, the vertices of a polygon."""

    style: Literal["main", "side"]
    dots: tuple[Dot, ...]
    band: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Chart:
    """A drawing without colours or fonts. Ticks are (position, label)."""

    title: str
    description: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    curves: tuple[Curve, ...] = ()
    bars: tuple[tuple[float, float, float, float, str], ...] = ()
    """x, y, width, height, label."""


def line_charts(panels: Sequence[Panel], last: int) -> list[Chart]:
    """Draws one chart per panel.

    Args:
        panels: What to draw. All axes span the same number of points, so that slopes compare.
        last: The last round of the x axis, at least 1.

    Returns:
        The charts, in units of the drawing.
    """
    step = _percent_step(
        [point.bounds for series in panel.series for point in series.points] for panel in panels
    )
    return [_line_chart(panel, step, last) for panel in panels]


def _line_chart(panel: Panel, step: int, last: int) -> Chart:
    """Draws a panel with a tick every ``step`` percentage points."""
    lows = [point.bounds[0] for series in panel.series for point in series.points]
    floor = _percent_floor(min(lows, default=0.0), step)
    to_x = _scale(0, last, LEFT + 12, RIGHT - 12)
    to_y = _scale(floor / 100, (floor + 5 * step) / 100, BOTTOM, TOP)
    curves: list[Curve] = []
    for series in panel.series:
        dots, lower, upper = [], [], []
        for point in series.points:
            x = to_x(point.round)
            text = f"Round {point.round}: {percent(point.value)} ({span(point.bounds)})"
            dots.append(Dot(x, to_y(point.value), f"{series.name}, {text}"))
            lower.append((x, to_y(point.bounds[0])))
            upper.append((x, to_y(point.bounds[1])))
        style: Literal["main", "side"] = "side" if curves else "main"
        curves.append(Curve(style, tuple(dots), (*upper, *reversed(lower))))
    return Chart(
        title=panel.title,
        description="; ".join(dot.label for curve in curves for dot in curve.dots),
        x_ticks=tuple((to_x(number), str(number)) for number in range(last + 1)),
        y_ticks=tuple(
            (to_y(tick / 100), f"{tick}%") for tick in range(floor, floor + 5 * step + 1, step)
        ),
        curves=tuple(curves),
    )


def _percent_step(panels: Iterable[Sequence[Interval]]) -> int:
    """The finest tick step, in points, at which five steps span the intervals of each panel."""
    spans = [
        (min(low for low, _ in bounds), max(high for _, high in bounds))
        for bounds in panels
        if bounds
    ]
    return next(
        step
        for step in (2, 5, 10, 20)
        if step == 20
        or all(100 * high <= _percent_floor(low, step) + 5 * step for low, high in spans)
    )


def _percent_floor(low: float, step: int) -> int:
    """Where an axis of five steps starts, in percent; it never ends above 100."""
    return max(0, min(int(100 * low // step) * step, 100 - 5 * step))


def histograms(
    name: str,
    rounds: Sequence[tuple[int, Sequence[float]]],
    *,
    signed: bool = False,
    bins: int = 20,
) -> list[Chart]:
    """Draws one histogram per round that has values; all share the same axes.

    Args:
        name: What the values are.
        rounds: Pairs of a round and its values, which are at most 1.
        signed: Whether the values start at -1, and not at 0.
        bins: Number of bars along the x axis.

    Returns:
        The charts; the height of a bar is a share of the round's values.
    """
    filled = [(number, values) for number, values in rounds if values]
    if not filled:
        return []
    largest = max(abs(value) for _, values in filled for value in values)
    high = next((edge for edge in (0.25, 0.5) if largest <= edge), 1.0)
    low = -high if signed else 0.0
    shares = [_shares(values, low, high, bins) for _, values in filled]
    top = math.ceil(10 * max(max(heights) for heights in shares)) / 10
    to_x, to_y = _scale(low, high, LEFT, RIGHT), _scale(0, top, BOTTOM, TOP)
    edges = [low + (high - low) * number / bins for number in range(bins + 1)]
    quarters = [low + (high - low) * number / 4 for number in range(5)]
    charts = []
    for (number, values), heights in zip(filled, shares, strict=True):
        bars = tuple(
            (
                to_x(left) + 0.75,
                to_y(height),
                to_x(right) - to_x(left) - 1.5,
                BOTTOM - to_y(height),
                f"{left:.2f} to {right:.2f}: {percent(height)}",
            )
            for (left, right), height in zip(pairwise(edges), heights, strict=True)
            if height
        )
        median = statistics.median(values)
        charts.append(
            Chart(
                title=f"Round {number}",
                description=f"{name}: {len(values)} samples, median {median:.2f}",
                x_ticks=tuple((to_x(value), f"{value:g}") for value in quarters),
                y_ticks=tuple((to_y(top * k / 2), percent(top * k / 2, 0)) for k in range(3)),
                bars=bars,
            )
        )
    return charts


def _shares(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(max(int((value - low) / (high - low) * bins), 0), bins - 1)] += 1
    return [count / len(values) for count in counts]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps [low, high] to [start, end], to a tenth of a unit."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)
