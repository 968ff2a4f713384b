"""The processes that train together: how many there can be, and what is an error of another."""

from __future__ import annotations

import pytest

from srccore.config import ScorerConfig
from srccore.training.ranks import is_lost_peer, most_processes


@pytest.mark.parametrize(
    ("samples", "passes", "limit", "most"),
    [
        (8, 2, 16, 16),
        (8, 2, 8, 8),
        # 7 and 5 divide neither; 6 leaves 3 after the passes, which does not divide 8.
        (8, 2, 7, 4),
        (8, 1, 3, 2),
        (3, 1, 2, 1),
        (1, 1, 8, 1),
    ],
)
def test_as_many_processes_as_share_a_batch_evenly(
    samples: int, passes: int, limit: int, most: int
) -> None:
    config = ScorerConfig(learning_rate=1, batch_size=samples, gradient_accumulation_steps=passes)
    assert most_processes(config, limit) == most


def test_what_a_process_raises_by_itself_is_no_lost_peer() -> None:
    assert not is_lost_peer(ValueError("Connection closed by peer"))
    assert not is_lost_peer(RuntimeError("CUDA out of memory"))
