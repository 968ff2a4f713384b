"""The compiled pipeline: the settings of its tasks, how they are connected, and what is refused."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from backend_commands import call
from ir import dags, unsafe
from shallow import shallow

from srccore.cluster.request import JobSettings
from srccore.config import load_config, preset_names
from srccore.containers.names import (
    CACHE,
    IMAGES,
    LAUNCH_TRAINING,
    USER_ID,
    VLLM,
    Images,
    read_digests,
)
from srccore.errors import UserError
from srccore.pipelines.compiling import COMPILED, compile_pipeline, device_warning
from srccore.pipelines.profile import Profile, load_profile
from srccore.stages.table import STAGES

Ir = dict[str, Any]
# Everything that a job's pods need from a profile, except resources.
PROFILE = """
environment: {HTTPS_PROXY: "http://proxy:3128", AWS_ENDPOINT_URL: "https://s3.example.com"}
secrets: [{name: s3, keys: {access: AWS_ACCESS_KEY_ID, secret: AWS_SECRET_ACCESS_KEY}}]
ca_bundle: {config_map: trusted}
image_pull_secrets: [registry]
cache_claim: models
run_as_user: null
stages: {train-dpo: {cpu: "16", memory: 200Gi, gpus: 4, timeout_hours: 72, retries: 5}}
"""
EVERY_STAGE = {
    "launcher": "pytorchjob",
    "training_job": {"stages": ["tune-rationale", "train-scorer", "train-dpo"]},
}
"""A profile with which every stage that trains is a job."""
TEXTS: dict[tuple[str, str, str], str] = {}
"""Pipelines compiled so far, by preset, profile and images."""


def compiled(
    preset: str = "llava-1.5-7b",
    images: Images | None = None,
    profile: Path | None = None,
    settings: Sequence[str] = (),
    **changes: Any,
) -> Ir:
    """A compiled pipeline; tests with the same arguments share its text."""
    config = load_config(preset, settings)
    fixed, images = load_profile(profile, config, **changes), images or Images()
    key = (f"{preset} {settings}", fixed.model_dump_json(), repr(images))
    if key not in TEXTS:
        TEXTS[key] = shallow(compile_pipeline, config, fixed, images)
    pipeline, platforms = yaml.load_all(TEXTS[key], yaml.CSafeLoader)
    return {**pipeline, "kubernetes": platforms["platforms"]["kubernetes"]["deploymentSpec"]}


@pytest.fixture(scope="module")
def llava() -> Ir:
    return compiled()


@pytest.fixture(scope="module")
def tiny() -> Ir:
    return compiled("tiny")


def executors(ir: Ir) -> Iterator[tuple[str, Ir, Ir]]:
    """Stage, container and Kubernetes settings of every executor."""
    for label, executor in ir["deploymentSpec"]["executors"].items():
        settings = ir["kubernetes"]["executors"][label]
        yield re.sub(r"^exec-|-\d+$", "", label), executor["container"], settings


def training(ir: Ir, stage: str = "train-dpo") -> tuple[Ir, Ir, Ir]:
    """Arguments, container and Kubernetes settings of a training stage, the same in every round."""
    arguments = [
        component["dag"]["tasks"][stage]["inputs"]["parameters"]
        for _, component in dags(ir)
        if stage in component["dag"]["tasks"]
    ]
    pods = [found[1:] for found in executors(ir) if found[0] == stage]
    assert len(arguments) == len(pods) > 0
    assert all(each == arguments[0] for each in arguments)
    assert all(each == pods[0] for each in pods)
    return arguments[0], *pods[0]


@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"augment": False},
        {"scorer": "given"},
        {"scorer": "train-on-given-pairs"},
        {"rounds": 1, "shards": 1},
        {"rounds": 5, "shards": 32, "parallelism": 4},
        {"launcher": "inprocess"},
        {"launcher": "pytorchjob"},
        {"launcher": "trainjob"},
        EVERY_STAGE,
    ],
    ids=str,
)
def test_nothing_unsafe_is_compiled(preset: str, changes: dict[str, Any]) -> None:
    assert unsafe(compiled(preset, **changes)) == []


@pytest.mark.parametrize("preset", preset_names())
def test_a_shipped_pipeline_loads_and_is_safe(preset: str) -> None:
    from kfp import components

    path = COMPILED / f"{preset}.yaml"
    assert components.load_component_from_file(str(path)).name.startswith("src-")
    assert unsafe(next(yaml.load_all(path.read_text(), yaml.CSafeLoader))) == []


def test_every_gpu_task_has_all_that_a_gpu_task_needs() -> None:
    seen = set()
    for stage, container, settings in executors(compiled(launcher="inprocess")):
        if STAGES[stage].base != "models":
            assert "accelerator" not in container["resources"]
            continue
        seen.add(stage)
        assert container["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert container["resources"]["resourceMemoryLimit"]
        assert container["resources"]["resourceCpuRequest"] == "8"
        assert settings["nodeSelector"]["nodeSelectorJson"]
        assert settings["tolerations"][0]["tolerationJson"]
        assert {"mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "8Gi"}.items() <= next(
            mount for mount in settings["emptyDirMounts"] if mount["volumeName"] == "shared-memory"
        ).items()
    assert seen == {stage for stage in STAGES if STAGES[stage].base == "models"}


def devices(ir: Ir) -> dict[str, Any]:
    """What each task of a stage that runs a model is given as its device."""
    tasks = [task for _, dag in dags(ir) for task in dag["dag"]["tasks"].items()]
    return {
        re.sub(r"-\d+$", "", name): task["inputs"]["parameters"]["device"]
        for name, task in tasks
        if "device" in task.get("inputs", {}).get("parameters", {})
    }


def test_stages_with_gpus_do_not_fall_back_to_the_cpu(tmp_path: Path) -> None:
    def default(ir: Ir) -> Any:
        return ir["root"]["inputDefinitions"]["parameters"]["device"]["defaultValue"]

    assert load_config("llava-1.5-7b").device == "auto"
    assert default(compiled()) == "cuda"
    assert default(compiled("tiny")) == "cpu"
    path = tmp_path / "profile.yaml"
    path.write_text("models: {cpu: '8', memory: 64Gi, timeout_hours: 1}")
    plain = ["engine.name=transformers"]
    assert default(compiled(profile=path, settings=plain)) == "auto"
    path.write_text("stages: {score-candidates: {cpu: '8', memory: 9Gi, timeout_hours: 1}}")
    ir = compiled(profile=path, settings=["scoring.engine.name=transformers"])
    assert default(ir) == "cuda"
    given = devices(ir)
    assert given.pop("score-candidates") == {"runtimeValue": {"constant": "cpu"}}
    assert len(given) >= 6
    assert all(value.keys() == {"componentInputParameter"} for value in given.values())


def test_gpus_that_nothing_would_use_are_warned_of() -> None:
    tiny, llava = load_config("tiny"), load_config("llava-1.5-7b")
    assert device_warning(tiny, load_profile(None, tiny)) is None
    assert device_warning(llava, load_profile(None, llava)) is None
    warning = device_warning(tiny, Profile())
    assert warning is not None
    assert "requests GPUs for tune-rationale, " in warning
    assert "Pass --set device=cuda" in warning


def test_training_jobs_that_could_not_share_their_batch_are_warned_of(tmp_path: Path) -> None:
    """In `tiny`, 8 samples in stage 1 and DPO, 32 in R-Scorer's training."""
    profile, out = tmp_path / "profile.yaml", tmp_path / "src.yaml"
    profile.write_text("launcher: pytorchjob\ntraining_job: {stages: [train-scorer], pods: 16}")
    outcome = call("compile", "--profile", profile, "-o", out)
    assert (outcome.code, outcome.out) == (0, f"{out}\n")
    profile.write_text("launcher: pytorchjob\ntraining_job: {pods: 16}")
    outcome = call("compile", "--profile", profile, "-o", out)
    assert outcome.code == 0
    assert "Warning: train-dpo would be refused: A batch of 8 (batch_size) times 1" in outcome.out


