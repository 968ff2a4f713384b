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

__all__ = ["Backend", "ExistsError", "MissingError", "UnavailableError", "connect"]

TIMEOUT = (10, 60)
"""Seconds to connect, and to wait for a response."""
PAGE = 100
"""Entries per page; the backend returns at most 200."""


class UnavailableError(UserError):
    """The backend is not responding, but may respond later."""


class MissingError(UserError):
    """The backend does not have the requested object."""


class ExistsError(UserError):
    """The backend already has an object of this name."""


class Backend:
    """A Kubeflow Pipelines backend.

    Args:
        client: The API client, with host and credentials.
        ui: What links to the UI start with.
        credential: What to call the user's credential in messages; None without one.
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
        """Sends one request.

        Args:
            method: A method of one of the services.
            arguments: Its arguments.

        Returns:
            The model that the method returns.

        Raises:
            UnavailableError: There is no response, or a server error.
            UserError: The request is rejected, or the host is not Kubeflow Pipelines.
        """
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = method(**arguments, _request_timeout=TIMEOUT)
            # The client reads an HTML page as a model without fields.
            json.loads(self.client.last_response.data)
        except ApiException as error:
            raise self._refused(error) from None
        except HTTPError as error:
            raise self._unreachable(error) from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise self._not_kubeflow() from None
        return answer

    def pages(self, method: Callable[..., Any], field: str, **arguments: Any) -> Iterator[Any]:
        """Lists entries, page by page.

        Args:
            method: A ``..._list_...`` method of one of the services.
            field: The field of the response that has the list.
            arguments: Its arguments.
        """
        token = ""
        while True:
            page = self.call(method, page_size=PAGE, page_token=token, **arguments)
            yield from getattr(page, field) or ()
            token = page.next_page_token or ""
            if not token:
                return

    def named(
        self, name: str, key: str, method: Callable[..., Any], field: str, **where: Any
    ) -> Iterator[Any]:
        """Lists the entries with a name.

        Args:
            name: The name.
            key: ``name`` for pipelines and their versions, since users can change display names;
                otherwise ``display_name``.
            method: A ``..._list_...`` method of one of the services.
            field: The field of the response that has the list.
            where: Further arguments of the method.
        """
        predicate = {"operation": "EQUALS", "key": key, "stringValue": name}
        found = self.pages(method, field, filter=json.dumps({"predicates": [predicate]}), **where)
        return (each for each in found if getattr(each, key) == name)

    def experiment(self, name: str) -> str | None:
        """The ID of the experiment with this name, or None."""
        where = {"namespace": self.namespace}
        method = self.experiments.experiment_service_list_experiments
        found = self.named(name, "display_name", method, "experiments", **where)
        return next((each.experiment_id for each in found), None)

    def create_experiment(self, name: str) -> str:
        """The ID of the experiment with this name, which is created if missing."""
        from kfp_server_api import V2beta1Experiment

        def create() -> str:
            body = V2beta1Experiment(display_name=name, namespace=self.namespace)
            made = self.call(self.experiments.experiment_service_create_experiment, experiment=body)
            return str(made.experiment_id)

        return _find_or_create(lambda: self.experiment(name), create)

    def create_pipeline(self, name: str) -> str:
        """The ID of the pipeline with this name, which is created without versions if missing."""
        from kfp_server_api import V2beta1Pipeline

        def find() -> str | None:
            method = self.pipelines.pipeline_service_list_pipelines
            found = self.named(name, "name", method, "pipelines", namespace=self.namespace)
            return next((each.pipeline_id for each in found), None)

        def create() -> str:
            # Uploading a pipeline would also create a version, named after the pipeline.
            body = V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
            made = self.call(self.pipelines.pipeline_service_create_pipeline, pipeline=body)
            return str(made.pipeline_id)

        return _find_or_create(find, create)

    def create_version(self, pipeline_id: str, name: str, text: str) -> str:
        """The ID of a pipeline's version with this name, which is uploaded if missing.

        Args:
            pipeline_id: The pipeline.
            name: The version's name.
            text: The compiled pipeline, in YAML.
        """

        def find() -> str | None:
            method = self.pipelines.pipeline_service_list_pipeline_versions
            found = self.named(name, "name", method, "pipeline_versions", pipeline_id=pipeline_id)
            return next((each.pipeline_version_id for each in found), None)

        def upload() -> str:
            with tempfile.TemporaryDirectory() as folder:
                # The backend recognizes YAML by the file name's extension.
                file = Path(folder, "pipeline.yaml")
                file.write_text(text, encoding="utf-8")
                made = self.call(
                    self.uploads.upload_pipeline_version,
                    uploadfile=str(file),
                    name=name,
                    pipelineid=pipeline_id,
                )
            return str(made.pipeline_version_id)

        return _find_or_create(find, upload)

    def version_spec(self, reference: Any) -> Any:
        """The pipeline of a version. A version never changes, so it is requested only once.

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
        """The address of a run in the UI."""
        return f"{self.ui}/#/runs/details/{run_id}"

    def schedule_url(self, recurring_run_id: str) -> str:
        """The address of a recurring run in the UI."""
        return f"{self.ui}/#/recurringrun/details/{recurring_run_id}"

    def version_url(self, reference: Any) -> str:
        """The address in the UI of the version of a ``V2beta1PipelineVersionReference``."""
        return (
            f"{self.ui}/#/pipelines/details/{reference.pipeline_id}"
            f"/version/{reference.pipeline_version_id}"
        )

    def _refused(self, error: Any) -> UserError:
        message = _message(error.body)
        if error.status in (401, 403):
            reason = "requires authentication" if error.status == 401 else "denies access"
            return UserError(
                f"Kubeflow Pipelines at {self.host} {reason} ({error.status}{_after(message)}).",
                self._credential_fix(),
            )
        if 300 <= error.status < 400:
            return self._redirected((error.headers or {}).get("Location") or "")
        if error.status >= 500 or error.status in (408, 429):
            return UnavailableError(
                f"Kubeflow Pipelines at {self.host} failed to handle the request "
                f"({error.status}{_after(message)}).",
                "Try again later. See the logs of the deployment ml-pipeline for details.",
            )
        if message is None:
            return self._not_kubeflow()
        return self._denied(error.status, message)

    def _denied(self, status: int, message: str) -> UserError:
        if status == 409:
            return ExistsError(
                f"Kubeflow Pipelines at {self.host} already has an object of this name: {message}.",
                "Try again: another client may be creating it at the same time.",
            )
        if status == 404:
            return MissingError(
                f"Kubeflow Pipelines at {self.host} has no such object (404): {message}.",
                "List the runs with srccore runs list.",
            )
        return UserError(
            f"Kubeflow Pipelines at {self.host} rejected the request ({status}): {message}.",
            "Fix what the message names, and check that its version is 2.15 or later.",
        )

    def _redirected(self, location: str) -> UserError:
        target, here = urlsplit(location), urlsplit(self.host)
        where = f"{target.scheme}://{target.netloc}" if target.netloc else target.path
        is_same = here.hostname == target.hostname
        if is_same and (here.scheme, target.scheme) == ("http", "https"):
            return UserError(f"{self.host} only accepts HTTPS.", f"Pass --host {where}.")
        return UserError(
            f"{self.host} redirects to {where}, which seems to be a login page.",
            self._credential_fix(),
        )

    def _unreachable(self, error: Any) -> UserError:
        from urllib3.exceptions import LocationValueError, SSLError

        if isinstance(error, LocationValueError):
            return UserError(
                f"The host {self.host} is not a valid address.", "Pass --host https://NAME[:PORT]."
            )
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, SSLError):
            return UserError(
                f"The TLS connection to {self.host} failed: {_innermost(reason)}.",
                "Pass the certificates of its authority with --ca-bundle. If it only accepts plain "
                "HTTP, pass --host http://...",
            )
        return UnavailableError(
            f"{self.host} is not responding: {_innermost(reason)}.",
            f"Check the address, or forward a port: {FORWARD}.",
        )

    def _not_kubeflow(self) -> UserError:
        return UserError(
            f"{self.host} does not respond like Kubeflow Pipelines 2.",
            "Pass the address at which /apis/v2beta1/healthz responds, such as "
            "https://kubeflow.example.org/pipeline. If a browser shows a login page there: "
            + self._credential_fix(),
        )

    def _credential_fix(self) -> str:
        if self.credential:
            return f"Renew {self.credential}. If it is still valid, ask for the permissions."
        return (
            "Pass a token with --token-file or KFP_TOKEN, cookies with --cookies-file or "
            "KFP_COOKIES, or the user with --user-header."
        )


