"""Stage evaluate: a policy's figures on a split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from srccore.config import EvaluationConfig
from srccore.data.dataset import DataSet
from srccore.data.records import (
    Judgement,
    Response,
    Sample,
    Unusable,
    read_records,
    write_records,
)
from srccore.files import write_json
from srccore.method import evaluation
from srccore.method.driver import Search, drive
from srccore.method.engine import SamplingEngine, Work
from srccore.models.engines import sampling_engine
from srccore.stages.batches import prompt_batches, unfinished
from srccore.stages.folder import StageFolder
from srccore.stages.journal import Journal
from srccore.stages.splits import open_split, prompt
from srccore.stages.workers import divide, gpus_of
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
    opened = open_split(data)
    samples = list(opened)
    batches = prompt_batches(samples, opened, policy, config.engine, config.batch_tokens)
    work = None
    kept: Journal[Response | Judgement | Unusable] = folder.journal(
        machine, Response, Judgement, Unusable
    )
    with kept as journal:
        records = journal.records()
        responses = {each.sample_id: each for each in records if isinstance(each, Response)}
        if todo := unfinished(batches, lambda sample: sample.id in responses):
            work = Work()
            job = partial(_answered, opened, policy, machine.device, config)
            for found in divide(job, todo, machine.workers, work):
                journal.append(*found)
                responses |= {response.sample_id: response for response in found}
                machine.progress(len(responses), len(samples), work.decoded_tokens)
        judgements = {each.sample_id: each for each in records if isinstance(each, Judgement)}
        if config.judge == "endpoint":
            known = {each.sample_id for each in records if not isinstance(each, Response)}
            unjudged = [s for s in samples if not s.facts and s.id not in known]
            for judged in _judge(config, opened, unjudged, responses, machine.progress):
                journal.append(judged)
                if isinstance(judged, Judgement):
                    judgements[judged.sample_id] = judged
    write_records(out / "responses.jsonl", Response, [responses[sample.id] for sample in samples])
    write_records(
        out / "judgements.jsonl", Judgement, [judgements[name] for name in sorted(judgements)]
    )
    outcomes = read_outcomes(samples, out)
    before = read_outcomes(samples, previous) if previous is not None else None
    figures = evaluation.figures(
        outcomes, round=round_number, previous=before, resamples=config.resamples, seed=seed
    ).model_dump(mode="json")
    write_json(out / "figures.json", figures)
    return folder.finish(
        figures,
        work,
        gpus=gpus_of(machine, config.engine),
        elsewhere=machine.leaves_gpu_to_others(config.engine),
    )


def _answered(
    data: DataSet,
    policy: Path,
    device: str,
    config: EvaluationConfig,
    batches: Sequence[Sequence[Sample]],
    work: Work,
) -> Iterator[list[Response]]:
    """Answers samples, as a job of one process."""
    engine = sampling_engine(policy, device, config.engine)
    with closing(engine):
        for found in answer_all(engine, data, batches, config.max_tokens):
            work.add(engine.work.take())
            yield found


def answer_all(
    engine: SamplingEngine,
    data: DataSet,
    batches: Iterable[Sequence[Sample]],
    max_tokens: int,
) -> Iterator[list[Response]]:
    """Answers samples greedily.

    Args:
        engine: Writes the policy's responses.
        data: The data set that has the images.
        batches: What to answer, in batches that the engine computes together.
        max_tokens: The maximum number of tokens in one response.

    Yields:
        Responses that became known together.
    """
    return drive(
        engine,
        (
            [
                Search(
                    prompt(data, sample),
                    partial(evaluation.answer, sample_id=sample.id, max_tokens=max_tokens),
                )
                for sample in batch
            ]
            for batch in batches
        ),
    )


def _judge(
    config: EvaluationConfig,
    data: DataSet,
    samples: Sequence[Sample],
    responses: Mapping[str, Response],
    progress: Progress,
) -> Iterator[Judgement | Unusable]:
    """Asks about every response that has a rationale; what fails stays unjudged."""
    from srccore.models.teacher import EndpointTeacher, JudgeRequest

    if not samples:
        return
    asked = []
    for sample in samples:
        parsed = evaluation.parse_finished(responses[sample.id])
        if parsed is not None and parsed.rationale:
            image = partial(data.image, sample.id)
            asked.append(JudgeRequest(sample, parsed, image))
        else:
            # Where there is no rationale there is nothing to ask: it is wrong.
            yield Judgement(sample_id=sample.id, rationale_right=False, derived_answer="")
    found = EndpointTeacher(config.endpoint).judgements(asked) if asked else ()
    for done, answer in enumerate(found, start=1):
        if answer.found is not None:
            yield answer.found
        elif answer.is_unusable:
            name = asked[answer.position].sample.id
            yield Unusable(sample_id=name, problem=str(answer.problem))
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
