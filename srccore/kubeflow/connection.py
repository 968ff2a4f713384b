"""How a Kubeflow Pipelines backend is found, and what every request to it carries.

Host and token are found where ``kfp.Client`` finds them: the ones given, else, inside a pod, the
cluster's service with the pod's projected token, else the Kubernetes API's proxy of the current
kubeconfig. Tokens and cookies are read from files or the environment, and are never part of a
message.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from srccore.errors import UserError

if TYPE_CHECKING:
    from kfp_server_api import ApiClient, Configuration

__all__ = ["FORWARD", "Connection", "open_client", "pod_namespace"]

FORWARD = (
    "kubectl port-forward --namespace kubeflow service/ml-pipeline-ui 8080:80, "
    "then --host http://localhost:8080"
)
IN_CLUSTER_HOST = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
PROXY_PATH = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


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
            f"--{each.name.replace('_', '-')}": getattr(self, each.name) for each in fields(self)
        }
        return "".join(f" {name} {shlex.quote(str(v))}" for name, v in given.items() if v)


def open_client(connection: Connection) -> tuple[ApiClient, str, str | None]:
    """Makes the client that sends the requests; nothing is sent yet.

    Args:
        connection: What the user says.

    Returns:
        The client, what links to the UI begin with, and what to call the credential in messages;
        None if there is none.

    Raises:
        UserError: There is no host, or a credential or certificate cannot be read.
    """
    from kfp_server_api import ApiClient

    configuration, ui, credential = _configure(connection)
    cookies = _cookies(connection)
    client = ApiClient(configuration, cookie=cookies)
    if connection.user_header is not None:
        client.set_default_header(*_header(connection.user_header))
    if credential is None and cookies is not None:
        credential = "the cookies"
    if credential is None and connection.user_header is not None:
        credential = "the user of --user-header"
    return client, ui, credential


def pod_namespace() -> str | None:
    """The namespace of the pod that this runs in; None outside a pod."""
    try:
        return POD_NAMESPACE.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


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
    import ssl

    if path is None:
        return None
    try:
        ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError):
        raise UserError(
            f"--ca-bundle {path} holds no certificates that can be read.", "Give a PEM file."
        ) from None
    return str(path)


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
