"""Measures the gain of SRC on preset `tiny` against three controls with the same budget.

    python benchmarks/gain.py --out runs/gain --seeds 0 1 2

For each seed it makes a run, then the controls. They start from the run's stage-1 policy and use
the same samples, rounds and training settings:

* random: chosen and rejected are drawn at random from raw responses (duplicates included);
* answer: any candidate with the right answer against any with a wrong one;
* sft: plain SFT on the responses that R-Scorer chose, without rejected ones.

Writes ``gain.json`` and prints the Markdown table of `RESULTS.md`. Run the same command again to
resume an interrupted benchmark.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from srccore.config import RunConfig, load_config
from srccore.data import dataset, sampling
from srccore.data.records import (
    Candidate,
    CandidateSet,
    Preference,
    Response,
    Sample,
    read_records,
    write_records,
)
from srccore.hashing import stable_hash
from srccore.method import evaluation
from srccore.method.driver import Search, drive
from srccore.method.engine import Draw, Node, Steps
from srccore.method.response import gives_answer
from srccore.method.search import candidate_id
from srccore.models.engines import sampling_engine
from srccore.run.console import ConsoleObserver
from srccore.run.folder import RunFolder
from srccore.run.loop import run
from srccore.run.report.gather import overall_change
from srccore.stages.batches import prompt_batches
from srccore.stages.candidates import score_candidates, search_candidates
from srccore.stages.evaluation import evaluate, read_outcomes
from srccore.stages.folder import StageFolder
from srccore.stages.manifest import read_manifest
from srccore.stages.preferences import curate_preference, train_dpo
from srccore.stages.splits import prompt
from srccore.stages.table import Input, Stage
from srccore.training.machine import Machine

ARMS = ("random", "answer", "sft")
SFT = Stage("sft", "", "models", inputs=(Input("preferences", "curate-preference"),))
RANDOM = Stage("random", "", "models", inputs=(Input("policy", "train-dpo"),))
ANSWER = Stage("answer", "", "light", inputs=(Input("candidates", "search-candidates"),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        config = load_config("tiny", [*arguments.overrides, f"seed={seed}"])
        folder = arguments.out / f"seed-{seed}"
        began = time.monotonic()
        observer = ConsoleObserver(Console(highlight=False))
        rows.append({"seed": seed, "arm": "src", "rounds": run(config, folder / "src", observer)})
        print(f"seed {seed}: src in {time.monotonic() - began:.0f} s", flush=True)
        rows[-1]["headroom"] = headroom(config, folder)
        changes = overall_change(folder / "src", config, config.rounds)
        rows[-1]["change"] = {name: each.model_dump() for name, each in changes.items()}
        for arm in arguments.arms:
            began = time.monotonic()
            rows.append({"seed": seed, "arm": arm, "rounds": control(arm, config, folder)})
            last = rows[-1]["rounds"][-1]["aligned_accuracy"]
            print(f"seed {seed}: {arm} {last:.3f} in {time.monotonic() - began:.0f} s", flush=True)
        (arguments.out / "gain.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))
    print(comparison(arguments.out, arguments.seeds, arguments.arms, config.rounds))


def control(arm: str, config: RunConfig, folder: Path) -> list[dict]:
    """Runs all rounds of one control, starting from the run's stage-1 policy."""
    source, out = RunFolder(folder / "src"), RunFolder(folder / arm)
    heldout, calibration = (source.split(name) for name in ("heldout", "calibration"))
    policy = source.trained_policy(0)
    evaluations = [source.output("evaluate", 0)]
    for number in range(1, config.rounds + 1):
        place = out.round(number)
        preferences = place / "preferences"
        if arm == "random":
            random_preferences(config, calibration, policy, preferences, number)
        else:
            search_candidates(
                config.search,
                data=calibration,
                policy=policy,
                out=place / "search",
                seed=config.seed,
                round_number=number,
                machine=Machine(config.device),
            )
            if arm == "answer":
                answer_preferences(config, calibration, place / "search", preferences, number)
            else:
                score_candidates(
                    config.scoring,
                    data=calibration,
                    candidates=place / "search",
                    scorer=source.output("train-scorer"),
                    rationales=source.rationales("calibration"),
                    out=place / "score",
                    machine=Machine(config.device),
                )
                curate_preference(
                    config.curation,
                    data=calibration,
                    candidates=[place / "search"],
                    ratings=[place / "score"],
                    out=preferences,
                )
        train = supervised if arm == "sft" else preference_trained
        policy = train(config, calibration, preferences, policy, place / "train", number)
        evaluate(
            config.evaluation,
            data=heldout,
            policy=policy,
            out=out.output("evaluate", number),
            seed=config.seed,
            round_number=number,
            previous=evaluations[-1],
            machine=Machine(config.device),
        )
        evaluations.append(out.output("evaluate", number))
    return [read_manifest(path).figures for path in evaluations]


