import pytest

from srccore.data.records import Category, Fact, Sample
from srccore.method.facts import Verdict, check_rationale, gold_rationale, quality
from srccore.method.response import write

LEFT = Fact(subject="the left digit", relation="is", value="3")
RIGHT = Fact(subject="the right digit", relation="is", value="4")
TOTAL = Fact(subject="3 plus 4", relation="is", value="7", visual=False)
FACTS = (LEFT, RIGHT, TOTAL)
GOLD = "The left digit is 3. The right digit is 4. 3 plus 4 is 7."
FLAG = Fact(subject="the flag", relation="is of", value="Kenya")
CONTINENT = Fact(subject="Kenya", relation="is in", value="Africa", visual=False)


def verdicts(rationale: str, facts: tuple[Fact, ...] = FACTS) -> list[Verdict]:
    return [claim.verdict for claim in check_rationale(rationale, facts).claims]


def test_the_gold_rationale_is_sound_and_leads_to_the_answer() -> None:
    assert gold_rationale(FACTS) == GOLD
    check = check_rationale(GOLD, FACTS)
    assert check.is_sound
    assert check.derived_answer == "7"


@pytest.mark.parametrize(
    ("rationale", "expected"),
    [
        ("The left digit is 5.", [Verdict.CONTRADICTED]),
        ("The left digit is three.", [Verdict.SUPPORTED]),
        # 3 and 4 are seen, so 4 times 3 is based on them, and 12 is even on that.
        ("4 times 3 is 12. 12 is even.", [Verdict.SUPPORTED, Verdict.SUPPORTED]),
        ("12 is even.", [Verdict.INVALID]),
        ("4 times 3 is 13.", [Verdict.INVALID]),
        ("4 is more than 3.", [Verdict.SUPPORTED]),
        ("4 is less than 3.", [Verdict.INVALID]),
        ("The picture is nice.", [Verdict.UNSUPPORTED]),
        ("", []),
    ],
)
def test_every_claim_gets_its_verdict(rationale: str, expected: list[Verdict]) -> None:
    assert verdicts(rationale) == expected


def test_a_rationale_is_unsound_if_a_needed_fact_is_missing_or_a_claim_is_wrong() -> None:
    missing = check_rationale("The left digit is 3. 3 plus 4 is 7.", FACTS)
    assert missing.missing == (RIGHT,)
    assert not missing.is_sound
    assert not check_rationale(GOLD + " The left digit is 5.", FACTS).is_sound
    assert not check_rationale(GOLD + " 3 plus 4 is 8.", FACTS).is_sound
    assert check_rationale(GOLD + " The sky is blue.", FACTS).is_sound
    assert not check_rationale("", ()).is_sound


def test_two_facts_may_share_subject_and_relation() -> None:
    facts = (
        Fact(subject="the bar", relation="is", value="red"),
        Fact(subject="the bar", relation="is", value="tall"),
    )
    assert check_rationale("The bar is tall. The bar is red.", facts).is_sound
    assert verdicts("The bar is blue.", facts) == [Verdict.CONTRADICTED]


def test_a_claim_that_no_fact_speaks_of_still_concludes_by_the_relations_of_the_facts() -> None:
    # A misread flag: "is in" must not leave "in Africa", which would equal no answer.
    check = check_rationale("The flag is of Egypt. Egypt is in Africa.", (FLAG, CONTINENT))
    assert check.derived_answer == "africa"
    assert check_rationale("Egypt is big.", (FLAG, CONTINENT)).derived_answer == "big"
    assert check_rationale("Hello.", (FLAG, CONTINENT)).derived_answer is None


def test_quality_counts_facts_claims_and_the_answer() -> None:
    sample = Sample(
        id="s", category=Category.MATH, question="What is the sum?", answer="7", facts=FACTS
    )
    # 3 of 3 facts, nothing wrong, right answer: 3/3 + 1.
    assert quality(write(GOLD, "7"), sample) == pytest.approx(2)
    # 2 of 3 facts, none wrong, half a fact off for the missing one: (2 - 0.5) / 3, wrong answer.
    assert quality(write("The left digit is 3. 3 plus 4 is 7.", "8"), sample) == pytest.approx(0.5)
    # A repeated claim is a wrong one: (3 - 1) / 3 + 1.
    assert quality(write(f"The left digit is 3. {GOLD}", "7"), sample) == pytest.approx(5 / 3)
