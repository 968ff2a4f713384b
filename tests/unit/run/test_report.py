"""The report: it loads nothing, escapes all text, and renders whatever a run has so far."""

import re
from html.parser import HTMLParser
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from srccore.data.records import Sample
from srccore.method.evaluation import FIGURES, Change, Figure
from srccore.run.report import charts
from srccore.run.report import page as report
from srccore.run.report.format import duration
from srccore.run.report.page import ReportData, SampleCard, render

SECTIONS = [
    "summary",
    "figures",
    "curves",
    "categories",
    "curation",
    "scorer",
    "samples",
    "time",
    "provenance",
]
VOID = {"meta", "img", "br"}
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title></svg><script src=//evil.example>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """Records tags, attributes and text, and fails on tags that are not nested properly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str | None]:
        return [value for _, name, value in self.attributes if name == attribute]


def figures(number: int, aligned: float, **changes: object) -> dict[str, object]:
    values = {
        "accuracy": 0.6,
        "rationale_accuracy": 0.5,
        "aligned_accuracy": aligned,
        "spurious_correctness": 0.3,
        "consistency": 0.8,
        "format_rate": 1.0,
    }
    interval = {
        name: [max(0, value - 0.04), min(1, value + 0.04)] for name, value in values.items()
    }
    part = {**values, "n": 100, "judged": 100, "mean_tokens": 30.5, "interval": interval}
    whole = {"round": number, "change": None, "by_category": {"chart": part}, **part}
    return {**whole, **changes}


CHOSEN = "The red bar is 3. It is highest.\nAnswer: red"
REJECTED = "The red bar is 3. Blue is highest.\nAnswer: blue"


def card(
    chosen: str = CHOSEN,
    rejected: str = REJECTED,
    sample: Sample | None = None,
    **changes: object,
) -> SampleCard:
    texts = {"chosen": chosen, "rejected": rejected}
    values: dict[str, object] = {
        "round": 1,
        "sample": sample
        or Sample(id="chart-1", category="chart", question="Which bar is highest?", answer="red"),
        "image_png": b"\x89PNG",
        "preference": {
            "sample_id": "chart-1",
            "margin": 0.8,
            "confidence": 0.7,
            **{
                name: {"id": name, "text": text, "log_probability": -1, "token_count": 9}
                for name, text in texts.items()
            },
        },
        "ratings": [
            {"first": "chosen", "second": "rejected", "probabilities": (0, 0, 0, 0.5, 0.5)},
            {"first": "rejected", "second": "chosen", "probabilities": (1, 0, 0, 0, 0)},
        ],
    }
    return SampleCard.model_validate({**values, **changes})


def curated(**changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "round": 1,
        "samples": 10,
        "by_category": {"chart": 4},
        "length_difference": -1.5,
        "mean_margin": 0.65,
        "mean_confidence": 0.68,
        "swap_consistency": 0.9,
        "margins": [0.3, 0.4, 0.8, 1.0],
        "confidences": [0.5, 0.6, 0.7, 0.9],
        "anchors": [-0.7, -0.1, 0.1],
        "unanchored": 1,
    }
    return {**values, **changes}


def full(**changes: object) -> ReportData:
    values: dict[str, object] = {
        "title": "tiny",
        "created": "2026-05-04T12:33:10+00:00",
        "finished": True,
        "rounds_planned": 1,
        "rounds": [
            figures(0, 0.41),
            figures(
                1,
                0.5,
                change={"aligned_accuracy": {"difference": 0.09, "interval": [0.02, 0.16]}},
            ),
        ],
        "overall_change": {"aligned_accuracy": {"difference": 0.09, "interval": [0.02, 0.16]}},
        "folding": {0: {"projection": 1, "cosine": 1}, 1: {"projection": 0.875, "cosine": 0.33}},
        "curation": [curated(preferences=4, reasons={"margin_too_small": 6})],
        "scorer": {
            "teacher_agreement": 0.84,
            "teacher_agreement_both_right": 0.7,
            "swap_consistency": 0.9,
            "length_slope": -0.003,
            "rating_mass": 0.99,
            "validation_pairs": 50,
        },
        "search": [
            {
                "round": 1,
                "samples": 10,
                "candidates": 44,
                "fewer_than_two": 2,
                "unparsed": 17,
                "unfinished": 3,
            }
        ],
        "scoring": [{"round": 1, "swap_consistency": 0.93, "rating_mass": 0.99}],
        "samples": [card()],
        "stages": [
            {
                "name": "search-candidates",
                "round": 1,
                "seconds": 20,
                "peak_memory_mb": 1024,
                "peak_gpu_memory_mb": 3072,
                "gpu_seconds": 40,
                "work": {"prompts": 8, "prefilled_tokens": 4600, "decoded_tokens": 1400},
            },
            {"name": "train-dpo", "round": 1, "seconds": 61, "peak_memory_mb": 2048},
        ],
        "versions": {"torch": "2.13.0"},
        "hashes": {"data/train": "9f" * 32},
        "config_yaml": "name: tiny\n",
        "notes": ["It shows that the machinery works."],
    }
    return ReportData.model_validate({**values, **changes})