def preference_trained(
    config: RunConfig, data: Path, preferences: Path, policy: Path, out: Path, number: int
) -> Path:
    train_dpo(
        config.dpo,
        data=data,
        preferences=preferences,
        policy=policy,
        out=out,
        seed=config.seed,
        machine=Machine(config.device),
    )
    return out / "policy.json"


def supervised(
    config: RunConfig, data: Path, preferences: Path, policy: Path, out: Path, number: int
) -> Path:
    """SFT on the chosen responses, with the optimiser and adapter settings of DPO."""
    from srccore.config import RationaleTuningConfig
    from srccore.models.policy import read_policy, write_policy
    from srccore.training.rationale import RationaleExample, tune_rationale

    step = StageFolder(SFT, out, config=config.dpo, inputs={"preferences": preferences})
    if step.figures is None:
        opened = dataset.open_data(data)
        settings = config.dpo.model_dump(exclude={"beta", "sft_weight", "sft_normalization"})
        examples = [
            RationaleExample(
                question=opened.sample(record.sample_id).question,
                response=record.chosen.text,
                image=lambda name=record.sample_id: opened.image(name),
            )
            for record in read_records(preferences / "preferences.jsonl", Preference)
        ]
        start = read_policy(policy)
        tune_rationale(
            start,
            examples,
            RationaleTuningConfig(**settings, samples=len(examples)),
            out,
            seed=config.seed,
            machine=Machine(config.device),
        )
        write_policy(out, start.with_adapter(out / "adapter"))
        step.finish({"samples": len(examples)})
    return out / "policy.json"


def random_preferences(config: RunConfig, data: Path, policy: Path, out: Path, number: int) -> None:
    step = StageFolder(RANDOM, out, config=config.search, inputs={"policy": policy})
    if step.figures is not None:
        return
    opened = dataset.open_data(data)
    samples = sampling.draw(opened, config.search.samples, seed=config.seed, start=number - 1)
    raw = raw_samples(config, policy, opened, samples, f"{config.seed}/{number}")
    found = []
    for sample in samples:
        rng = random.Random(stable_hash(f"random {config.seed} {number} {sample.id}"))
        first, second = rng.sample(raw[sample.id], 2)
        if first.text != second.text:
            found.append(_preference(sample, first, second))
    write_records(out / "preferences.jsonl", Preference, found)
    step.finish({"preferences": len(found)})


def answer_preferences(
    config: RunConfig, data: Path, candidates: Path, out: Path, number: int
) -> None:
    step = StageFolder(ANSWER, out, inputs={"candidates": candidates})
    if step.figures is not None:
        return
    samples = {sample.id: sample for sample in dataset.open_data(data)}
    found = []
    for record in read_records(candidates / "candidates.jsonl", CandidateSet):
        sample = samples[record.sample_id]
        right, wrong = [], []
        for candidate in record.candidates:
            is_right = gives_answer(candidate.text, sample.answer)
            (right if is_right else wrong).append(candidate)
        if right and wrong:
            rng = random.Random(stable_hash(f"answer {config.seed} {number} {sample.id}"))
            found.append(_preference(sample, rng.choice(right), rng.choice(wrong)))
    write_records(out / "preferences.jsonl", Preference, found)
    step.finish({"preferences": len(found)})


def _preference(sample: Sample, chosen: Candidate, rejected: Candidate) -> Preference:
    return Preference(
        sample_id=sample.id, chosen=chosen, rejected=rejected, margin=0.0, confidence=0.0
    )


def raw_samples(
    config: RunConfig,
    policy: Path,
    opened: dataset.DataSet,
    samples: list[Sample],
    key: str,
    count: int = 6,
) -> dict[str, list[Candidate]]:
    """Complete responses as sampled, including duplicates and those that do not parse."""
    engine = sampling_engine(policy, config.device)

    def responses(root: Node, sample: Sample) -> Steps[tuple[str, list[Candidate]]]:
        drawn = yield [
            Draw(
                root,
                config.evaluation.max_tokens,
                stable_hash(f"raw/{key}/{sample.id}/{number}"),
                config.search.temperature,
                whole=True,
            )
            for number in range(count)
        ]
        return sample.id, [
            Candidate(
                id=candidate_id(sample.id, each.text.strip()),
                text=each.text.strip(),
                log_probability=each.log_probability,
                token_count=each.token_count,
            )
            for each in drawn
        ]

    batches = prompt_batches(
        samples, opened, policy, config.search.engine, config.search.batch_tokens
    )
    searches = (
        [
            Search(
                prompt(opened, sample),
                partial(responses, sample=sample),
            )
            for sample in batch
        ]
        for batch in batches
    )
    return dict(pair for found in drive(engine, searches) for pair in found)


