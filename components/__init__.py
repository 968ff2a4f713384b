"""Kubeflow Pipelines components, one per stage of SRC.

Importing them needs kfp, and no model library. Each also lies beside its code as
``component.yaml``, to be loaded by path or URL.
"""

from srccore_components.annotate_ratings.component import annotate_ratings
from srccore_components.augment_rationales.component import augment_rationales
from srccore_components.curate_preference.component import curate_preference
from srccore_components.evaluate.component import evaluate
from srccore_components.import_output.component import import_output
from srccore_components.prepare_data.component import prepare_data
from srccore_components.report.component import report
from srccore_components.sample_responses.component import sample_responses
from srccore_components.score_candidates.component import score_candidates
from srccore_components.search_candidates.component import search_candidates
from srccore_components.train_dpo.component import train_dpo
from srccore_components.train_scorer.component import train_scorer
from srccore_components.tune_rationale.component import tune_rationale

__all__ = [
    "annotate_ratings",
    "augment_rationales",
    "curate_preference",
    "evaluate",
    "import_output",
    "prepare_data",
    "report",
    "sample_responses",
    "score_candidates",
    "search_candidates",
    "train_dpo",
    "train_scorer",
    "tune_rationale",
]
