"""Configures the pods of tasks: image, resources, placement, security, environment.

Node selector and tolerations are run-time parameters, and so are the GPUs and the memory of
train-dpo, which is outside the loops. Inside a loop kfp would leave a parameter for resources
dangling, so there the profile decides. If a stage trains as a job, its task passes all this to the
job's pods in its parameters, and its own pod, which only watches, requests few resources and no
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes

from srccore.cluster.request import (
    CA_FOLDER,
    CA_VARIABLES,
    INPROCESS,
    JobSettings,
    PodSettings,
    SecretKeys,
)
from srccore.containers.names import CACHE, LAUNCH_TRAINING, USER_ID, VLLM, Images
from srccore.pipelines.profile import Profile, Resources
from srccore.stages.table import STAGES

__all__ = ["Placement", "Pods"]

_TRAINING = "train-dpo"
"""The stage whose memory and GPUs are parameters of the pipeline."""
_IN_CLUSTER = "localhost,127.0.0.1,.svc,.cluster.local,.kubeflow"
"""Hosts to reach without a proxy, also for Kubeflow's own launcher in the same container."""
RETRY_PAUSE = 60
"""Seconds before a failed task is retried."""
_PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}


@dataclass(frozen=True)
class Placement:
    """Run-time parameters of the pipeline that determine where its GPU tasks run."""

    node_selector: Any
    tolerations: Any
    training_memory: Any
    training_gpus: Any


@dataclass(frozen=True)
class Pods:
    """Configures tasks.

    Args:
        profile: The cluster.
        images: The images.
        vllm: The stages whose engine is vLLM.
    """

    profile: Profile
    images: Images
    vllm: frozenset[str] = frozenset()

    def configure(self, task: Any, stage: str, placement: Placement) -> Any:
        """Sets the image of a task and what its pod requests.

        Args:
            task: The task of a component.
            stage: The stage that the task runs.
            placement: The pipeline's parameters.

        Returns:
            The task.
        """
        profile, resources = self.profile, self.profile.resources(stage)
        image = VLLM if stage in self.vllm else stage
        if launches := profile.is_job(stage):
            image, resources = LAUNCH_TRAINING, profile.launching(stage)
        at_run_time = stage == _TRAINING and not launches
        task.set_container_image(self.images.of(image))
        task.set_cpu_request(resources.cpu)
        memory = placement.training_memory if at_run_time else resources.memory
        task.set_memory_request(memory).set_memory_limit(memory)
        if resources.gpus:
            gpus = placement.training_gpus if at_run_time else resources.gpus
            task.set_accelerator_type(profile.accelerator).set_accelerator_limit(gpus)
            kubernetes.add_node_selector_json(task, placement.node_selector)
            kubernetes.add_toleration_json(task, placement.tolerations)
        self._limit(task, resources)
        self._mount(task, resources)
        for name, value in sorted(self._environment().items()):
            task.set_env_variable(name, value)
        for secret in self._secrets(stage):
            kubernetes.use_secret_as_env(task, secret.name, dict(secret.keys))
        if profile.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(profile.image_pull_secrets))
        if profile.run_as_user is not None:
            kubernetes.set_security_context(
                task, run_as_user=profile.run_as_user, run_as_non_root=True
            )
        kubernetes.add_pod_label(task, "app.kubernetes.io/part-of", "srccore")
        kubernetes.add_pod_label(task, "app.kubernetes.io/component", stage)
        return task

    def compute(self, stage: str, device: Any, threads: Any) -> dict[str, Any]:
        """The arguments of a stage's component that say how it computes.

        Args:
            stage: A stage that runs a model.
            device: The pipeline's parameter.
            threads: The pipeline's parameter.

        Returns:
            Arguments of the component. A stage without GPUs beside stages with some uses the CPU.
        """
        stages = self.profile.gpu_stages()
        return {"device": device if stage in stages or not stages else "cpu", "threads": threads}

    def training(self, stage: str, placement: Placement) -> dict[str, Any]:
        """The arguments of a stage's component that say where it trains.

        Args:
            stage: A training stage.
            placement: The pipeline's parameters.

        Returns:
            Arguments of the component: the launcher, and for a job what its pods need.
        """
        profile, resources = self.profile, self.profile.resources(stage)
        if not profile.is_job(stage):
            return {"launcher": INPROCESS}
        same = profile.model_dump(include=set(PodSettings.model_fields))
        settings = JobSettings(
            image=self.images.of(stage),
            cpu=resources.cpu,
            memory=resources.memory,
            gpus=resources.gpus,
            shared_memory=resources.shared_memory,
            secrets=self._secrets(stage),
            # A job's pods do not depend on what the backend accepts.
            run_as_user=profile.run_as_user or USER_ID,
            running_hours=resources.timeout_hours,
            **profile.training_job.model_dump(exclude={"stages"}),
            **{**same, "environment": self._environment()},
        )
        # What a parameter sets is left out: an empty parameter would not override it.
        left_out, given = {"node_selector", "tolerations"}, {}
        if resources.gpus:
            given["node_selector"] = placement.node_selector
            given["tolerations"] = placement.tolerations
        if stage == _TRAINING:
            left_out |= {"memory", "gpus"}
            given["training_memory"] = placement.training_memory
            given["training_gpus"] = placement.training_gpus
        job = settings.model_dump(mode="json", exclude_none=True, exclude=left_out)
        return {"launcher": profile.launcher, "job": job, **given}

    def _secrets(self, stage: str) -> tuple[SecretKeys, ...]:
        return tuple(
            SecretKeys(name=secret.name, keys=secret.keys)
            for secret in self.profile.secrets
            if stage in (secret.stages or STAGES)
        )

    def _environment(self) -> dict[str, str]:
        given = dict(self.profile.environment)
        names = {name.upper() for name in given}
        if names & _PROXIES and "NO_PROXY" not in names:
            given["NO_PROXY"] = _IN_CLUSTER
        return given

    def _limit(self, task: Any, resources: Resources) -> None:
        seconds = round(resources.timeout_hours * 3600)
        kubernetes.set_timeout(task, seconds)
        if resources.retries:
            # Argo counts this maximum from the start of the first attempt, over all attempts.
            task.set_retry(
                resources.retries,
                backoff_duration=f"{RETRY_PAUSE}s",
                backoff_factor=1,
                backoff_max_duration=f"{(1 + resources.retries) * (seconds + RETRY_PAUSE)}s",
            )

    def _mount(self, task: Any, resources: Resources) -> None:
        if resources.shared_memory:
            kubernetes.empty_dir_mount(
                task, "shared-memory", "/dev/shm", "Memory", resources.shared_memory
            )
        if self.profile.cache_claim:
            kubernetes.mount_pvc(task, self.profile.cache_claim, CACHE)
        else:
            kubernetes.empty_dir_mount(task, "cache", CACHE)
        bundle = self.profile.ca_bundle
        if bundle:
            kubernetes.use_config_map_as_volume(task, bundle.config_map, CA_FOLDER)
            for name in CA_VARIABLES:
                task.set_env_variable(name, f"{CA_FOLDER}/{bundle.key}")
