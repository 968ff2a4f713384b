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
from srccore.shown import has_credentials

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
    """How to reach the backend. A token or cookies can also come from the environment.

    Args:
        host: The address of the API, or of the UI, which forwards API requests.
        namespace: The profile's namespace; only multi-user installations have one.
        token_file: A file with a bearer token, read for every request; default: ``KFP_TOKEN``.
        cookies_file: A file with the value of a ``Cookie`` header; default: ``KFP_COOKIES``.
        user_header: ``NAME=VALUE``, the header that identifies the user, such as
            ``kubeflow-userid=ann@x.org``.
        ca_bundle: A PEM file of certificates to trust instead of the public ones.
        ui_url: What links to the UI start with; default: the host.
    """

    host: str | None = None
    namespace: str | None = None
    token_file: Path | None = None
    cookies_file: Path | None = None
    user_header: str | None = None
    ca_bundle: Path | None = None
    ui_url: str | None = None

    def options(self) -> str:
        """The command-line options of this connection, quoted for a shell."""
        given = {
            f"--{each.name.replace('_', '-')}": getattr(self, each.name) for each in fields(self)
        }
        return "".join(f" {name} {shlex.quote(str(v))}" for name, v in given.items() if v)


def open_client(connection: Connection) -> tuple[ApiClient, str, str | None]:
    """Creates the client that sends the requests, without sending one.

    Args:
        connection: How to reach the backend.

    Returns:
        The client, what links to the UI start with, and what to call the credential in messages
        (None without a credential).

    Raises:
        UserError: No host is known, or a credential or certificate cannot be read.
    """
    from kfp_server_api import ApiClient, Configuration
    from urllib3 import Retry

    configuration = Configuration()
    # One attempt: callers that can wait retry on their own, and a redirect is an answer.
    configuration.retries = Retry(total=0, redirect=0, raise_on_redirect=False)
    configuration.ssl_ca_cert = _ca_bundle(connection.ca_bundle)
    ui = "/pipeline"
    token = connection.token_file
    if connection.host is not None:
        configuration.host = ui = _address(connection.host)
    elif os.environ.get("KUBERNETES_SERVICE_HOST"):
        configuration.host = IN_CLUSTER_HOST
        pod_token = Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or POD_TOKEN)
        # Single-user installations mount no token.
        if token is None and pod_token.exists():
            token = pod_token
    else:
        _load_kubeconfig(configuration)
    credential = _set_token(configuration, token)
    cookies = _secret(connection.cookies_file, "cookies", "KFP_COOKIES")
    client = ApiClient(configuration, cookie=cookies)
    if cookies is not None:
        credential = credential or "the cookies"
    if connection.user_header is not None:
        client.set_default_header(*_header(connection.user_header))
        credential = credential or "the user of --user-header"
    return client, _address(connection.ui_url) if connection.ui_url else ui, credential


def pod_namespace() -> str | None:
    """The namespace of the pod that this process runs in; None outside a pod."""
    try:
        return POD_NAMESPACE.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _address(text: str) -> str:
    """An address without the fragment that a browser shows; https if it has no scheme."""
    address = text.partition("#")[0].rstrip("/")
    if not address.startswith(("http://", "https://")):
        address = f"https://{address}"
    if has_credentials(address):
        raise UserError(
            f"The address {address} has a user name or password in it, which links and commands "
            "would repeat.",
            "Pass a token or cookies, by --token-file or --cookies-file.",
        )
    return address


def _load_kubeconfig(configuration: Configuration) -> None:
    from kubernetes import config

    try:
        config.load_kube_config(
            config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration
        )
    except (config.ConfigException, OSError, ValueError):
        raise UserError(
            "No Kubeflow Pipelines host is set, this is not a pod, and no kubeconfig has a "
            "current context.",
            f"Pass --host or set KFP_HOST. If it has no address of its own: {FORWARD}.",
        ) from None
    host = configuration.host = configuration.host.rstrip("/") + PROXY_PATH
    renew = configuration.refresh_api_key_hook
    if renew is not None:

        def refresh(target: Configuration) -> None:
            # It renews an expired token, and resets everything else to the kubeconfig's values.
            renew(target)
            target.host = host
            target.refresh_api_key_hook = refresh

        configuration.refresh_api_key_hook = refresh


def _set_token(configuration: Configuration, file: Path | None) -> str | None:
    """Adds the token to requests; returns what to call it, or None without a token."""
    token = _secret(file, "token", "KFP_TOKEN")
    if token is None:
        return "the kubeconfig's user" if "authorization" in configuration.api_key else None

    def refresh(target: Configuration) -> None:
        target.api_key["authorization"] = _secret(file, "token", "KFP_TOKEN")

    configuration.api_key["authorization"] = token
    configuration.api_key_prefix["authorization"] = "Bearer"
    # Projected tokens expire after an hour, and runs take days.
    configuration.refresh_api_key_hook = refresh
    return f"the token in {file or 'KFP_TOKEN'}"


def _header(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    is_name = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    if not (is_name and value and value.isascii() and value.isprintable()):
        raise UserError(
            f"--user-header {text!r} is not of the form NAME=VALUE.",
            "Use the form --user-header kubeflow-userid=ann@example.org.",
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
            f"--ca-bundle {path} has no readable certificates.", "Pass a PEM file."
        ) from None
    return str(path)


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(
            f"The {what} file {path} cannot be read: {reason}.",
            "Fix it, or pass another file.",
        ) from None


def _secret(file: Path | None, what: str, variable: str) -> str | None:
    """The secret in a file, or else in an environment variable; None if there is neither."""
    if file is not None:
        text, where = _read(file, what), f"The {what} file {file}"
    elif os.environ.get(variable):
        text, where = os.environ[variable], variable
    else:
        return None
    secret = text.strip()
    # The HTTP library would quote anything else in its error, which is printed.
    if not (secret and secret.isascii() and secret.isprintable()):
        raise UserError(
            f"{where} is not a single line of printable ASCII characters.",
            "It must contain only the token, or only the cookies as NAME=VALUE; NAME=VALUE.",
        )
    return secret
