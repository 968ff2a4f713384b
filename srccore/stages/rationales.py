"""Stages augment-rationales and tune-rationale, and the rationales that other stages read."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from srccore import storage
from srccore.config import AugmentationConfig, ModelConfig, RationaleTuningConfig
from srccore.data import dataset, sampling
from srccore.data.records import Rationale, Sample, Unusable, read_records, write_records
from srccore.errors import UserError
from srccore.files import write_json
from srccore.method import response
from srccore.stages import inputs as identify
from srccore.stages.batches import by_length
from srccore.stages.checks import check_facts
from srccore.stages.folder import StageFolder
from srccore.stages.journal import Journal
from srccore.stages.splits import open_split
from srccore.training.machine import Figures, Machine
from srccore.training.ranks import is_first

__all__ = [
    "augment_rationales",
    "judged_samples",
    "rationale_texts",
    "trained_on",
    "tune_rationale",
]

RATIONALES = "rationales.jsonl"
TRAINED_ON = "samples.json"
"""In the folder of stage 1's adapter: the ids of the samples that it was trained on."""


def augment_rationales(
    config: AugmentationConfig, *, data: Path, out: Path, machine: Machine = Machine()
) -> Figures:
    """Gives a reference rationale to every sample that has none.

    Args:
        config: The teacher.
        data: The train or the calibration split.
        out: Where ``rationales.jsonl`` is written.
        machine: How the work is done; progress counts samples asked.

    Returns:
        How many rationales were there, were made, and failed, by reason.
    """
    from srccore.models.teacher import RationaleRequest, make_teacher

    folder = StageFolder("augment-rationales", out, config=config, inputs={"data": data})
    if folder.figures is not None:
        return folder.figures
    opened = open_split(data)
    samples = list(opened)
    check_facts("augment-rationales", config, samples, data)
    given = [
        Rationale(sample_id=sample.id, rationale=sample.rationale)
        for sample in samples
        if sample.rationale
    ]
    wanting = [sample for sample in samples if not sample.rationale]
    faults: list[str] = []
    kept: Journal[Rationale | Unusable] = folder.journal(machine, Rationale, Unusable)
    with kept as journal:
        known = {record.sample_id for record in journal.records()}
        asked = [
            RationaleRequest(sample, functools.partial(opened.image, sample.id))
            for sample in wanting
            if sample.id not in known
        ]
        answers = make_teacher(config.teacher, config.endpoint).rationales(asked) if asked else ()
        for done, answer in enumerate(answers, start=1):
            name = asked[answer.position].sample.id
            if answer.found:
                journal.append(Rationale(sample_id=name, rationale=answer.found))
            elif answer.is_unusable:
                journal.append(Unusable(sample_id=name, problem=str(answer.problem)))
            else:
                faults.append(str(answer.problem))
            machine.progress(done, len(asked))
        records = sorted(journal.records(), key=lambda record: record.sample_id)
    made = [record for record in records if isinstance(record, Rationale)]
    problems = Counter(
        [*faults, *(record.problem for record in records if isinstance(record, Unusable))]
    )
    write_records(out / RATIONALES, Rationale, [*given, *made])
    machine.progress(len(samples), len(samples))
    return folder.finish({"given": len(given), "made": len(made), "problems": problems})