def test_every_task_is_bounded_and_runs_as_a_plain_user(llava: Ir) -> None:
    for stage, container, settings in executors(llava):
        image = LAUNCH_TRAINING if stage == "train-dpo" else VLLM if STAGES[stage].engine else stage
        assert container["image"] == Images().of(image)
        assert int(settings["activeDeadlineSeconds"]) > 0
        assert settings["securityContext"] == {"runAsUser": "1000", "runAsNonRoot": True}
        assert settings["podMetadata"]["labels"]["app.kubernetes.io/component"] == stage
    for _, component in dags(llava):
        for task in component["dag"]["tasks"].values():
            if "executorLabel" in llava["components"][task["componentRef"]["name"]]:
                assert task["retryPolicy"]["maxRetryCount"] == 2


def test_tiny_asks_for_no_gpu(tiny: Ir) -> None:
    for _, container, settings in executors(tiny):
        assert "accelerator" not in container["resources"]
        assert "nodeSelector" not in settings


def test_search_and_scoring_fan_out_over_the_shards(llava: Ir) -> None:
    loops = [
        (task, component)
        for _, component in dags(llava)
        for task in component["dag"]["tasks"].values()
        if "parameterIterator" in task
    ]
    assert len(loops) == 3
    for task, _ in loops:
        assert task["parameterIterator"]["items"]["raw"] == str(list(range(16)))
        assert task["iteratorPolicy"]["parallelismLimit"] == 16
        body = llava["components"][task["componentRef"]["name"]]["dag"]["tasks"]
        assert set(body) == {"search-candidates", "score-candidates"}