def minimal() -> ReportData:
    return ReportData(title="tiny", created="2026-05-04T12:33:10")


def test_the_work_of_a_stage_is_shown_with_its_tokens_per_second() -> None:
    text = render(full())
    assert "<td>8</td><td>4,600</td><td>1,400</td><td>300</td>" in text  # 6,000 tokens in 20 s.
    assert "Peak GPU memory" in text
    # In the stage's row, and in the total.
    assert text.count("<td>40.0 s</td>") == 2
    assert "Peak GPU memory" not in render(minimal())


@pytest.mark.parametrize("data", [full(), minimal()], ids=["full", "minimal"])
def test_a_page_is_whole_and_has_every_section(data: ReportData) -> None:
    text = render(data)
    page = Page(text)
    ids = page.values("id")
    assert text.startswith("<!doctype html>")
    assert len(ids) == len(set(ids))
    assert set(SECTIONS) <= set(ids)
    assert {f"#{name}" for name in SECTIONS[1:]} == set(page.values("href"))


def test_what_was_measured_is_on_the_page() -> None:
    text = Page(render(full())).text
    for shown in [
        "41.0%",
        "50.0%",
        "+9.0",
        "+2.0 to +16.0",
        "excludes zero",
        "Margin too small",
        "4 samples, median 0.60",
        "3 samples, median -0.10",
        "Without a rationale or an answer17",
        "84.0%",
        "−0.0030",  # noqa: RUF001 - a minus sign is what the page shows
        "1 min 01 s",
        "2.0 GB",
        "2.13.0",
        "9f" * 32,
        "machinery works",
        "expected rating 4.50",
        "4 May 2026, 12:33 UTC",
    ]:
        assert shown in text


def test_what_is_left_of_an_adapter_is_shown_for_its_round() -> None:
    assert "87.5%cosine 0.33" in Page(render(full())).text
    assert "Adapter kept" not in Page(render(full(folding={}))).text
    only_stage_1 = Page(render(full(folding={0: {"projection": 0.5, "cosine": 0.5}}))).text
    assert re.search(r"50\.0%cosine 0\.50\s*\N{EN DASH}", only_stage_1)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.key)
def test_every_figure_is_on_the_page(figure: Figure) -> None:
    text = Page(render(full())).text
    assert text.count(figure.heading) >= 2, "in the summary and in the table"
    assert figure.meaning in text


def test_a_page_loads_nothing() -> None:
    text = render(full())
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert all(value and value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert not any(word in text for word in ["http://", "https://", "url(", "@import"])
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        # These two have no default.
        "base-uri 'none'; form-action 'none'"
    )
    assert policy in page.values("content")


def test_a_run_in_progress_says_so() -> None:
    text = Page(render(minimal())).text
    assert "In progress" in text
    assert "No policy has been evaluated. The run is still in progress." in text


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    calm = Page(render(full()))
    page = Page(
        render(
            full(
                title=text,
                notes=[text],
                config_yaml=text,
                versions={text: text},
                hashes={text: text},
                curation=[curated(preferences=0, reasons={text: 1})],
                stages=[{"name": text, "seconds": 1}],
                samples=[
                    card(
                        sample=Sample(id=text, category="chart", question=text, answer=text),
                        chosen=f"{text} One. Two.\nAnswer: {text}",
                        rejected=text,
                        ratings=[
                            {"first": text, "second": text, "probabilities": (0, 0, 1, 0, 0)},
                        ],
                    )
                ],
            )
        )
    )
    assert text in page.text
    assert set(page.tags) <= set(calm.tags)
    assert page.tags.count("img") == 1
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert {name for _, name, _ in page.attributes} <= {name for _, name, _ in calm.attributes}


def test_characters_that_turn_or_hide_text_are_written_out() -> None:
    text = render(full(samples=[card(chosen="a\u202eb\u2066c\x00d\ud800e\U000e0041f")]))
    assert "a⟨U+202E⟩b⟨U+2066⟩c⟨U+0000⟩d⟨U+D800⟩e⟨U+E0041⟩f" in text
    assert text.encode("utf-8")


def test_joined_emoji_and_right_to_left_letters_stay() -> None:
    assert "👩\u200d🔬 שלום" in render(full(title="👩\u200d🔬 שלום"))


def test_a_long_word_may_break_anywhere() -> None:
    text = render(full(samples=[card(chosen="x" * 5000)]))
    assert "x" * 5000 in text
    assert "overflow-wrap: anywhere" in text


