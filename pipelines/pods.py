"""What a task's pod is given: image, resources, placement, security, environment.

Node selector and tolerations are run-time parameters, and so are the GPUs and the memory of
train-dpo, which stands outside the loops. Inside a loop kfp would leave a parameter of the latter
kind dangling: there the profile decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kfp import kubernetes

from srccore.images import CACHE, STAGES, Images
from srccore_pipelines.profile import Profile, Resources

__all__ = ["Placement", "Pods"]

_CA_FOLDER = "/etc/srccore/ca"
_IN_CLUSTER = "localhost,127.0.0.1,.svc,.cluster.local,.kubeflow"
"""Not by a proxy: Kubeflow's own launcher, in the same container, would go through it too."""
_PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")


@dataclass(frozen=True)
class Placement:
    """Run-time parameters of the pipeline that say where its GPU tasks run."""

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
    """

    profile: Profile
    images: Images

    def configure(self, task: Any, stage: str, placement: Placement) -> Any:
        """Gives a task its image and what its pod asks for.

        Args:
            task: The task of a component.
            stage: The stage that it runs.
            placement: The pipeline's parameters.

        Returns:
            The task.
        """
        profile, resources = self.profile, self.profile.resources(stage)
        training = stage == "train-dpo"
        task.set_container_image(self.images.of(stage))
        task.set_cpu_request(resources.cpu)
        memory = placement.training_memory if training else resources.memory
        task.set_memory_request(memory).set_memory_limit(memory)
        if resources.gpus:
            gpus = placement.training_gpus if training else resources.gpus
            task.set_accelerator_type(profile.accelerator).set_accelerator_limit(gpus)
            kubernetes.add_node_selector_json(task, placement.node_selector)
            kubernetes.add_toleration_json(task, placement.tolerations)
        self._limit(task, resources)
        self._mount(task, resources)
        for name, value in sorted(self._environment().items()):
            task.set_env_variable(name, value)
        for secret in profile.secrets:
            if stage in (secret.stages or STAGES):
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

    def _environment(self) -> dict[str, str]:
        given = dict(self.profile.environment)
        names = {name.upper() for name in given}
        if names & _PROXIES and "NO_PROXY" not in names:
            given["NO_PROXY"] = _IN_CLUSTER
        return given

    def _limit(self, task: Any, resources: Resources) -> None:
        kubernetes.set_timeout(task, round(resources.timeout_hours * 3600))
        if resources.retries:
            task.set_retry(
                resources.retries,
                backoff_duration="30s",
                backoff_factor=2,
                backoff_max_duration="600s",
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
            kubernetes.use_config_map_as_volume(task, bundle.config_map, _CA_FOLDER)
            for name in _CA_VARIABLES:
                task.set_env_variable(name, f"{_CA_FOLDER}/{bundle.key}")
