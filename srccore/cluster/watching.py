"""Follows a list of objects, and the log of a pod, on the API server.

Each runs in its own thread and survives lost connections. A list is read once and then watched; a
watch that ends is resumed from the last version seen, and if that is too old (410), the list is
read again. A log is resumed after the timestamp of its last line.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from srccore.cluster.api import Api, ApiError, Stream

__all__ = ["LogStream", "Mirror"]

WATCH_SECONDS = 60
"""The longest time until the server ends a watch; a dead connection is noticed a little later.
The time is randomised, so that clients that started together do not reconnect together."""
LONGEST_PAUSE = 15.0
_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\S+) ?(.*)", re.DOTALL)


class _Follower(ABC):
    """A thread that follows a stream, and reopens it until it is stopped."""

    def __init__(self, api: Api, path: str) -> None:
        self._api = api
        self._path = path
        self._stopped = threading.Event()
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        name = f"{type(self).__name__} {path}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts following."""
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread, wherever it waits."""
        self._stopped.set()
        with self._lock:
            if self._stream:
                self._stream.end()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            began = time.monotonic()
            lost = False
            try:
                ended = self._follow()
            except ApiError as error:
                lost = True
                ended = self._lost(error)
            if ended:
                return
            held = time.monotonic() - began >= LONGEST_PAUSE
            if held:
                pause = 0.0
            if lost or not held:
                # Many clients of one server must not all reconnect at once.
                pause = min(LONGEST_PAUSE, max(0.5, 2 * pause)) * random.uniform(0.7, 1.0)

    def _open(self, path: str, **query: str) -> Stream:
        stream = self._api.stream(path, **query)
        with self._lock:
            self._stream = stream
            if self._stopped.is_set():
                stream.end()
        return stream

    @abstractmethod
    def _follow(self) -> bool:
        """Follows until the stream ends; returns whether to stop following."""

    @abstractmethod
    def _lost(self, error: ApiError) -> bool:
        """Receives an error; returns whether to stop following."""


class Mirror(_Follower):
    """An up-to-date copy of a list of objects on the API server.

    Args:
        api: The API server.
        path: The path of the list.
        changed: Called after every change, in another thread.
        selectors: ``labelSelector``, ``fieldSelector``.

    Attributes:
        error: Why the copy may be out of date; None while it is being watched.
        is_known: Whether the list has been read at least once.
    """

    def __init__(self, api: Api, path: str, changed: Callable[[], None], **selectors: str) -> None:
        super().__init__(api, path)
        self._changed = changed
        self.selectors = selectors
        self.error: ApiError | None = None
        self.is_known = False
        self._version = ""
        self._objects: dict[str, dict[str, Any]] = {}
        self._gone: list[dict[str, Any]] = []

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The objects, as of the last response of the server."""
        with self._lock:
            return list(self._objects.values())

    def take_gone(self) -> list[dict[str, Any]]:
        """The objects deleted since the last call, in their last state."""
        with self._lock:
            gone, self._gone = self._gone, []
            return gone

    def _follow(self) -> bool:
        if not self._version:
            self._list()
        watch = self._open(
            self._path,
            watch="true",
            resourceVersion=self._version,
            timeoutSeconds=str(random.randint(WATCH_SECONDS * 3 // 4, WATCH_SECONDS)),
            allowWatchBookmarks="true",
            **self.selectors,
        )
        # Report it now: the watch may send nothing for a long time.
        self._report(None)
        with contextlib.closing(watch):
            for line in watch.lines():
                self._apply(line)
        return False

    def _list(self) -> None:
        found = self._api.get(self._path, **self.selectors)
        with self._lock:
            self._objects = {each["metadata"]["uid"]: each for each in found["items"]}
            self.is_known = True
        self._version = found["metadata"]["resourceVersion"]

    def _apply(self, line: str) -> None:
        try:
            event = json.loads(line)
            kind, thing = event["type"], event["object"]
        except (ValueError, KeyError, TypeError):
            raise ApiError(0, "BrokenWatch", "The watch ended in the middle of a line.") from None
        if kind == "ERROR":
            raise ApiError(
                int(thing.get("code", 0)), str(thing.get("reason")), str(thing.get("message"))
            )
        self._version = thing["metadata"]["resourceVersion"]
        if kind == "BOOKMARK":
            return
        uid = thing["metadata"]["uid"]
        with self._lock:
            if kind == "DELETED":
                self._objects.pop(uid, None)
                self._gone.append(thing)
            else:
                self._objects[uid] = thing
        self._changed()

    def _lost(self, error: ApiError) -> bool:
        if error.status == 410:
            self._version = ""
        else:
            self._report(error)
        return False

    def _report(self, error: ApiError | None) -> None:
        self.error = error
        self._changed()


class LogStream(_Follower):
    """The log of a pod's container, line by line, each line once.

    Args:
        api: The API server.
        path: The pod's path.
        uid: The pod's UID: another pod may get its name.
        container: The container's name.
        say: Called with each line, in another thread.
    """

    def __init__(
        self, api: Api, path: str, uid: str, container: str, say: Callable[[str], None]
    ) -> None:
        super().__init__(api, path)
        self._uid = uid
        self._container = container
        self._say = say
        self._last = ""
        self._is_again = False

    def finish(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Waits for the rest of the log of a terminated container, then stops.

        Args:
            seconds: The longest time to wait.
            enough: Whether to stop earlier.
        """
        ends = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < ends and not enough():
            self._thread.join(timeout=0.2)
        self.stop()

    def _follow(self) -> bool:
        if self._is_again and self._pod() is None:
            return True
        self._is_again = True
        since = {"sinceTime": self._last} if self._last else {}
        log = self._open(
            f"{self._path}/log",
            container=self._container,
            follow="true",
            timestamps="true",
            **since,
        )
        with contextlib.closing(log):
            # sinceTime has a resolution of seconds, so the first lines may be known already.
            said = self._last
            for line in log.lines():
                self._pass_on(line, said)
        # The kubelet ends the stream once the container has terminated, a proxy at any time.
        return self._has_ended()

    def _pass_on(self, line: str, said: str) -> None:
        matched = _STAMPED.fullmatch(line)
        stamp, text = matched.groups() if matched else ("", line)
        if matched and stamp <= said:
            return
        self._last = max(self._last, stamp)
        self._say(text)

    def _pod(self) -> dict[str, Any] | None:
        """The pod; None if it is gone, even if another pod has its name now."""
        try:
            pod = self._api.get(self._path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return pod if pod["metadata"]["uid"] == self._uid else None

    def _has_ended(self) -> bool:
        pod = self._pod()
        if pod is None:
            return True
        statuses = pod.get("status", {}).get("containerStatuses", [])
        states = [each["state"] for each in statuses if each["name"] == self._container]
        return bool(states) and "terminated" in states[0]

    def _lost(self, error: ApiError) -> bool:
        if error.status == 403:
            self._say(f"Cannot read the log: {error}")
        # 404: the pod is gone. 400: its container has not started, or its log was removed.
        return error.status in (403, 404)
