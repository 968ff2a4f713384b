"""Which samples a stage gets: the draw in the paper's mixture, splits and shards.

All three decide by hashes of the samples' ids: the order of the samples does not matter, and
adding samples to a data set does not move others to another split or shard.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from srccore.data.records import Category, Sample
from srccore.errors import UserError
from srccore.hashing import hash_text, stable_hash

__all__ = ["MIXTURE", "draw", "shard", "split"]

MIXTURE = {Category.PERCEPTION: 2, Category.CHART: 1, Category.MATH: 1}
"""Parts of each category in a draw (paper)."""


def draw(samples: Iterable[Sample], count: int, *, seed: int, start: int = 0) -> list[Sample]:
    """Draws the paper's mixture: perception, chart and math as 2:1:1.

    Each category is sorted by a hash of seed and id, and draw number ``start`` takes the next
    slice of it: draws 0, 1, 2 share no sample until the category is used up, then it starts over.
    The order of ``samples`` does not matter. If a category has fewer samples than its share, all
    of them are drawn and the other categories fill the gap in proportion to their parts.

    Args:
        samples: What to draw from; ids must be distinct.
        count: How many to draw. If there are fewer, all are drawn: none appears twice in a draw.
        seed: Seeds the order.
        start: Number of the draw, from 0: the round.

    Returns:
        The drawn samples in the order of the hash, with categories interleaved.

    Raises:
        UserError: There are no samples, or ``count`` or ``start`` is out of range.
    """
    if count < 1 or start < 0:
        raise UserError(
            f"Cannot take draw number {start} of {count} samples.",
            "Draw at least one sample, and number the draws from 0.",
        )

    def order(sample: Sample) -> str:
        return hash_text(f"{seed}/{sample.id}")

    ordered = sorted(samples, key=order)
    if not ordered:
        raise UserError("There are no samples to draw from.", "Pass a data set with samples.")
    drawn: list[Sample] = []
    pools = {name: [s for s in ordered if s.category is name] for name in Category}
    sizes = {name: len(pool) for name, pool in pools.items()}
    for name, quota in _quotas(sizes, count).items():
        pool = pools[name]
        drawn += [pool[(start * quota + i) % len(pool)] for i in range(quota)]
    return sorted(drawn, key=order)


def split(
    samples: Iterable[Sample], shares: Mapping[str, float], seed: int
) -> dict[str, list[Sample]]:
    """Splits samples by a hash of seed and id: adding samples never moves others.

    Args:
        samples: What to split.
        shares: The share of each split by name, relative to their sum. Their order matters.
        seed: Seeds the hash.

    Returns:
        The splits by name: disjoint and together complete, each in the order of ``samples``.
        Their sizes are close to the shares, not equal to them.

    Raises:
        UserError: The shares are not numbers of at least 0 with a sum above 0.
    """
    total = sum(shares.values())
    if any(share < 0 for share in shares.values()) or not (math.isfinite(total) and total > 0):
        raise UserError(
            f"Cannot split samples by the shares {dict(shares)}.",
            "Give each split a share of 0 or more, and at least one a share above 0.",
        )
    names = list(shares)
    bounds = [bound / total for bound in itertools.accumulate(shares.values())][:-1]
    parts: dict[str, list[Sample]] = {name: [] for name in names}
    for sample in samples:
        # 53 bits: the quotient is exact, so it never rounds up to 1.
        place = (stable_hash(f"split/{seed}/{sample.id}") >> 11) / 2**53
        parts[names[bisect.bisect_right(bounds, place)]].append(sample)
    return parts


def shard(samples: Iterable[Sample], index: int, count: int) -> list[Sample]:
    """Takes one of ``count`` shards by a hash of the id: adding samples never moves others.

    Args:
        samples: What to shard.
        index: Which shard, from 0.
        count: How many shards there are.

    Returns:
        The shard's samples in the order of ``samples``; it may be empty. The shards are disjoint
        and together complete.

    Raises:
        UserError: There is no shard ``index`` of ``count``.
    """
    if not 0 <= index < count:
        raise UserError(
            f"There is no shard {index} of {count}.",
            "Shards are numbered from 0, and there must be at least one.",
        )
    return [sample for sample in samples if stable_hash(f"shard/{sample.id}") % count == index]


def _quotas(sizes: Mapping[Category, int], count: int) -> dict[Category, int]:
    """Returns the samples per category, the same in every draw so that slices do not overlap."""
    quotas: dict[Category, int] = {}
    left = [name for name in MIXTURE if sizes[name]]
    while left:
        shares = _largest_remainder(count - sum(quotas.values()), left)
        short = [name for name in left if shares[name] > sizes[name]]
        if not short:
            return quotas | shares
        quotas |= {name: sizes[name] for name in short}
        left = [name for name in left if name not in short]
    return quotas


def _largest_remainder(count: int, names: Sequence[Category]) -> dict[Category, int]:
    parts = sum(MIXTURE[name] for name in names)
    shares = {name: count * MIXTURE[name] // parts for name in names}
    by_remainder = sorted(names, key=lambda name: -(count * MIXTURE[name] % parts))
    for name in by_remainder[: count - sum(shares.values())]:
        shares[name] += 1
    return shares
