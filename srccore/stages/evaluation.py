"""Stage evaluate: a policy's figures on a split."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from srccore.config import EvaluationConfig
from srccore.data import dataset
from srccore.data.records import Judgement, Response, Sample, read_records, write_records
from srccore.files import write_json
from srccore.method import evaluation
from srccore.method.engine import Prompt, SamplingEngine
from srccore.models.engines import sampling_engine
from srccore.stages.folder import StageFolder
from srccore.stages.journal import Journal
from srccore.training.machine import Figures, Machine, Progress

__all__ = ["answer_all", "evaluate", "read_outcomes"]


def evaluate(
    config: EvaluationConfig,
    *,
    data: Path,
    policy: Path,
    out: Path,
    seed: int,
    round_number: int,
    previous: Path | None = None,
    machine: Machine = Machine(),
) -> Figures:
    """Answers every sample of a split greedily and judges rationale and answer.

    Args:
        config: The evaluation's settings.
        data: The held-out split.
        policy: A ``policy.json``.
        out: Where ``responses.jsonl``, ``judgements.jsonl`` and ``figures.json`` are written.
        seed: Of the bootstrap.
        round_number: 0 after stage 1, then the rounds.
        previous: The evaluation of the policy before, on the same split.
        machine: How the work is done; progress counts samples answered.

    Returns:
        The figures of `srccore.method.evaluation.Figures`.
    """
    folder = StageFolder(
        "evaluate",
        out,
        config=config,
        inputs={"data": data, "previous": previous, "policy": policy},
        settings={"seed": seed, "round": round_number},
    )
    if folder.figures is not None:
        return folder.figures
    opened = dataset.open_data(data)
    engine = sampling_engine(policy, machine.device)
    order = sorted(opened.samples, key=lambda sample: (len(sample.question), sample.id))
    responses = answer_all(
        engine, opened, order, config.batch_size, config.max_tokens, machine.progress
    )
    write_records(
        out / "responses.jsonl", Response, [responses[sample.id] for sample in opened.samples]
    )
    journal = Journal(out, Judgement)
    if config.judge == "endpoint":
        _ask_judge(config, opened, responses, journal, machine.progress)
    judgements = sorted(journal.records(), key=lambda record: record.sample_id)
    write_records(out / "judgements.jsonl", Judgement, judgements)
    outcomes = read_outcomes(opened.samples, out)
    before = read_outcomes(opened.samples, previous) if previous is not None else None
    figures = evaluation.figures(
        outcomes, round=round_number, previous=before, resamples=config.resamples, seed=seed
    ).model_dump(mode="json")
    write_json(out / "figures.json", figures)
    return folder.finish(figures)


def answer_all(
    engine: SamplingEngine,
    opened: dataset.DataSet,
    samples: Sequence[Sample],
    batch_size: int,
    max_tokens: int,
    progress: Progress = Machine().progress,
) -> dict[str, Response]:
    """Answers samples greedily, batch by batch.

    Args:
        engine: Writes the policy's responses.
        opened: The data set that has the images.
        samples: What to answer, in the order of the batches.
        batch_size: Samples that are answered together.
        max_tokens: The maximum number of tokens in one response.
        progress: Receives how many samples are answered.

    Returns:
        The responses by sample id, in the order of the samples.
    """
    responses: dict[str, Response] = {}
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        prompts = [(each.id, Prompt(opened.image(each.id), each.question)) for each in batch]
        responses |= evaluation.answer(engine, prompts, max_tokens)
        progress(start + len(batch), len(samples))
    return responses


def _ask_judge(
    config: EvaluationConfig,
    opened: dataset.DataSet,
    responses: dict[str, Response],
    journal: Journal[Judgement],
    progress: Progress,
) -> None:
    """Asks of every response whose sample has no facts; what fails stays unjudged."""
    from srccore.models.teacher import EndpointTeacher, JudgeRequest

    known = {record.sample_id for record in journal.records()}
    asked = []
    for sample in opened.samples:
        if sample.facts or sample.id in known:
            continue
        parsed = evaluation.parse_finished(responses[sample.id])
        if parsed is not None and parsed.rationale:
            image = functools.partial(opened.image, sample.id)
            asked.append(JudgeRequest(sample, parsed, image))
        else:
            # Where there is no rationale there is nothing to ask: it is wrong.
            journal.append(Judgement(sample_id=sample.id, rationale_right=False, derived_answer=""))
    found = EndpointTeacher(config.endpoint).judgements(asked) if asked else ()
    for done, (_, judgement, _) in enumerate(found, start=1):
        if judgement is not None:
            journal.append(judgement)
        progress(done, len(asked))


def read_outcomes(samples: Sequence[Sample], folder: Path) -> list[evaluation.Outcome]:
    """Judges the responses in a folder of `evaluate`.

    Args:
        samples: The split that was evaluated.
        folder: The folder.

    Returns:
        One outcome per sample, in their order.

    Raises:
        UserError: The folder's responses are to other samples.
    """
    responses = read_records(folder / "responses.jsonl", Response)
    judgements = read_records(folder / "judgements.jsonl", Judgement)
    return evaluation.judge_responses(
        samples,
        {record.sample_id: record for record in responses},
        {record.sample_id: record for record in judgements},
    )