def headroom(config: RunConfig, folder: Path) -> dict:
    """Aligned pass@6 of the stage-1 policy, by category."""
    source = RunFolder(folder / "src")
    step = StageFolder(
        "headroom",
        folder / "headroom",
        config=config.search,
        inputs={"policy": source.output("tune-rationale")},
    )
    if step.figures is not None:
        return step.figures
    opened = dataset.open_data(source.split("heldout"))
    policy = source.trained_policy(0)
    samples = list(opened)
    raw = raw_samples(config, policy, opened, samples, f"headroom/{config.seed}")
    reached: dict[str, list[bool]] = {}
    for sample in samples:
        outcomes = [
            evaluation.judge_responses(
                [sample],
                {
                    sample.id: Response(
                        sample_id=sample.id,
                        text=candidate.text,
                        token_count=candidate.token_count,
                        finished=True,
                    )
                },
            )[0]
            for candidate in raw[sample.id]
        ]
        is_reached = any(o.answer_right and o.rationale_right for o in outcomes)
        for key in ("all", sample.category.value):
            reached.setdefault(key, []).append(is_reached)
    return step.finish({key: statistics.mean(values) for key, values in reached.items()})


def table(rows: list[dict]) -> str:
    lines = [
        "| seed | arm | aligned: stage 1, rounds 1.. | accuracy | spurious | format | tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        first, last = row["rounds"][0], row["rounds"][-1]
        aligned = " → ".join(f"{100 * each['aligned_accuracy']:.1f}" for each in row["rounds"])
        pairs = [
            f"{_percent(first[name])} → {_percent(last[name])}"
            for name in ("accuracy", "spurious_correctness", "format_rate")
        ]
        tokens = f"{first['mean_tokens']:.1f} → {last['mean_tokens']:.1f}"
        lines.append(
            f"| {row['seed']} | {row['arm']} | {aligned} | {' | '.join(pairs)} | {tokens} |"
        )
    lines += ["", "Mean of the seeds, aligned accuracy after the last round:", ""]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        finals = [r["rounds"][-1]["aligned_accuracy"] for r in rows if r["arm"] == arm]
        lines.append(f"* {arm}: {100 * statistics.mean(finals):.1f}")
    lines += ["", "By category (aligned, stage 1 → last round; pass@6 of stage 1):", ""]
    for row in rows:
        if row["arm"] != "src":
            continue
        first, last = row["rounds"][0]["by_category"], row["rounds"][-1]["by_category"]
        parts = [
            f"{name} {_percent(first[name]['aligned_accuracy'])} → "
            f"{_percent(last[name]['aligned_accuracy'])} (pass@6 {_percent(row['headroom'][name])})"
            for name in first
        ]
        change = row["change"]["aligned_accuracy"]
        low, high = change["interval"]
        lines.append(
            f"* seed {row['seed']}: {'; '.join(parts)}; all {100 * change['difference']:+.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}], pass@6 {_percent(row['headroom']['all'])}"
        )
    return "\n".join(lines)


def comparison(out: Path, seeds: list[int], arms: list[str], last: int) -> str:
    """SRC minus each control after the last round: mean over seeds, bootstrap over samples."""
    lines = ["", "SRC minus a control, aligned accuracy after the last round, pooled:", ""]
    generator = np.random.default_rng(0)
    for arm in arms:
        differences = np.mean(
            [aligned(out, seed, "src", last) - aligned(out, seed, arm, last) for seed in seeds],
            axis=0,
        )
        drawn = generator.integers(0, len(differences), (4000, len(differences)))
        low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
        mean = 100 * differences.mean()
        lines.append(f"* {arm}: {mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    return "\n".join(lines)


def aligned(out: Path, seed: int, arm: str, number: int) -> np.ndarray:
    """For each held-out sample, 1.0 if an arm's answer and rationale are right after a round."""
    folder = out / f"seed-{seed}"
    samples = list(dataset.open_data(RunFolder(folder / "src").split("heldout")))
    outcomes = read_outcomes(samples, RunFolder(folder / arm).output("evaluate", number))
    return np.array([float(o.answer_right and bool(o.rationale_right)) for o in outcomes])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
