"""The Kubernetes API server: plain objects in, plain objects out, one kind of error.

The generated classes of the package ``kubernetes`` support neither PyTorchJobs nor streams that
another thread can close. All that is used of the package is how it finds a cluster and
authenticates to it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from srccore.errors import UserError

__all__ = ["Api", "ApiError", "Stream", "connect", "retried"]

CONNECT_SECONDS = 10
ANSWER_SECONDS = 30
SILENCE_SECONDS = 75
"""A stream without data for this long counts as lost: watches end by themselves before."""
Answer = TypeVar("Answer")
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiError(Exception):
    """An error response of the API server, or no response at all.

    Attributes:
        status: The HTTP status; 0 if there was no response.
        reason: Kubernetes' reason: ``Forbidden``, ``AlreadyExists``.
        message: The message for humans.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        """Keeps the parts of the response."""
        super().__init__(message or reason)
        self.status = status
        self.reason = reason
        self.message = message or reason

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (0, 429) or self.status >= 500


class Stream:
    """Lines that arrive as they are written; another thread may end it."""

    def __init__(self, response: Any) -> None:
        """Takes ownership of a urllib3 response."""
        self._response = response

    def lines(self) -> Iterator[str]:
        """Yields lines without their line ends; the last line may be incomplete.

        Raises:
            ApiError: The connection was lost, or was silent for too long.
        """
        from urllib3.exceptions import HTTPError

        rest = b""
        try:
            # read1 returns what has arrived; stream() would wait for a whole block.
            while block := self._response.read1(2**16):
                *lines, rest = (rest + block).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
        except (HTTPError, OSError, ValueError) as error:
            raise ApiError(0, type(error).__name__, str(error)) from None
        if rest:
            yield rest.decode("utf-8", "replace")

    def end(self) -> None:
        """Stops another thread from waiting for the next line."""
        # close() would break a reader in progress; a finished response has no connection.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._response.shutdown()

    def close(self) -> None:
        """Closes the connection; call it from the thread that reads."""
        self._response.close()


@dataclass(frozen=True)
class Api:
    """Requests to one API server.

    Attributes:
        client: An ``ApiClient`` of the package ``kubernetes``.
        namespace: The namespace of this process.
    """

    client: Any
    namespace: str

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Reads an object or a list.

        Raises:
            ApiError: It was refused, or there was no response.
        """
        return self._whole("GET", path, query)

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Creates an object.

        Raises:
            ApiError: It was refused, or there was no response; then it may exist nonetheless.
        """
        return self._whole("POST", path, {}, body)

    def delete(self, path: str, uid: str) -> None:
        """Deletes an object, and then in the background everything that it owns.

        Args:
            path: The object's path.
            uid: The object's UID: another object of the same name is left alone.

        Raises:
            ApiError: It was refused, or there was no response.
        """
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        self._whole("DELETE", path, {}, body)

    def text(self, path: str, **query: str) -> str:
        """Reads text, such as a log.

        Raises:
            ApiError: It was refused, or there was no response.
        """
        return self._body("GET", path, query).decode("utf-8", "replace")

    def stream(self, path: str, **query: str) -> Stream:
        """Opens a stream: a watch, or a log to follow.

        Raises:
            ApiError: It was refused, or there was no response.
        """
        return Stream(self._open("GET", path, query, None, SILENCE_SECONDS))

    def _whole(
        self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        text = self._body(method, path, query, body)
        try:
            answer = json.loads(text)
        except ValueError:
            raise ApiError(0, "NoJson", f"The response is not JSON: {text[:200]!r}") from None
        return dict(answer)

    def _body(
        self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None = None
    ) -> bytes:
        from urllib3.exceptions import HTTPError

        response = self._open(method, path, query, body, ANSWER_SECONDS)
        try:
            return bytes(response.read())
        except (HTTPError, OSError) as error:
            raise ApiError(0, type(error).__name__, str(error)) from None
        finally:
            response.release_conn()

    def _open(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: dict[str, Any] | None,
        silence: int,
    ) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            return self.client.call_api(
                quote(path),
                method,
                query_params=list(query.items()),
                header_params={"Accept": "application/json, */*"},
                body=body,
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _preload_content=False,
                _request_timeout=(CONNECT_SECONDS, silence),
            )
        except ApiException as error:
            raise _explained(error) from None
        except (HTTPError, OSError) as error:
            raise ApiError(0, type(error).__name__, str(error)) from None


def _sleep(_error: ApiError, seconds: float) -> None:
    time.sleep(seconds)


def retried(
    ask: Callable[[], Answer],
    seconds: float,
    wait: Callable[[ApiError, float], None] = _sleep,
) -> Answer:
    """Repeats a request until it succeeds; an error that is not temporary is raised at once.

    Args:
        ask: Sends the request.
        seconds: How long an outage may last.
        wait: Called between two attempts, with the error and the number of seconds to wait.

    Raises:
        ApiError: The last error.
    """
    ends = time.monotonic() + seconds
    pause = 0.5
    while True:
        try:
            return ask()
        except ApiError as error:
            if not error.is_temporary or time.monotonic() + pause > ends:
                raise
            wait(error, pause)
        pause = min(2 * pause, 15)


def connect() -> Api:
    """Connects to the cluster of the pod that this runs in, or to that of the kubeconfig.

    Raises:
        UserError: There is neither.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    # The caller decides which requests may be repeated.
    settings.retries = False
    try:
        config.load_incluster_config(client_configuration=settings)
        namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError):
        try:
            config.load_kube_config(client_configuration=settings)
            _, active = config.list_kube_config_contexts()
        except (config.ConfigException, OSError) as error:
            raise UserError(
                f"Found no Kubernetes cluster ({' '.join(str(error).split())}).",
                "Run this in a pod with a service account, or set KUBECONFIG to a kubeconfig.",
            ) from None
        namespace = active["context"].get("namespace", "default")
    return Api(client.ApiClient(settings), namespace)


def _explained(error: Any) -> ApiError:
    """The error in a response: the API server sends a Status object."""
    body = error.body
    if body is None and hasattr(error, "http_resp"):
        body = error.http_resp.data
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    try:
        status = json.loads(text)
        return ApiError(int(error.status), str(status["reason"]), str(status["message"]))
    except (ValueError, KeyError, TypeError):
        return ApiError(int(error.status or 0), str(error.reason or ""), text.strip()[:500])