def test_each_round_starts_from_the_policy_before_and_no_round_waits_for_figures(
    llava: Ir,
) -> None:
    tasks = llava["root"]["dag"]["tasks"]
    producers = [
        tasks[name]["inputs"]["artifacts"]["policy"]["taskOutputArtifact"]["producerTask"]
        for name in ("src-round", "src-round-2", "src-round-3")
    ]
    assert producers == ["tune-rationale", "src-round", "src-round-2"]
    for name in ("src-round", "src-round-2", "src-round-3"):
        assert not any("evaluate" in each for each in tasks[name]["dependentTasks"])
        assert tasks[name]["taskInfo"]["name"].startswith("round ")


def test_components_go_without_their_texts_since_a_run_s_record_is_small(llava: Ir) -> None:
    for component in llava["components"].values():
        assert "description" not in str(component.get("inputDefinitions"))
        assert "description" not in str(component.get("outputDefinitions"))
    for executor in llava["deploymentSpec"]["executors"].values():
        if "container" in executor:
            source = ast.parse(executor["container"]["command"][-1])
            (function,) = (each for each in source.body if isinstance(each, ast.FunctionDef))
            assert ast.get_docstring(function) is None
            assert "from srccore." in ast.unparse(function)


@pytest.mark.parametrize(
    ("rounds", "shards", "told"),
    [
        (3, 16, None),
        (3, 30, "Use 20 shards"),
        (1, 60, None),
        (8, 8, "Use 3 shards"),
        (12, 1, "Use fewer rounds"),
    ],
)
def test_a_run_that_its_record_may_not_hold_is_warned_of(
    rounds: int, shards: int, told: str | None, tmp_path: Path
) -> None:
    out = tmp_path / "src.yaml"
    shape = (f"--rounds={rounds}", f"--shards={shards}")
    result = call("compile", "--preset", "tiny", *shape, "-o", out)
    assert result.code == 0
    assert out.exists()
    assert ("Warning" in result.out) == (told is not None)
    assert told is None or told in result.out


def test_only_evaluation_reads_the_held_out_split(llava: Ir) -> None:
    readers = {
        name
        for name, task in llava["root"]["dag"]["tasks"].items()
        if "'outputArtifactKey': 'heldout'" in str(task.get("inputs"))
    }
    assert readers == {"evaluate", "evaluate-2", "evaluate-3", "evaluate-4"}


def test_stages_are_optional_by_profile() -> None:
    def names(**changes: Any) -> set[str]:
        return set(compiled("tiny", rounds=1, **changes)["root"]["dag"]["tasks"])

    whole = names()
    assert whole - names(augment=False) == {"augment-rationales", "augment-rationales-2"}
    trained = {"sample-responses", "annotate-ratings", "train-scorer"}
    assert whole - names(scorer="given") == trained
    assert whole - names(scorer="train-on-given-pairs") == {"sample-responses", "annotate-ratings"}
    assert "import-output" in names(scorer="given")


@pytest.mark.parametrize(
    ("settings", "environment", "refused"),
    [
        (["data.source=s3://bucket/$(KEY)"], {}, r"data has \$\( in it"),
        ([], {"AWS_REGION": "$(KEY)"}, r"environment has \$\( in it"),
    ],
)
def test_no_default_pulls_a_secret_into_a_task(
    settings: list[str], environment: dict[str, str], refused: str
) -> None:
    profile = Profile(environment=environment)
    with pytest.raises(UserError, match=refused):
        compile_pipeline(load_config("tiny", settings), profile, Images())


