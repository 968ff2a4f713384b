"""How the report writes numbers, intervals, times and names, and untrusted text."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime

from markupsafe import Markup

from srccore.method.evaluation import Figure
from srccore.shown import visible

__all__ = ["FILTERS", "Interval", "finalize", "percent", "span"]

Interval = tuple[float, float]
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, or a dash for a missing value."""
    return DASH if value is None else f"{100 * value:.{digits}f}%"


def points(value: float) -> str:
    text = f"{100 * value:+.1f}".replace("-", MINUS)
    return "0.0" if text[1:] == "0.0" else text


def span(interval: Interval) -> str:
    """An interval of fractions in percent, without percent signs."""
    low, high = interval
    return f"{100 * low:.1f}{DASH}{100 * high:.1f}"


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def memory(megabytes: float | None) -> str:
    if megabytes is None:
        return DASH
    return f"{megabytes / 1024:.1f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def words(name: str) -> str:
    """An identifier in words: ``wrong_answer`` becomes ``Wrong answer``."""
    text = name.replace("_", " ").replace("-", " ").strip()
    return text[:1].upper() + text[1:]


def signed(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def moment(moment: datetime) -> str:
    zone = f" {moment.tzname()}" if moment.tzinfo else ""
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def measured(value: float | None, figure: Figure) -> str:
    if figure.unit == "tokens":
        return DASH if value is None else f"{value:.1f}"
    return percent(value)


FILTERS: dict[str, Callable[..., str]] = {
    each.__name__: each
    for each in (measured, percent, points, span, duration, memory, words, signed, moment, data_uri)
}


def finalize(value: object) -> object:
    """Makes untrusted text visible; Jinja calls it on every value."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return visible(value)
    return value
