"""SRC as a pipeline: stage 1, R-Scorer, and the rounds in a Python loop.

`srccore.run.loop` connects the same stages for one machine. Evaluation runs beside the rounds, so
that no round waits for the metrics of the previous one.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl

from srccore.components.annotate_ratings.component import annotate_ratings
from srccore.components.augment_rationales.component import augment_rationales
from srccore.components.evaluate.component import evaluate
from srccore.components.import_output.component import import_output
from srccore.components.prepare_data.component import prepare_data
from srccore.components.report.component import report
from srccore.components.sample_responses.component import sample_responses
from srccore.components.train_scorer.component import train_scorer
from srccore.components.tune_rationale.component import tune_rationale
from srccore.pipelines.pods import Placement, Pods
from srccore.pipelines.src_round import make_round

__all__ = ["make_pipeline"]


def make_pipeline(pods: Pods, name: str, title: str, description: str) -> Callable[..., Any]:
    """Creates the pipeline of a profile.

    Args:
        pods: Configures the pods of its tasks.
        name: The pipeline's name, in lower case with dashes.
        title: The title of the run's report.
        description: The pipeline's description, one line.

    Returns:
        A graph component. The defaults of its parameters are set when it is compiled.
    """
    profile = pods.profile
    src_round = make_round(pods)

    @dsl.pipeline(name=name, description=description)
    def src_pipeline(
        artifact_root: str,
        data: dict,
        model: dict,
        rating_model: dict,
        augmentation: dict,
        rationale: dict,
        annotation: dict,
        scorer: dict,
        search: dict,
        scoring: dict,
        curation: dict,
        dpo: dict,
        evaluation: dict,
        node_selector: dict,
        tolerations: list,
        training_memory: str,
        training_gpus: str,
        seed: int = 0,
        device: str = "auto",
        threads: int = 0,
        data_version: str = "",
        labelled_pairs_uri: str = "",
        scorer_uri: str = "",
    ) -> None:
        placement = Placement(node_selector, tolerations, training_memory, training_gpus)
        root = {"artifact_root": artifact_root}

        def add(task: Any, stage: str, title: str = "") -> Any:
            if title:
                task.set_display_name(title)
            return pods.configure(task, stage, placement)

        def given(uri: Any, title: str) -> Any:
            # Kubeflow would cache by the URI, but the content there may have changed.
            task = import_output(uri=uri).set_caching_options(False)
            return add(task, "import-output", title).outputs["output"]

        def augmented(split: Any, title: str) -> Any:
            if not profile.augment:
                return split
            task = augment_rationales(data=split, config=augmentation, **root)
            return add(task, "augment-rationales", title).outputs["rationales"]

        def labelled_pairs(policy: Any) -> Any:
            if profile.scorer == "train-on-given-pairs":
                return given(labelled_pairs_uri, "given pairs")
            sampled = sample_responses(
                data=splits["train"],
                policy=policy,
                config=search,
                annotation=annotation,
                seed=seed,
                **root,
                **pods.compute("sample-responses", device, threads),
            )
            add(sampled, "sample-responses")
            rated = annotate_ratings(
                data=splits["train"],
                candidates=sampled.outputs["candidates"],
                config=annotation,
                seed=seed,
                rationales=train_rationales,
                **root,
            )
            return add(rated, "annotate-ratings").outputs["labelled_pairs"]

        def make_scorer(policy: Any) -> Any:
            if profile.scorer == "given":
                return given(scorer_uri, "given R-Scorer")
            task = train_scorer(
                data=splits["train"],
                labelled_pairs=labelled_pairs(policy),
                config=scorer,
                annotation=annotation,
                model=rating_model,
                seed=seed,
                rationales=train_rationales,
                **root,
                **pods.training("train-scorer", placement),
                **pods.compute("train-scorer", device, threads),
            )
            return add(task, "train-scorer").outputs["scorer"]

        def judge(policy: Any, number: int, previous: Any) -> Any:
            earlier = {"previous": previous} if previous else {}
            task = evaluate(
                data=splits["heldout"],
                policy=policy,
                config=evaluation,
                round_number=number,
                seed=seed,
                **earlier,
                **root,
                **pods.compute("evaluate", device, threads),
            )
            return add(task, "evaluate", f"evaluate round {number}").outputs["evaluation"]

        # Kubeflow would not look at the data behind the URI; the step does.
        prepared = prepare_data(config=data, version=data_version, **root)
        prepared.set_caching_options(False)
        splits = add(prepared, "prepare-data").outputs
        train_rationales = augmented(splits["train"], "augment train")
        tuned = tune_rationale(
            data=splits["train"],
            rationales=train_rationales,
            config=rationale,
            model=model,
            seed=seed,
            **root,
            **pods.training("tune-rationale", placement),
            **pods.compute("tune-rationale", device, threads),
        )
        policy = add(tuned, "tune-rationale").outputs["policy"]
        figures = judge(policy, 0, None)
        r_scorer = make_scorer(policy)
        round_rationales = augmented(splits["calibration"], "augment calibration")
        for number in range(1, profile.rounds + 1):
            done = src_round(
                data=splits["calibration"],
                rationales=round_rationales,
                policy=policy,
                r_scorer=r_scorer,
                round_number=number,
                search=search,
                scoring=scoring,
                curation=curation,
                dpo=dpo,
                seed=seed,
                node_selector=node_selector,
                tolerations=tolerations,
                training_memory=training_memory,
                training_gpus=training_gpus,
                device=device,
                threads=threads,
                **root,
            ).set_display_name(f"round {number}")
            policy = done.output
            figures = judge(policy, number, figures)
        written = report(
            last_evaluation=figures,
            name=title,
            seed=seed,
            shards=profile.shards,
            data=data,
            model=model,
            rating_model=rating_model,
            augmentation=augmentation,
            rationale=rationale,
            annotation=annotation,
            scorer=scorer,
            search=search,
            scoring=scoring,
            curation=curation,
            dpo=dpo,
            evaluation=evaluation,
            **root,
        )
        add(written, "report")

    return src_pipeline