def test_a_preset_s_settings_are_defaults_of_run_time_parameters(llava: Ir) -> None:
    parameters = llava["root"]["inputDefinitions"]["parameters"]
    assert parameters["dpo"]["defaultValue"]["lora"]["rank"] == 256
    assert parameters["search"]["defaultValue"]["samples"] == 12000
    assert parameters["training_memory"]["defaultValue"] == "64Gi"
    assert parameters["tolerations"]["defaultValue"][0]["key"] == "nvidia.com/gpu"
    assert "defaultValue" not in parameters["artifact_root"]


@pytest.mark.parametrize("stage", ["tune-rationale", "train-scorer"])
def test_stage_1_and_r_scorer_train_in_their_own_pods_unless_the_profile_says_otherwise(
    stage: str, tmp_path: Path
) -> None:
    arguments, container, _ = training(compiled(launcher="pytorchjob"), stage)
    assert arguments["launcher"]["runtimeValue"]["constant"] == "inprocess"
    assert container["image"] == Images().of(stage)
    assert "accelerator" in container["resources"]

    path = tmp_path / "profile.yaml"
    path.write_text(f"""
training_job: {{stages: [{stage}], pods: 2}}
secrets: [{{name: hub, keys: {{token: HF_TOKEN}}, stages: [{stage}]}}]
stages: {{{stage}: {{cpu: "4", memory: 90Gi, gpus: 3, timeout_hours: 7, retries: 5}}}}
""")
    ir = compiled(profile=path, launcher="pytorchjob")
    arguments, container, settings = training(ir, stage)
    assert arguments["launcher"]["runtimeValue"]["constant"] == "pytorchjob"
    job = JobSettings.model_validate(arguments["job"]["runtimeValue"]["constant"])
    assert (job.image, job.pods, job.running_hours) == (Images().of(stage), 2, 7)
    assert [secret.name for secret in job.secrets] == ["hub"]
    # Only those of train-dpo are parameters of the run.
    assert (job.memory, job.gpus) == ("90Gi", 3)
    assert not {"training_memory", "training_gpus"} & arguments.keys()
    for name in ("node_selector", "tolerations"):
        assert arguments[name] == {"componentInputParameter": name}
    assert container["image"] == Images().of(LAUNCH_TRAINING)
    assert "accelerator" not in container["resources"]
    # 24 hours of waiting, 7 of training, and one to spare.
    assert int(settings["activeDeadlineSeconds"]) == 32 * 3600
    # DPO is no longer a job.
    arguments, container, _ = training(ir)
    assert arguments["launcher"]["runtimeValue"]["constant"] == "inprocess"
    assert container["image"] == Images().of("train-dpo")


@pytest.mark.parametrize("launcher", ["inprocess", "pytorchjob", "trainjob"])
def test_a_task_trains_in_its_own_pod_or_watches_the_job_that_does(launcher: str) -> None:
    arguments, container, settings = training(compiled(launcher=launcher))
    assert arguments["launcher"]["runtimeValue"]["constant"] == launcher
    given = {"job", "training_memory", "training_gpus", "node_selector", "tolerations"}
    if launcher == "inprocess":
        assert container["resources"]["accelerator"]
        assert not given & arguments.keys()
        return
    assert container["image"] == Images().of(LAUNCH_TRAINING)
    assert container["resources"]["resourceCpuRequest"] == "200m"
    assert container["resources"]["resourceMemoryLimit"] == "512Mi"
    assert "accelerator" not in container["resources"]
    assert not {"nodeSelector", "tolerations"} & settings.keys()
    # 24 hours of waiting, 48 of training, and one to spare.
    assert int(settings["activeDeadlineSeconds"]) == 73 * 3600
    for name in given - {"job"}:
        assert arguments[name] == {"componentInputParameter": name}
    assert arguments["round_number"] == {"componentInputParameter": "round_number"}


