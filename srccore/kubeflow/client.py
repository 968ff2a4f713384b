"""The Kubeflow Pipelines backend: its requests, and what its refusals mean.

The calls go through `kfp_server_api`, on which ``kfp.Client`` itself is built, because that one
writes to the user's home, retries a wrong host for most of a minute, and prints.

Assumes the v2beta1 REST API of Kubeflow Pipelines 2.15 or later.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from srccore.errors import UserError
from srccore.kubeflow.connection import FORWARD, Connection, open_client, pod_namespace

if TYPE_CHECKING:
    from kfp_server_api import ApiClient

__all__ = [
    "Backend",
    "ExistsError",
    "MissingError",
    "UnavailableError",
    "connect",
    "named",
]

TIMEOUT = (10, 60)
"""Seconds to connect, and to wait for an answer."""
PAGE = 100
"""Entries asked for at once; the backend gives at most 200."""


class UnavailableError(UserError):
    """The backend does not answer now, and may do so later."""


class MissingError(UserError):
    """The backend does not have what is asked for."""


class ExistsError(UserError):
    """The backend has one of this name already."""


class Backend:
    """A backend that has answered.

    Args:
        client: Knows host and credentials.
        ui: What links begin with.
        credential: What the user showed, to be named when it is refused.
    """

    def __init__(self, client: ApiClient, ui: str, credential: str | None) -> None:
        import kfp_server_api as api

        self.client = client
        self.host: str = client.configuration.host
        self.ui = ui
        self.credential = credential
        self.namespace: str | None = None
        self.health = api.HealthzServiceApi(client)
        self.experiments = api.ExperimentServiceApi(client)
        self.pipelines = api.PipelineServiceApi(client)
        self.uploads = api.PipelineUploadServiceApi(client)
        self.runs = api.RunServiceApi(client)
        self.recurring_runs = api.RecurringRunServiceApi(client)
        self._specs: dict[str, Any] = {}

    def call(self, method: Callable[..., Any], **arguments: Any) -> Any:
        """Makes one request.

        Args:
            method: A method of one of the services.
            arguments: Its arguments.

        Returns:
            The model that the method returns.

        Raises:
            UnavailableError: No answer, or one of a server in trouble.
            UserError: The request is refused, or whoever answers is no Kubeflow Pipelines.
        """
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = method(**arguments, _request_timeout=TIMEOUT)
            # The client takes a page of HTML for a model without fields.
            json.loads(self.client.last_response.data)
        except ApiException as error:
            raise self._refused(error) from None
        except HTTPError as error:
            raise self._unreachable(error) from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise self._stranger() from None
        return answer

    def pages(self, method: Callable[..., Any], field: str, **arguments: Any) -> Iterator[Any]:
        """Lists entries from page to page.

        Args:
            method: A ``..._list_...`` method of one of the services.
            field: The list in its answer.
            arguments: Its arguments.
        """
        token = ""
        while True:
            page = self.call(method, page_size=PAGE, page_token=token, **arguments)
            yield from getattr(page, field) or ()
            token = page.next_page_token or ""
            if not token:
                return

    def experiment(self, name: str) -> str | None:
        """The id of the experiment of a name, or None."""
        found = self.pages(
            self.experiments.experiment_service_list_experiments,
            "experiments",
            namespace=self.namespace,
            filter=named(name),
        )
        return next((each.experiment_id for each in found if each.display_name == name), None)

    def create_experiment(self, name: str) -> str:
        """The id of the experiment of a name, which is made where missing."""
        from kfp_server_api import V2beta1Experiment

        def create() -> str:
            body = V2beta1Experiment(display_name=name, namespace=self.namespace)
            made = self.call(self.experiments.experiment_service_create_experiment, experiment=body)
            return str(made.experiment_id)

        return _found_or_made(lambda: self.experiment(name), create)

    def create_pipeline(self, name: str) -> str:
        """The id of the pipeline of a name, which is made where missing, without a version yet."""
        from kfp_server_api import V2beta1Pipeline

        def find() -> str | None:
            found = self.pages(
                self.pipelines.pipeline_service_list_pipelines,
                "pipelines",
                namespace=self.namespace,
                filter=named(name, "name"),
            )
            return next((each.pipeline_id for each in found if each.name == name), None)

        def create() -> str:
            # Uploading one would make a version too, of the pipeline's name.
            body = V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
            made = self.call(self.pipelines.pipeline_service_create_pipeline, pipeline=body)
            return str(made.pipeline_id)

        return _found_or_made(find, create)

    def create_version(self, pipeline_id: str, name: str, text: str) -> str:
        """The id of a pipeline's version of a name, which is uploaded where missing.

        Args:
            pipeline_id: The pipeline.
            name: The version's name.
            text: The compiled pipeline, in YAML.
        """

        def find() -> str | None:
            found = self.pages(
                self.pipelines.pipeline_service_list_pipeline_versions,
                "pipeline_versions",
                pipeline_id=pipeline_id,
                filter=named(name, "name"),
            )
            return next((each.pipeline_version_id for each in found if each.name == name), None)

        def upload() -> str:
            with tempfile.TemporaryDirectory() as folder:
                # The backend knows YAML by the end of the file's name.
                file = Path(folder, "pipeline.yaml")
                file.write_text(text, encoding="utf-8")
                made = self.call(
                    self.uploads.upload_pipeline_version,
                    uploadfile=str(file),
                    name=name,
                    pipelineid=pipeline_id,
                )
            return str(made.pipeline_version_id)

        return _found_or_made(find, upload)

    def version_spec(self, reference: Any) -> Any:
        """The pipeline of a version, which never changes, so that it is asked for once.

        Args:
            reference: A ``V2beta1PipelineVersionReference``.
        """
        version_id = reference.pipeline_version_id
        if version_id not in self._specs:
            version = self.call(
                self.pipelines.pipeline_service_get_pipeline_version,
                pipeline_id=reference.pipeline_id,
                pipeline_version_id=version_id,
            )
            self._specs[version_id] = version.pipeline_spec
        return self._specs[version_id]

    def run_url(self, run_id: str) -> str:
        """Where the UI shows a run."""
        return f"{self.ui}/#/runs/details/{run_id}"

    def schedule_url(self, recurring_run_id: str) -> str:
        """Where the UI shows a recurring run."""
        return f"{self.ui}/#/recurringrun/details/{recurring_run_id}"

    def version_url(self, reference: Any) -> str:
        """Where the UI shows the version that a ``V2beta1PipelineVersionReference`` names."""
        return (
            f"{self.ui}/#/pipelines/details/{reference.pipeline_id}"
            f"/version/{reference.pipeline_version_id}"
        )

    def _refused(self, error: Any) -> UserError:
        message = _message(error.body)
        if error.status in (401, 403):
            who = "does not know who asks" if error.status == 401 else "refuses whoever asks"
            return UserError(
                f"Kubeflow Pipelines at {self.host} {who} ({error.status}{_after(message)}).",
                self._credential_mend(),
            )
        if 300 <= error.status < 400:
            return self._redirected((error.headers or {}).get("Location") or "")
        if error.status >= 500 or error.status in (408, 429):
            return UnavailableError(
                f"Kubeflow Pipelines at {self.host} is in trouble "
                f"({error.status}{_after(message)}).",
                "Try again later; the logs of the deployment ml-pipeline say more.",
            )
        if message is None:
            return self._stranger()
        return self._denied(error.status, message)

    def _denied(self, status: int, message: str) -> UserError:
        if status == 409:
            return ExistsError(
                f"Kubeflow Pipelines at {self.host} has one of this name already: {message}.",
                "Try again: another client may be making it right now.",
            )
        if status == 404:
            return MissingError(
                f"Kubeflow Pipelines at {self.host} does not have it: {message}.",
                "List what is there with srccore runs list.",
            )
        return UserError(
            f"Kubeflow Pipelines at {self.host} refuses this ({status}): {message}.",
            "Mend what it names; its version must be 2.15 or later.",
        )

    def _redirected(self, location: str) -> UserError:
        target, here = urlsplit(location), urlsplit(self.host)
        where = f"{target.scheme}://{target.netloc}" if target.netloc else target.path
        is_same = here.hostname == target.hostname
        if is_same and (here.scheme, target.scheme) == ("http", "https"):
            return UserError(f"{self.host} speaks TLS alone.", f"Write --host {where}.")
        return UserError(
            f"{self.host} sends its visitors on to {where}, a page to log in as it seems.",
            self._credential_mend(),
        )

    def _unreachable(self, error: Any) -> UserError:
        from urllib3.exceptions import LocationValueError, SSLError

        if isinstance(error, LocationValueError):
            return UserError(
                f"The host {self.host} is no address.", "Write --host https://NAME[:PORT]."
            )
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, SSLError):
            return UserError(
                f"The TLS connection to {self.host} fails: {_innermost(reason)}.",
                "Give the certificates of its authority with --ca-bundle; where it speaks plain "
                "HTTP, write --host http://...",
            )
        return UnavailableError(
            f"{self.host} does not answer: {_innermost(reason)}.",
            f"Check the address, or forward a port: {FORWARD}.",
        )

    def _stranger(self) -> UserError:
        return UserError(
            f"{self.host} answers, but not as Kubeflow Pipelines 2 does.",
            "Give the address under which /apis/v2beta1/healthz answers, such as "
            "https://kubeflow.example.org/pipeline. If a browser sees a login page there: "
            + self._credential_mend(),
        )

    def _credential_mend(self) -> str:
        if self.credential:
            return f"Renew {self.credential}, or ask for the rights if it is current."
        return (
            "Give a token with --token-file or KFP_TOKEN, cookies with --cookies-file or "
            "KFP_COOKIES, or the user with --user-header."
        )


def connect(connection: Connection, *, needs_namespace: bool = True) -> Backend:
    """Reaches a backend and asks after its health.

    Args:
        connection: What the user says.
        needs_namespace: Whether what follows needs a namespace in a multi-user install.

    Returns:
        The backend. It has a namespace if, and only if, it is a multi-user install.

    Raises:
        UserError: It cannot be reached, or lets nobody in, or is no Kubeflow Pipelines.
    """
    client, ui, credential = open_client(connection)
    # Its warnings say what our errors say.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    backend = Backend(client, ui, credential)
    health = backend.call(backend.health.healthz_service_get_healthz)
    if health.multi_user is None:
        raise backend._stranger()
    if health.multi_user:
        backend.namespace = connection.namespace or pod_namespace()
        if backend.namespace is None and needs_namespace:
            raise UserError(
                f"Kubeflow Pipelines at {backend.host} is a multi-user install, and no namespace "
                "is given.",
                "Give the namespace of your profile with --namespace or KFP_NAMESPACE.",
            )
    return backend


def named(name: str, key: str = "display_name") -> str:
    """The filter of list calls for a name.

    Args:
        name: The name.
        key: ``name`` for pipelines and their versions, whose display names users may change.
    """
    predicate = {"operation": "EQUALS", "key": key, "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _found_or_made(find: Callable[[], str | None], make: Callable[[], str]) -> str:
    """The id of what there is, or else is made, by us or by another client at the same time."""
    found = find()
    if found is not None:
        return found
    try:
        return make()
    except ExistsError:
        found = find()
        if found is None:
            raise
        return found


def _message(body: str | None) -> str | None:
    """What the backend, or the Kubernetes API before it, says; None if it is another."""
    try:
        status = json.loads(body or "")
        if "error_message" in status:  # uploads have a form of their own
            return _line(status["error_message"])
        details = status.get("details")
        inner = [each.get("message") for each in details] if isinstance(details, list) else []
        text = next(filter(None, inner), None) or status["message"]
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return _line(text)


def _line(text: object) -> str:
    return " ".join(str(text).split())[:500].rstrip(".")


def _after(message: str | None) -> str:
    return f": {message}" if message else ""


def _innermost(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split()).rstrip(".")
