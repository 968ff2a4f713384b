"""Exports a round's policy in Hugging Face layout, with a model card."""

from __future__ import annotations

from pathlib import Path

import yaml

from srccore.config import RunConfig
from srccore.errors import UserError
from srccore.files import writable
from srccore.run.folder import RunFolder
from srccore.run.loop import load_run
from srccore.stages.manifest import read_manifest

__all__ = ["export_policy"]

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
base_model: {base}
tags: [self-rationale-calibration, dpo]
---

# {name}, round {round}

{what} of `{base}`, calibrated with {rounds} of Self-Rationale Calibration (arXiv 2509.13919) by
srccore {version}. The model writes a rationale before its answer; the last line is `Answer: ...`.

## Metrics on the held-out split

{figures}

## Data

{data}

## Hashes

{hashes}

## Configuration

```yaml
{config}```
"""
EMBEDDED_DATA = (
    "The data set embedded in srccore (emoji art, gapminder, handwritten digits; see its NOTICE). "
    "The base model's flaws are built in: the gain shows that the machinery works, not what a real "
    "model would gain."
)


def export_policy(run: Path, number: int, out: Path, *, adapter: bool = False) -> None:
    """Exports the policy that a round ended with.

    Args:
        run: The run folder.
        number: The round; 0 is stage 1.
        out: The folder to write; must be missing or empty.
        adapter: Write one LoRA adapter instead of a merged checkpoint.

    Raises:
        UserError: The run has not finished the round, or ``out`` is not empty.
    """
    from srccore.models.policy import read_policy
    from srccore.training.checkpoints import export_adapter, export_merged

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty.", "Choose another --out.")
    config = load_run(run)
    path = RunFolder(run).policy(number)
    with writable(out):
        out.mkdir(parents=True, exist_ok=True)
    export = export_adapter if adapter else export_merged
    export(read_policy(path), out, _card(run, config, number, path, adapter=adapter))


def _card(run: Path, config: RunConfig, number: int, policy: Path, *, adapter: bool) -> str:
    manifest = read_manifest(policy.parent)
    evaluation = read_manifest(RunFolder(run).output("evaluate", number)).figures
    rows = ["| metric | value | 95% interval |", "| --- | --- | --- |"]
    for name, interval in evaluation["interval"].items():
        if evaluation.get(name) is not None and interval:
            low, high = interval
            rows.append(
                f"| {name.replace('_', ' ')} | {evaluation[name]:.3f} | {low:.3f} to {high:.3f} |"
            )
    is_embedded = config.data.source == "embedded"
    return CARD.format(
        name=config.name,
        round=number,
        rounds=f"{number} round{'' if number == 1 else 's'}",
        base=config.model.path,
        what="A LoRA adapter" if adapter else "A merged checkpoint",
        version=manifest.versions["srccore"],
        figures="\n".join([*rows, f"\n{evaluation['n']} samples, greedy decoding."]),
        data=EMBEDDED_DATA if is_embedded else f"`{config.data.source}`",
        hashes="\n".join(f"* {name}: `{value}`" for name, value in manifest.inputs.items()),
        config=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    )