def test_a_job_is_told_all_that_its_pods_need(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(
        PROFILE + "training_job: {pods: 2, queue: research, priority_class: low, "
        "service_account: training, waiting_hours: 1.5, max_restarts: 3, ttl_hours: 2}"
    )
    arguments, _, _ = training(compiled(profile=path))
    job = arguments["job"]["runtimeValue"]["constant"]
    assert JobSettings.model_validate(job) == JobSettings(
        image=Images().of("train-dpo"),
        pods=2,
        cpu="16",
        environment={
            "HTTPS_PROXY": "http://proxy:3128",
            "AWS_ENDPOINT_URL": "https://s3.example.com",
            "NO_PROXY": "localhost,127.0.0.1,.svc,.cluster.local,.kubeflow",
        },
        secrets=(
            {
                "name": "s3",
                "keys": {"access": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"},
            },
        ),
        image_pull_secrets=("registry",),
        ca_bundle={"config_map": "trusted"},
        cache_claim="models",
        run_as_user=USER_ID,
        service_account="training",
        queue="research",
        priority_class="low",
        waiting_hours=1.5,
        running_hours=72,
        max_restarts=3,
        ttl_hours=2,
    )
    # Parameters of the run set these; a value here would override an empty parameter.
    assert not {"memory", "gpus", "node_selector", "tolerations"} & job.keys()


def test_a_job_on_cpus_is_not_sent_to_where_the_gpus_are() -> None:
    arguments, _, _ = training(compiled("tiny", launcher="pytorchjob"))
    assert not {"node_selector", "tolerations"} & arguments.keys()
    assert arguments["training_gpus"] == {"componentInputParameter": "training_gpus"}


def test_the_pod_that_watches_a_job_may_be_given_more(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("launcher_resources: {cpu: '1', memory: 1Gi, timeout_hours: 100, retries: 7}")
    _, container, settings = training(compiled(profile=path))
    assert container["resources"]["resourceMemoryLimit"] == "1Gi"
    assert int(settings["activeDeadlineSeconds"]) == 100 * 3600


def test_secrets_proxy_certificates_and_cache_come_from_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    ir = compiled(profile=path)
    for _, container, settings in executors(ir):
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert environment["HTTPS_PROXY"] == "http://proxy:3128"
        assert ".svc" in environment["NO_PROXY"]
        assert environment["AWS_CA_BUNDLE"] == "/etc/srccore/ca/ca-bundle.crt"
        assert settings["secretAsEnv"][0]["keyToEnv"][0]["envVar"] == "AWS_ACCESS_KEY_ID"
        assert settings["configMapAsVolume"][0]["configMapName"] == "trusted"
        assert settings["imagePullSecret"][0]["secretName"] == "registry"
        assert settings["pvcMount"][0]["mountPath"] == CACHE
        assert "securityContext" not in settings
    defaults = ir["root"]["inputDefinitions"]["parameters"]
    assert defaults["training_gpus"]["defaultValue"] == "4"


@pytest.mark.parametrize("launcher", ["pytorchjob", "inprocess"])
def test_a_step_that_would_train_on_one_of_its_gpus_is_refused(
    launcher: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text('stages: {train-scorer: {cpu: "16", memory: 9Gi, gpus: 4, timeout_hours: 1}}')
    with pytest.raises(
        UserError, match=r"train-scorer 4 GPUs, .* trains on one\. Add train-scorer"
    ):
        compiled(profile=path, launcher=launcher)


def test_a_single_stage_has_resources_and_secrets_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(
        """
secrets: [{name: teacher, keys: {key: OPENAI_API_KEY}, stages: [annotate-ratings]}]
stages: {evaluate: {cpu: "16", memory: 300Gi, gpus: 4, timeout_hours: 1}}
"""
    )
    found = {
        stage: (container, settings)
        for stage, container, settings in executors(compiled(profile=path))
    }
    resources = found["evaluate"][0]["resources"]
    assert resources["resourceMemoryLimit"] == "300Gi"
    assert resources["accelerator"]["resourceCount"] == "4"
    assert {stage for stage, (_, settings) in found.items() if "secretAsEnv" in settings} == {
        "annotate-ratings"
    }


def test_images_and_pods_agree_on_user_and_cache() -> None:
    text = (COMPILED.parents[1] / "images" / "stage" / "Containerfile").read_text()
    assert f"USER {USER_ID}:{USER_ID}" in text
    assert f"SRCCORE_CACHE={CACHE}/" in text and f"HF_HOME={CACHE}/" in text


@pytest.mark.parametrize(
    ("scorer", "needed"),
    [("train", None), ("given", "scorer_uri"), ("train-on-given-pairs", "labelled_pairs_uri")],
)
def test_a_uri_is_a_parameter_where_it_is_needed_and_then_must_be_given(
    scorer: str, needed: str | None
) -> None:
    ir = compiled("tiny", scorer=scorer)
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    uris = {name for name in parameters if name.endswith("_uri")}
    assert uris == ({needed} if needed else set())
    if needed:
        assert "defaultValue" not in parameters[needed]
        tasks = ir["root"]["dag"]["tasks"]
        assert tasks["import-output"]["cachingOptions"] == {}


def test_digests_replace_every_tag(tmp_path: Path) -> None:
    path = tmp_path / "images.txt"
    path.write_text(
        "".join(f"other.example.com/srccore/{name}@sha256:{'a' * 64}\n" for name in IMAGES)
    )
    images = Images("registry.example.com", digests=read_digests(path, "registry.example.com"))
    ir = compiled("tiny", images, launcher="pytorchjob")
    named = re.findall(r"'(registry\.example\.com/[^']*)'", str(ir))
    expected = IMAGES.keys() - {"import-output", VLLM}  # which the preset does not use
    assert set(named) == {
        f"registry.example.com/srccore/{name}@sha256:{'a' * 64}" for name in expected
    }


def test_a_list_of_no_digests_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.txt"
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="has no images"):
        read_digests(path, "r")


def test_an_image_without_a_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.txt"
    path.write_text(f"r/srccore/evaluate@sha256:{'a' * 64}\n")
    with pytest.raises(UserError, match="no digest for the image r/srccore/"):
        compiled("tiny", Images("r", digests=read_digests(path, "r")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 0}, "shards must be at least 1, got 0"),
        (
            {"launcher": "trainjob", "training_job": {"priority_class": "p"}},
            "sets priority_class, which a TrainJob has no field for (launcher: trainjob)",
        ),
        ({"launcher": "trainjob", "run_as_user": 7}, "TrainingRuntime srccore-training"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"scorer": "found"}, "scorer must be 'train'"),
        ({"stages": {"train": {}}}, "Fix stages.train"),
        ({"launcher": "mpijob"}, "launcher must be 'inprocess'"),
        ({"training_job": {"pods": 0}}, "training_job.pods"),
        (
            {"training_job": {"stages": ["evaluate"]}},
            "evaluate is not one of tune-rationale, train-scorer, train-dpo",
        ),
    ],
    ids=str,
)
def test_a_wrong_profile_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_profile(None, load_config("tiny"), **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shard: 4", "shard does not exist"),
        (
            "models: {cpu: two, memory: 64Gi, timeout_hours: 1}",
            "models.cpu: String should match pattern",
        ),
        ("- 1", "is not a YAML mapping"),
        ("a: [", "Cannot read the profile"),
        ("stages: {train: {cpu: '1', memory: 1Gi, timeout_hours: 1}}", "unknown stage train"),
        ("models: {cpu: '1', memory: lots, timeout_hours: 1}", "models.memory"),
    ],
)
def test_a_wrong_profile_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_profile(path, load_config("tiny"))