def test_a_null_figure_is_a_dash_and_no_dot() -> None:
    without = figures(0, 0.0, spurious_correctness=None)
    del without["interval"]["spurious_correctness"]
    data = full(rounds=[without, figures(1, 0.5, change={})])
    page = Page(render(data))
    found = charts.line_charts(report._figure_panels(data.rounds), last=1)
    by_title = {chart.title: chart for chart in found}
    assert "–" in page.text  # noqa: RUF001 - the dash for a missing value
    assert len(by_title["Spurious correctness"].curves[0].dots) == 1
    assert len(by_title["Accuracy"].curves[0].dots) == 2


def test_sentences_that_the_other_text_lacks_are_marked() -> None:
    # The first sentence is shared, the second and the answer line are not.
    assert report._compare(CHOSEN, REJECTED) == [
        ("The red bar is 3.", False),
        ("It is highest.", True),
        ("Answer: red", True),
    ]
    text = render(full())
    assert '<span class="unseen">Only in chosen: </span>It is highest.</mark>' in text
    assert "✓ answer right" in text
    assert "✗ answer wrong" in text


@pytest.mark.parametrize(
    ("interval", "better", "expected"),
    [
        ((0.01, 0.05), "higher", "better"),
        ((-0.05, -0.01), "higher", "worse"),
        ((0.01, 0.05), "lower", "worse"),
        ((-0.05, -0.01), "lower", "better"),
        ((-0.01, 0.05), "higher", "open"),
        ((0.0, 0.05), "higher", "open"),
        ((0.01, 0.05), None, "open"),
    ],
)
def test_a_change_is_called_only_where_its_interval_excludes_zero(
    interval: tuple[float, float], better: Literal["higher", "lower"] | None, expected: str
) -> None:
    figure = Figure("f", "F", "f", "", lambda _: (0, 1), better)
    assert report._verdict(Change(difference=0.02, interval=interval), figure) == expected


def test_the_summary_compares_the_last_policy_with_the_first() -> None:
    overall = {"aligned_accuracy": {"difference": 0.2, "interval": [-0.05, 0.45]}}
    three = [figures(0, 0.4), figures(1, 0.45), figures(2, 0.6)]
    text = " ".join(Page(render(full(rounds=three, overall_change=overall))).text.split())
    assert "+20.0 −5.0 to +45.0 points" in text  # noqa: RUF001 - a minus sign
    assert "From round 0 to round 2; the 95% interval includes zero." in text


def test_axes_take_the_finest_step_that_holds_all_intervals() -> None:
    # 41-49 fits 40-50 (step 2), but 41-58 needs 40-65 (step 5); 12-88 needs the whole.
    assert charts._percent_step([[(0.41, 0.49)]]) == 2
    assert charts._percent_step([[(0.41, 0.49)], [(0.41, 0.58)]]) == 5
    assert charts._percent_step([[(0.12, 0.88)], []]) == 20
    assert charts._percent_step([]) == 2
    assert charts._percent_floor(0.97, 5) == 75


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted), min_size=1))
def test_an_axis_holds_every_interval(bounds: list[list[float]]) -> None:
    intervals = [(low, high) for low, high in bounds]
    step = charts._percent_step([intervals])
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    floor = charts._percent_floor(low, step)
    assert floor <= 100 * low
    assert 100 * high <= floor + 5 * step <= 100


@given(st.lists(st.floats(-1, 1), min_size=1))
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    assert sum(charts._shares(values, -1.0, 1.0, 20)) == pytest.approx(1)


def test_bins_hold_the_values_from_their_left_edge_on() -> None:
    # Ten bins of 0.1: 0.05 in the first, 0.1 and 0.15 in the second, 1.0 in the last.
    assert charts._shares([0.05, 0.1, 0.15, 1.0], 0.0, 1.0, 10) == [0.25, 0.5, *[0.0] * 7, 0.25]
    # Four bins of 0.5 from -1.
    assert charts._shares([-1.0, -0.2, 0.0, 1.0], -1.0, 1.0, 4) == [0.25] * 4


def test_a_signed_histogram_is_centred_on_zero() -> None:
    (chart,) = charts.histograms("Verdict", [(1, (-0.4, 0.1))], signed=True)
    assert [label for _, label in chart.x_ticks] == ["-0.5", "-0.25", "0", "0.25", "0.5"]


def test_equal_and_zero_values_still_make_a_histogram() -> None:
    (chart,) = charts.histograms("Margin", [(1, ()), (2, (0.0, 0.0))])
    assert chart.title == "Round 2"
    assert len(chart.bars) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (59.97, "1 min 00 s"), (184.2, "3 min 04 s"), (3720, "1 h 02 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValidationError):
        full(stages=[{"name": "train-dpo", "seconds": float("nan")}])
