"""The embedded world: reproducible, disjoint splits, correct gold rationales."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from srccore.data.records import Category
from srccore.embedded import flaws
from srccore.embedded.world import SPLITS, TASKS, Item, make_item
from srccore.method.facts import check_rationale, quality
from srccore.method.response import parse, same_answer, write

COUNT = 300


@pytest.fixture(scope="module")
def items() -> dict[str, list[Item]]:
    return {split: [make_item(0, split, number) for number in range(COUNT)] for split in SPLITS}


def test_an_item_is_the_same_whatever_was_made_before(items: dict[str, list[Item]]) -> None:
    again = make_item(0, "heldout", 17)
    assert again.sample == items["heldout"][17].sample
    assert again.image.tobytes() == items["heldout"][17].image.tobytes()
    assert make_item(1, "heldout", 17).image.tobytes() != again.image.tobytes()


def test_no_two_splits_share_an_instance_or_an_image(items: dict[str, list[Item]]) -> None:
    owner: dict[str, str] = {}
    for split, made in items.items():
        for item in made:
            image = hashlib.sha256(item.image.tobytes()).hexdigest()
            for instance in (*item.instances, image):
                assert owner.setdefault(instance, split) == split, instance


def test_instances_name_the_digits_and_rows_that_are_drawn(items: dict[str, list[Item]]) -> None:
    for item in items["heldout"]:
        kinds = Counter(name.split(":")[0] for name in item.instances)
        if item.sample.category is Category.MATH:
            assert kinds["digit"] == 2
        if item.sample.category is Category.CHART:
            assert kinds["gapminder"] == (4 if item.task == "trend" else 3)


def test_the_categories_stand_two_to_one_to_one(items: dict[str, list[Item]]) -> None:
    counts = Counter(item.sample.category for item in items["train"])
    assert counts == {Category.PERCEPTION: 150, Category.CHART: 75, Category.MATH: 75}


def test_every_task_occurs(items: dict[str, list[Item]]) -> None:
    wanted = {task for tasks in TASKS.values() for task in tasks}
    assert {item.task for item in items["calibration"]} == wanted


def test_a_gold_rationale_is_sound_and_leads_to_the_answer(items: dict[str, list[Item]]) -> None:
    for made in items.values():
        for item in made:
            sample = item.sample
            check = check_rationale(sample.rationale or "", sample.facts)
            assert check.is_sound, sample
            assert same_answer(check.derived_answer or "", sample.answer), sample
            assert quality(write(sample.rationale or "", sample.answer), sample) == 2


def test_the_wild_is_flawed_more_often_than_not_but_mostly_answers_rightly(
    items: dict[str, list[Item]],
) -> None:
    rng = random.Random(0)
    right = sound = 0
    for item in items["pretrain"]:
        parsed = parse(flaws.flawed_response(item, rng))
        assert parsed is not None
        is_right = same_answer(parsed.answer, item.sample.answer)
        right += is_right
        sound += is_right and check_rationale(parsed.rationale, item.sample.facts).is_sound
    assert 0.55 < right / COUNT < 0.8
    assert 0.25 < sound / COUNT < 0.5
