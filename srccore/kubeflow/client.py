"""The connection to a Kubeflow Pipelines backend: where it is, who asks, what its refusals mean.

Host and token are found where ``kfp.Client`` finds them: as given, else inside a pod the service
of the cluster with the pod's projected token, else the Kubernetes API's proxy of the current
kubeconfig. The calls go through `kfp_server_api`, on which ``kfp.Client`` itself stands, since
that one writes to the user's home, asks a wrong host again for most of a minute and prints.

Assumes the v2beta1 REST API of Kubeflow Pipelines 2.15 or later. Tokens and cookies are read from
files or the environment, and are never part of a message.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import ssl
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from srccore.errors import UserError

if TYPE_CHECKING:
    from kfp_server_api import ApiClient, Configuration

__all__ = [
    "Backend",
    "Connection",
    "ExistsError",
    "MissingError",
    "UnavailableError",
    "connect",
    "named",
]

FORWARD = (
    "kubectl port-forward --namespace kubeflow service/ml-pipeline-ui 8080:80, "
    "then --host http://localhost:8080"
)
IN_CLUSTER_HOST = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
PROXY_PATH = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
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


@dataclass(frozen=True)
class Connection:
    """What a user says of the backend. The environment gives a token or cookies besides.

    Args:
        host: Address of the API or of the UI, which passes the API on.
        namespace: The profile's namespace; multi-user installs alone have one.
        token_file: A file with a bearer token, read anew for every request; else ``KFP_TOKEN``.
        cookies_file: A file with the line of a ``Cookie`` header; else ``KFP_COOKIES``.
        user_header: ``NAME=VALUE``, the header that names the user: ``kubeflow-userid=ann@x.org``.
        ca_bundle: Certificates to trust in place of the public ones, in PEM.
        ui_url: What links begin with; the host where not given.
    """

    host: str | None = None
    namespace: str | None = None
    token_file: Path | None = None
    cookies_file: Path | None = None
    user_header: str | None = None
    ca_bundle: Path | None = None
    ui_url: str | None = None

    def options(self) -> str:
        """The options that make this connection again, to be pasted into a shell."""
        given = {
            "--host": self.host,
            "--namespace": self.namespace,
            "--token-file": self.token_file,
            "--cookies-file": self.cookies_file,
            "--user-header": self.user_header,
            "--ca-bundle": self.ca_bundle,
            "--ui-url": self.ui_url,
        }
        return "".join(f" {name} {shlex.quote(str(v))}" for name, v in given.items() if v)


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
    from kfp_server_api import ApiClient

    configuration, ui, credential = _configure(connection)
    # Its warnings say what our errors say.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    cookies = _cookies(connection)
    client = ApiClient(configuration, cookie=cookies)
    if connection.user_header is not None:
        client.set_default_header(*_header(connection.user_header))
    if credential is None and cookies is not None:
        credential = "the cookies"
    if credential is None and connection.user_header is not None:
        credential = "the user of --user-header"
    backend = Backend(client, ui, credential)
    health = backend.call(backend.health.healthz_service_get_healthz)
    if health.multi_user is None:
        raise backend._stranger()
    if health.multi_user:
        backend.namespace = connection.namespace or _pod_namespace()
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


def _configure(connection: Connection) -> tuple[Configuration, str, str | None]:
    """Configuration, what links begin with, and a name for the token."""
    from kfp_server_api import Configuration
    from urllib3 import Retry

    configuration = Configuration()
    # One attempt: whoever can wait asks again, and a redirect is an answer.
    configuration.retries = Retry(total=0, redirect=0, raise_on_redirect=False)
    configuration.ssl_ca_cert = _ca_bundle(connection.ca_bundle)
    ui = "/pipeline"
    token: Path | None = None
    if connection.host is not None:
        configuration.host = ui = _address(connection.host)
    elif os.environ.get("KUBERNETES_SERVICE_HOST"):
        configuration.host = IN_CLUSTER_HOST
        token = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or POD_TOKEN)
        # A single-user install mounts none.
        token = token if token.exists() else None
    else:
        _load_kubeconfig(configuration)
    credential = _set_token(configuration, connection.token_file or token)
    return configuration, _address(connection.ui_url) if connection.ui_url else ui, credential


def _address(text: str) -> str:
    """An address without what a browser's line has more; https where no scheme is given."""
    address = text.partition("#")[0].rstrip("/")
    return address if address.startswith(("http://", "https://")) else f"https://{address}"


def _load_kubeconfig(configuration: Configuration) -> None:
    from kubernetes import config

    try:
        config.load_kube_config(
            config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration
        )
    except (config.ConfigException, OSError, ValueError):
        raise UserError(
            "No host of Kubeflow Pipelines is given, this is no pod, and there is no kubeconfig "
            "with a current context.",
            f"Give --host or KFP_HOST; without an address of its own: {FORWARD}.",
        ) from None
    host = configuration.host = configuration.host.rstrip("/") + PROXY_PATH
    renew = configuration.refresh_api_key_hook
    if renew is not None:

        def refresh(target: Configuration) -> None:
            # It renews a token that has expired, and sets all else back to the kubeconfig's.
            renew(target)
            target.host = host
            target.refresh_api_key_hook = refresh

        configuration.refresh_api_key_hook = refresh


def _set_token(configuration: Configuration, file: Path | None) -> str | None:
    """Lets requests carry the token; returns what to call it, None if there is none."""
    if file is not None:

        def refresh(target: Configuration) -> None:
            token = _secret(_read(file, "token"), f"The token file {file}")
            target.api_key["authorization"] = token

        refresh(configuration)
        # Projected tokens live an hour, runs live days.
        configuration.refresh_api_key_hook = refresh
        configuration.api_key_prefix["authorization"] = "Bearer"
        return f"the token in {file}"
    if os.environ.get("KFP_TOKEN"):
        token = _secret(os.environ["KFP_TOKEN"], "KFP_TOKEN")
        configuration.refresh_api_key_hook = None
        configuration.api_key["authorization"] = token
        configuration.api_key_prefix["authorization"] = "Bearer"
        return "the token in KFP_TOKEN"
    return "the kubeconfig's user" if "authorization" in configuration.api_key else None


def _cookies(connection: Connection) -> str | None:
    if connection.cookies_file is not None:
        text = _read(connection.cookies_file, "cookies")
        return _secret(text, f"The cookies file {connection.cookies_file}")
    given = os.environ.get("KFP_COOKIES")
    return _secret(given, "KFP_COOKIES") if given else None


def _header(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    is_name = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    if not (is_name and value and value.isascii() and value.isprintable()):
        raise UserError(
            f"--user-header {text!r} is not of the form NAME=VALUE.",
            "Write --user-header kubeflow-userid=ann@example.org.",
        )
    return name, value


def _ca_bundle(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError):
        raise UserError(
            f"--ca-bundle {path} holds no certificates that can be read.", "Give a PEM file."
        ) from None
    return str(path)


def _pod_namespace() -> str | None:
    try:
        return POD_NAMESPACE.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(
            f"The {what} file {path} cannot be read: {reason}.", "Give another."
        ) from None


def _secret(text: str, where: str) -> str:
    secret = text.strip()
    # Anything else would end up in the error of the HTTP library, and so on the screen.
    if not (secret and secret.isascii() and secret.isprintable()):
        raise UserError(
            f"{where} does not hold one line of plain characters.",
            "Write the token, or the cookies as NAME=VALUE; NAME=VALUE, and nothing else.",
        )
    return secret


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
