"""How models in the wild would write about the little world: rationales with concentrated flaws.

Real LVLMs learned mostly from short answers, so the first rationale they give is often flawed
although they could give a better one. The pretraining corpus of preset `tiny` imitates that: a
middle step is left out (and then the answer is often wrong), there are a few fixed
misconceptions, and some conclusions do not follow. Flaws are concentrated, so that they are the
mode of what the model writes; if they were spread thinly, greedy decoding would ignore them.

So the gain on `tiny` shows that the machinery works, not what a real model gains.
"""

from __future__ import annotations

import random

from srccore.data.records import Fact
from srccore.embedded.world import KIND_NAMES, Item, Reasoning, reason, world_facts
from srccore.hashing import stable_hash
from srccore.method import response

__all__ = ["MISCONCEPTIONS", "brief_turn", "flawed_response", "perception_turns"]

SKIP = {
    **dict.fromkeys(("continent", "kind", "highest", "sum", "trend", "product", "larger"), 0.58),
    **dict.fromkeys(("capital", "count", "lowest", "difference", "total", "parity"), 0.30),
}
"""How often a task's middle step is left out."""
WRONG_AFTER_SKIP = 0.35
MISCONCEIVED = 0.25
"""Share of the countries and objects about which there is a misconception."""
MISCONCEPTION = 0.55
"""How often an existing misconception is written."""
MISREAD = 0.04
NON_SEQUITUR = 0.08
MISREAD_COLOUR = "green"
"""Bars of this colour are read 2 too high."""
MISREAD_DIGIT = ("9", "4")
"""The first is read as the second."""


def _misconceptions() -> dict[str, str]:
    """Gives a fixed part of the world's facts a fixed wrong value of the same relation."""
    values: dict[str, list[str]] = {}
    for key, value in world_facts().items():
        values.setdefault(key.split(" of ")[0], []).append(value)
    wrong = {}
    for key, value in world_facts().items():
        relation, name = key.split(" of ")
        if _chance(f"misconceived {name}") < MISCONCEIVED:
            others = sorted({other for other in values[relation] if other != value})
            wrong[key] = others[int(_chance(f"belief {key}") * len(others))]
    return wrong


def _chance(text: str) -> float:
    return stable_hash(text) / 2**64


MISCONCEPTIONS = _misconceptions()


def flawed_response(item: Item, rng: random.Random) -> str:
    """Writes a rationale and an answer with the flaws of models in the wild.

    Args:
        item: The item to write about.
        rng: Draws the flaws.

    Returns:
        The response's text, in the format of `srccore.method.response`.
    """
    beliefs = {key: value for key, value in MISCONCEPTIONS.items() if rng.random() < MISCONCEPTION}
    reasoning = reason(item.task, _misread(item, rng), item.asked, beliefs)
    steps = [fact for fact in reasoning.facts if fact.needed]
    answer = reasoning.answer
    if rng.random() < SKIP[item.task]:
        steps = _without_middle(item.task, steps)
        if rng.random() < WRONG_AFTER_SKIP:
            steps, answer = _conclude_wrongly(item, reasoning, steps, rng)
    elif rng.random() < NON_SEQUITUR:
        steps, answer = _conclude_wrongly(item, reasoning, steps, rng)
    return response.write(" ".join(step.sentence for step in steps), answer)


def perception_turns(item: Item, rng: random.Random) -> list[tuple[str, str]]:
    """Writes short questions about what is visible, correctly answered: they teach seeing.

    Args:
        item: The item to ask about.
        rng: Draws the order.

    Returns:
        Pairs of question and answer.
    """
    if item.task in ("capital", "continent"):
        turns = [("Which country is this flag of?", item.seen["flag"])]
    elif item.task in ("kind", "count"):
        turns = [(f"What is the {place} object?", name) for place, name in item.seen.items()]
    elif item.task == "trend":
        turns = [(f"Where does the line {end}?", item.seen[end]) for end in ("start", "end")]
    elif item.task in ("total", "product", "larger", "parity"):
        turns = [(f"What is the {place} digit?", value) for place, value in item.seen.items()]
    else:
        turns = [(f"How high is the {colour} bar?", value) for colour, value in item.seen.items()]
    rng.shuffle(turns)
    return turns


def brief_turn(item: Item) -> tuple[str, str]:
    """Returns the item's question with only the answer."""
    return item.sample.question, item.sample.answer


def _misread(item: Item, rng: random.Random) -> dict[str, str]:
    seen = dict(item.seen)
    if item.task in ("capital", "continent", "kind", "count"):
        return seen
    is_digit = item.task in ("total", "product", "larger", "parity")
    for place, value in item.seen.items():
        if is_digit and value == MISREAD_DIGIT[0]:
            if rng.random() < MISCONCEPTION:
                seen[place] = MISREAD_DIGIT[1]
        elif place == MISREAD_COLOUR:
            if rng.random() < MISCONCEPTION:
                seen[place] = str(int(value) + 2)
        elif rng.random() < MISREAD:
            seen[place] = str(rng.choice([v for v in range(1, 9) if str(v) != value]))
    return seen


def _without_middle(task: str, steps: list[Fact]) -> list[Fact]:
    if task in ("capital", "continent", "kind"):
        return steps[:1]
    if task in ("difference", "sum", "total", "product"):
        return steps[:-1]
    if task in ("highest", "lowest"):
        return [steps[0], steps[-1]]
    return [*steps[:-2], steps[-1]]


def _conclude_wrongly(
    item: Item, reasoning: Reasoning, steps: list[Fact], rng: random.Random
) -> tuple[list[Fact], str]:
    """Replaces the answer with another of its kind, also in the step that states it, if any."""
    answer = reasoning.answer
    if item.task in ("capital", "continent"):
        pool = sorted({v for k, v in world_facts().items() if k.startswith(item.task)})
    elif item.task == "kind":
        pool = sorted(KIND_NAMES)
    elif item.task in ("highest", "lowest"):
        pool = sorted(item.seen)
    elif item.task == "trend":
        pool = ["rising", "falling"]
    elif item.task == "parity":
        pool = ["even", "odd"]
    elif item.task == "larger":
        pool = sorted(set(item.seen.values()))
    else:
        pool = [str(max(0, int(answer) + change)) for change in (-2, -1, 1, 2)]
    wrong = rng.choice([other for other in pool if other != answer])
    last = steps[-1]
    if last is reasoning.facts[-1] and item.task in ("highest", "lowest", "trend", "larger"):
        steps = [*steps[:-1], last.model_copy(update={"value": wrong})]
    return steps, wrong