def test_what_a_pipeline_cannot_do_is_refused() -> None:
    config = load_config("tiny", ["on_regression=keep_previous"])
    with pytest.raises(UserError, match="cannot go back"):
        compile_pipeline(config, Profile(), Images())


@pytest.mark.parametrize("registry", ["", "https://registry.example.com", "registry/Team", "a b"])
def test_what_is_no_registry_is_refused(registry: str) -> None:
    with pytest.raises(UserError, match="is not a registry"):
        Images(registry)


def test_a_file_that_cannot_be_written_is_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = call("compile", "-o", tmp_path / "file" / "src.yaml")
    assert outcome.code == 2
    assert "Cannot write to" in outcome.out


def test_stages_whose_engine_is_vllm_run_in_its_image() -> None:
    found = {stage: container["image"] for stage, container, _ in executors(compiled())}
    on_vllm = {"sample-responses", "search-candidates", "score-candidates", "evaluate"}
    assert {stage for stage, image in found.items() if image == Images().of(VLLM)} == on_vllm


def test_vllm_without_a_gpu_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("stages: {score-candidates: {cpu: '8', memory: 9Gi, timeout_hours: 1}}")
    with pytest.raises(UserError, match=r"score-candidates is vLLM.*scoring\.engine\.name"):
        compiled(profile=path)
