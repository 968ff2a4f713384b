"""Kubeflow Pipelines components, one per stage of SRC.

Importing them requires kfp, but no model library. Each is also available as a ``component.yaml``
next to its code, which can be loaded by path or URL.
"""

from srccore.components.annotate_ratings.component import annotate_ratings
from srccore.components.augment_rationales.component import augment_rationales
from srccore.components.curate_preference.component import curate_preference
from srccore.components.evaluate.component import evaluate
from srccore.components.import_output.component import import_output
from srccore.components.prepare_data.component import prepare_data
from srccore.components.report.component import report
from srccore.components.sample_responses.component import sample_responses
from srccore.components.score_candidates.component import score_candidates
from srccore.components.search_candidates.component import search_candidates
from srccore.components.train_dpo.component import train_dpo
from srccore.components.train_scorer.component import train_scorer
from srccore.components.tune_rationale.component import tune_rationale

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