def connect(connection: Connection, *, needs_namespace: bool = True) -> Backend:
    """Connects to a backend and checks its health.

    Args:
        connection: How to reach it.
        needs_namespace: Whether the requests that follow need a namespace on a multi-user
            installation.

    Returns:
        The backend. It has a namespace only on a multi-user installation.

    Raises:
        UserError: The backend cannot be reached, denies access, or is not Kubeflow Pipelines.
    """
    client, ui, credential = open_client(connection)
    # Its warnings repeat our errors.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    backend = Backend(client, ui, credential)
    health = backend.call(backend.health.healthz_service_get_healthz)
    if health.multi_user is None:
        raise backend._not_kubeflow()
    if health.multi_user:
        backend.namespace = connection.namespace or pod_namespace()
        if backend.namespace is None and needs_namespace:
            raise UserError(
                f"Kubeflow Pipelines at {backend.host} is a multi-user installation, and no "
                "namespace is set.",
                "Pass the namespace of your profile with --namespace or KFP_NAMESPACE.",
            )
    return backend


def _find_or_create(find: Callable[[], str | None], create: Callable[[], str]) -> str:
    """The ID of an existing object, or of one that we or another client just created."""
    found = find()
    if found is not None:
        return found
    try:
        return create()
    except ExistsError:
        found = find()
        if found is None:
            raise
        return found


def _message(body: str | None) -> str | None:
    """The message of the backend, or of the Kubernetes API; None if it is another server's."""
    try:
        status = json.loads(body or "")
        if "error_message" in status:  # the form of uploads
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
