"""Search for candidates with your own policy, in your own pipeline, using component.yaml files.

Compiling it does not require the suite: the components are loaded by path (or by URL, with
`load_component_from_url`), and the last step is your own code.

    python examples/search_only.py search_only.yaml
"""

import sys
from pathlib import Path

from kfp import compiler, components, dsl
from kfp.dsl import Dataset, Input

COMPONENTS = Path(__file__).resolve().parents[1] / "components"

import_output = components.load_component_from_file(
    str(COMPONENTS / "import_output/component.yaml")
)
search_candidates = components.load_component_from_file(
    str(COMPONENTS / "search_candidates/component.yaml")
)


# Its image must contain srccore, as every image of the suite does.
@dsl.component(
    base_image="localhost/srccore/search-candidates:0.1.0",
    packages_to_install=[],
    install_kfp_package=False,
)
def count_candidates(candidates: Input[Dataset]) -> int:
    """Counts candidates, as an example of how your own component reads an output of the suite."""
    from srccore.data.records import CandidateSet, read_records
    from srccore.steps.step import fetch_output

    folder = fetch_output(candidates.path)
    found = read_records(folder / "candidates.jsonl", CandidateSet)
    return sum(len(record.candidates) for record in found)


@dsl.pipeline(name="search-only")
def search_only(
    artifact_root: str,
    data_uri: str,
    policy_uri: str,
    device: str = "auto",
    threads: int = 0,
) -> int:
    """Searches for candidate responses to the samples of a data set.

    Args:
        artifact_root: Where outputs are written: ``s3://bucket/prefix``.
        data_uri: A data set that `srccore data validate` accepts.
        policy_uri: The policy, a ``policy.json``. Without adapters, it is the base model.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads of torch; 0 for torch's default.
    """
    data = import_output(uri=data_uri).set_caching_options(False).set_display_name("data")
    policy = import_output(uri=policy_uri).set_caching_options(False).set_display_name("policy")
    found = search_candidates(
        data=data.outputs["output"],
        policy=policy.outputs["output"],
        artifact_root=artifact_root,
        config={"samples": 12, "width": 2, "branch": 2, "candidates": 3, "max_sentence_tokens": 24},
        round_number=1,
        device=device,
        threads=threads,
    )
    return count_candidates(candidates=found.outputs["candidates"]).output


if __name__ == "__main__":
    compiler.Compiler().compile(search_only, sys.argv[1] if sys.argv[1:] else "search_only.yaml")
