"""The stage count-samples: what it takes to add one, file by file.

`CHANGES` has, for each file, what is inserted and before which text. A new file has one insertion,
before nothing.
"""

from __future__ import annotations

CONFIG = """\
class CountingConfig(Section):
    \"\"\"`count-samples`: how many samples a split has.\"\"\"

    at_most: int = Field(default=100, ge=1)


"""
FUNCTION = """\
from pathlib import Path

from srccore.config import CountingConfig
from srccore.data import dataset
from srccore.files import write_json
from srccore.stages.folder import StageFolder
from srccore.training.machine import Figures, Machine


def count_samples(
    config: CountingConfig, *, data: Path, out: Path, machine: Machine = Machine()
) -> Figures:
    folder = StageFolder("count-samples", out, config=config, inputs={"data": data})
    if folder.figures is not None:
        return folder.figures
    count = min(config.at_most, len(dataset.open_data(data)))
    write_json(out / "counts.json", count)
    machine.progress(count, count)
    return folder.finish({"samples": count})
"""
TABLE = """\
    Stage(
        "count-samples",
        "Count the samples of a split.",
        base="light",
        module="counting",
        sections={"config": "counting"},
        inputs=(_data("train"),),
        outputs=("counts",),
    ),
"""
COMPONENT = """\
from kfp.dsl import Dataset, Input, Output

from srccore.components.interface import stage_component


@stage_component("count-samples")
def count_samples(
    data: Input[Dataset], artifact_root: str, config: dict, counts: Output[Dataset]
):
    \"\"\"Counts the samples of a split.

    Args:
        data: The split.
        artifact_root: The folder or ``s3://...`` under which outputs are written.
        config: The ``counting`` section of a preset.
        counts: Output. The number of samples.
    \"\"\"
    from srccore.steps.step import run_stage

    done = run_stage(
        "count-samples", artifact_root, inputs={"data": data.path}, settings={"config": config}
    )
    done.refer(counts.path)
"""
IMPORT = "from srccore.components.count_samples.component import count_samples\n"
METHOD = """\
    def count_samples(self) -> None:
        self._do("count-samples", data=self.out.split("train"))

"""
TASK = """\
        counted = count_samples(data=splits["train"], config=counting, **root)
        add(counted, "count-samples")
"""

CHANGES: dict[str, list[tuple[str, str]]] = {
    "srccore/config.py": [
        ("class RunConfig(", CONFIG),
        (
            "    augmentation: AugmentationConfig",
            "    counting: CountingConfig = CountingConfig()\n",
        ),
    ],
    "srccore/stages/counting.py": [("", FUNCTION)],
    "srccore/stages/table.py": [('    Stage(\n        "augment-rationales"', TABLE)],
    "components/count_samples/__init__.py": [("", '"""Counts the samples of a split."""\n')],
    "components/count_samples/component.py": [("", COMPONENT)],
    "components/report/component.py": [
        ("    augmentation: dict,\n", "    counting: dict,\n"),
        ("        augmentation: The section", "        counting: The section of that name.\n"),
        ('        "augmentation": augmentation,\n', '        "counting": counting,\n'),
    ],
    "srccore/run/loop.py": [
        ("    wiring.augment_rationales()\n", "    wiring.count_samples()\n"),
        ("    def augment_rationales(self", METHOD),
    ],
    "pipelines/src_pipeline.py": [
        ("from srccore.components.evaluate.", IMPORT),
        ("        augmentation: dict,\n", "        counting: dict,\n"),
        ("        train_rationales = augmented(", TASK),
        ("            augmentation=augmentation,\n", "            counting=counting,\n"),
    ],
}
