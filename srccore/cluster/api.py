"""The Kubernetes API server: plain objects in, plain objects out, one kind of error.

The generated classes of the package ``kubernetes`` know neither PyTorchJobs nor streams that can
be closed from another thread; what is used of it is how it finds a cluster and logs in to it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from srccore.errors import UserError

__all__ = ["Api", "ApiError", "Stream", "connect", "retried"]

CONNECT_SECONDS = 10
ANSWER_SECONDS = 30
SILENCE_SECONDS = 75
"""A stream that says nothing for so long counts as lost: watches end by themselves before."""
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class ApiError(Exception):
    """What the API server answered instead, or that it did not.

    Attributes:
        status: Of HTTP; 0 where there was no answer.
        reason: In Kubernetes' words: ``Forbidden``, ``AlreadyExists``.
        message: For people.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        """Keeps what was answered."""
        super().__init__(message or reason)
        self.status = status
        self.reason = reason
        self.message = message or reason

    @property
    def passes(self) -> bool:
        """Whether the same request may go well later."""
        return self.status in (0, 429) or self.status >= 500


class Stream:
    """Lines that come as they are made; another thread may end it."""

    def __init__(self, response: Any) -> None:
        """Takes over a response of urllib3."""
        self._response = response

    def lines(self) -> Iterator[str]:
        """Yields lines, without their ends; a last one may lack its end.

        Raises:
            ApiError: The connection was lost, or said nothing for too long.
        """
        from urllib3.exceptions import HTTPError

        rest = b""
        try:
            # read1 gives what is there; stream() would wait for a whole block.
            while block := self._response.read1(2**16):
                *lines, rest = (rest + block).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in lines)
        except (HTTPError, OSError, ValueError) as error:
            raise ApiError(0, type(error).__name__, str(error)) from None
        if rest:
            yield rest.decode("utf-8", "replace")

    def end(self) -> None:
        """Has another thread, which waits for the next line, wait no more."""
        # Closing what is being read breaks the reader; what has been read has no connection.
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            self._response.shutdown()

    def close(self) -> None:
        """Closes the connection; for the thread that reads."""
        self._response.close()


@dataclass(frozen=True)
class Api:
    """Requests to one API server.

    Attributes:
        client: An ``ApiClient`` of the package ``kubernetes``.
        namespace: The one that this process belongs to.
    """

    client: Any
    namespace: str

    def get(self, path: str, **query: str) -> dict[str, Any]:
        """Reads an object or a list.

        Raises:
            ApiError: It was refused, or nothing was answered.
        """
        return self._whole("GET", path, query)

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Creates an object.

        Raises:
            ApiError: It was refused, or nothing was answered: then it may have been made.
        """
        return self._whole("POST", path, {}, body)

    def delete(self, path: str, uid: str) -> None:
        """Deletes an object, and all that it owns after it.

        Args:
            path: Of the object.
            uid: Its own: another one of the same name stays.

        Raises:
            ApiError: It was refused, or nothing was answered.
        """
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        self._whole("DELETE", path, {}, body)

    def text(self, path: str, **query: str) -> str:
        """Reads a text, such as a log.

        Raises:
            ApiError: It was refused, or nothing was answered.
        """
        return self._body("GET", path, query).decode("utf-8", "replace")

    def stream(self, path: str, **query: str) -> Stream:
        """Opens a stream: a watch, or a log that is followed.

        Raises:
            ApiError: It was refused, or nothing was answered.
        """
        return Stream(self._open("GET", path, query, None, SILENCE_SECONDS))

    def _whole(
        self, method: str, path: str, query: dict[str, str], body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        text = self._body(method, path, query, body)
        try:
            answer = json.loads(text)
        except ValueError:
            raise ApiError(0, "NoJson", f"The answer is no JSON: {text[:200]!r}") from None
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


def retried(
    ask: Callable[[], dict[str, Any]], seconds: float, wait: Callable[[ApiError, float], None]
) -> dict[str, Any]:
    """Asks until there is an answer; one that does not pass is raised at once.

    Args:
        ask: The request.
        seconds: How long an outage may last.
        wait: Told of an error, and for how many seconds to wait until the next try.

    Raises:
        ApiError: The last one.
    """
    ends = time.monotonic() + seconds
    pause = 0.5
    while True:
        try:
            return ask()
        except ApiError as error:
            if not error.passes or time.monotonic() + pause > ends:
                raise
            wait(error, pause)
        pause = min(2 * pause, 15)


def connect() -> Api:
    """Finds the cluster: that of the pod that this runs in, or that of the kubeconfig.

    Raises:
        UserError: There is neither.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    # Which requests may be repeated is for the caller to say.
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
                f"There is no cluster to talk to ({' '.join(str(error).split())}).",
                "Run this in a pod with a service account, or name a kubeconfig by KUBECONFIG.",
            ) from None
        namespace = active["context"].get("namespace", "default")
    return Api(client.ApiClient(settings), namespace)


def _explained(error: Any) -> ApiError:
    """What a refusal says of itself: the API server sends a Status object."""
    body = error.body
    if body is None and hasattr(error, "http_resp"):
        body = error.http_resp.data
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body or "")
    try:
        status = json.loads(text)
        return ApiError(int(error.status), str(status["reason"]), str(status["message"]))
    except (ValueError, KeyError, TypeError):
        return ApiError(int(error.status or 0), str(error.reason or ""), text.strip()[:500])