def tune_rationale(
    config: RationaleTuningConfig,
    *,
    model: ModelConfig,
    data: Path,
    out: Path,
    seed: int,
    rationales: Path | None = None,
    machine: Machine = Machine(),
) -> Figures:
    """Stage 1: teaches the model to write a rationale before the answer (paper: LoRA SFT).

    Args:
        config: The training's settings.
        model: The base model.
        data: The train split.
        out: Where ``policy.json`` and the adapter are written.
        seed: The run's seed.
        rationales: The folder of `augment_rationales` on that split; without it, samples that
            have no rationale of their own are left out.
        machine: How the work is done; progress counts optimiser steps.

    Returns:
        Steps, losses, how many samples were used, how much of the adapter is left after folding,
        and the share of responses that have the format of a response afterwards.

    Raises:
        UserError: No sample has a rationale, most of the adapter is lost in folding, or too few
            responses have the format.
    """
    from srccore.models.policy import Policy, pinned, write_policy
    from srccore.models.transformers import TransformersSamplingEngine
    from srccore.stages import format_check
    from srccore.stages.evaluation import answer_all
    from srccore.stages.trained import check_kept, figures_and_work, load_trained
    from srccore.training.rationale import RationaleExample
    from srccore.training.rationale import tune_rationale as train

    folder = StageFolder(
        "tune-rationale",
        out,
        config=config,
        inputs={"data": data, "rationales": rationales},
        sources={"model": identify.checkpoint(model.path)},
        settings={"seed": seed, "model": model.model_dump(mode="json")},
    )
    if folder.figures is not None:
        return folder.figures
    opened = open_split(data)
    samples = list(opened)
    texts = rationale_texts(samples, rationales)
    usable = [sample for sample in samples if sample.id in texts]
    if not usable:
        raise UserError(
            f"No sample of {data} has a rationale.",
            "Run augment-rationales; if it has run, see the problems in its manifest.json.",
        )
    drawn = sampling.draw(usable, min(config.samples, len(usable)), seed=seed)
    examples = [
        RationaleExample(
            question=sample.question,
            response=response.write(texts[sample.id], sample.answer),
            image=functools.partial(opened.image, sample.id),
            size=opened.size(sample.id),
        )
        for sample in drawn
    ]
    start = Policy(base=pinned(model))
    outcome = train(start, examples, config, out, seed=seed, machine=machine)
    figures, work = figures_and_work(outcome)
    if not is_first():
        return figures
    adapter = out / "adapter"
    write_json(adapter / TRAINED_ON, sorted(sample.id for sample in drawn))
    policy = start.with_adapter(adapter)
    loaded = load_trained(policy, machine)
    kept = loaded.folding.newest
    check_kept(kept, adapter=adapter, dtype=model.dtype, section="rationale")
    engine = TransformersSamplingEngine(loaded.model, loaded.processor)
    ids = {sample.id for sample in drawn}
    unseen = [sample for sample in samples if sample.id not in ids] or drawn
    asked = sampling.draw(unseen, min(format_check.FORMAT_SAMPLES, len(unseen)), seed=seed)
    batches = by_length(asked, opened, loaded.processor, format_check.BATCH_TOKENS)
    answered = answer_all(engine, opened, batches, format_check.MAX_TOKENS)
    responses = [response for found in answered for response in found]
    format_check.check_format(responses, config.min_format_rate, out)
    write_policy(out, policy)
    return folder.finish(
        {
            **figures,
            "revision": start.base.revision,
            "folding": dataclasses.asdict(kept),
            "format_rate": format_check.format_rate(responses),
        },
        work,
        gpus=outcome.gpus,
    )


def trained_on(policy: Path) -> set[str]:
    """Returns the ids of the samples that stage 1 trained a policy on.

    They are in the folder of its adapter, so they are known wherever the adapter is used. Empty for
    a policy that `tune_rationale` has not trained.

    Args:
        policy: A ``policy.json`` or its folder.
    """
    from srccore.models.policy import read_policy

    known: set[str] = set()
    for adapter in read_policy(policy).adapters:
        uri = storage.join(adapter, TRAINED_ON)
        if storage.exists(uri):
            known.update(json.loads(storage.read_text(uri)))
    return known


def judged_samples(data: Path, rationales: Path | None, ids: Sequence[str]) -> dict[str, Sample]:
    """Samples by id; one without a rationale of its own gets the teacher's.

    Raises:
        UserError: The data set has no sample of one of the ids.
    """
    samples = dataset.read_samples(data, ids)
    texts = rationale_texts(samples, rationales)
    return {s.id: s.model_copy(update={"rationale": texts.get(s.id)}) for s in samples}


def rationale_texts(samples: Sequence[Sample], rationales: Path | None) -> dict[str, str]:
    """Rationales by sample id: the sample's own, else the one given for it.

    They are given by the folder of `augment_rationales`, or by a data set of the same ids.
    """
    own = {sample.id: sample.rationale for sample in samples if sample.rationale}
    if rationales is None:
        return own
    if (rationales / RATIONALES).is_file():
        made = read_records(rationales / RATIONALES, Rationale)
        return {record.sample_id: record.rationale for record in made} | own
    given = dataset.read_samples(rationales)
    return {sample.id: sample.rationale for sample in given if sample.rationale} | own
