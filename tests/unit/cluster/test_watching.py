"""Following lists and logs over connections that fail, against a server that fails on request."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster.processes import wait_until
from cluster.proxy import Exchange, Fault, Proxy, answer, drop, error_event, lines
from kubernetes import client

from srccore.cluster.api import Api, ApiError, retried
from srccore.cluster.watching import LogStream, Mirror

Object = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

LIST = "/api/v1/namespaces/ns/pods"
POD = f"{LIST}/pod"
LEAST_PAUSE = 0.35
"""The shortest pause between two attempts that watching.py may draw, in seconds."""


@pytest.fixture
def server() -> Iterator[Proxy]:
    with Proxy() as it:
        yield it


@pytest.fixture
def api(server: Proxy) -> Api:
    settings = client.Configuration()
    settings.host, settings.retries = server.url, False
    return Api(client.ApiClient(settings), "ns")


def says(body: Object) -> Fault:
    return lambda exchange: exchange.answer(200, json.dumps(body).encode())


def broken(*texts: str, rest: str = "") -> Fault:
    """A stream that is cut after some lines, perhaps in the middle of one."""

    def fault(exchange: Exchange) -> None:
        exchange.begin()
        for text in texts:
            exchange.line(f"{text}\n".encode())
        if rest:
            exchange.line(rest.encode())
        exchange.drop()

    return fault


def pod(name: str = "pod", uid: str = "a", version: int = 1, **state: Object) -> Object:
    status = {"containerStatuses": [{"name": "pytorch", "state": state}]}
    return {
        "metadata": {"name": name, "uid": uid, "resourceVersion": str(version)},
        "status": status,
    }


def event(kind: str, thing: Object) -> str:
    return json.dumps({"type": kind, "object": thing})


# A list


class Watch:
    """A watch that a test feeds with lines; it stays open until the test ends it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.changed = threading.Condition()
        self.ended = False

    def say(self, *lines: str, end: bool = False) -> None:
        with self.changed:
            self.said += lines
            self.ended = end
            self.changed.notify_all()

    def __call__(self, exchange: Exchange) -> None:
        exchange.begin()
        told = 0
        while True:
            with self.changed:
                while len(self.said) == told and not self.ended:
                    self.changed.wait(30)
                new, told, ended = self.said[told:], len(self.said), self.ended
            for line in new:
                exchange.line(f"{line}\n".encode())
            if ended:
                exchange.end()
                return


@pytest.fixture
def listed(server: Proxy) -> None:
    found = {"metadata": {"resourceVersion": "10"}, "items": [pod("one"), pod("two", "b")]}
    server.add(says(found), path=f"{LIST}$")


@pytest.fixture
def watch(server: Proxy, listed: None) -> Watch:
    it = Watch()
    server.add(it, path=f"{LIST}$", watch="true")
    return it


Follows = Callable[..., Mirror]


@pytest.fixture
def follows(api: Api) -> Iterator[Follows]:
    begun: list[Mirror] = []

    def follow(changed: Callable[[], None] = lambda: None) -> Mirror:
        begun.append(Mirror(api, LIST, changed, labelSelector="job=x"))
        begun[-1].start()
        return begun[-1]

    yield follow
    for mirror in begun:
        mirror.stop()


def names(mirror: Mirror) -> list[str]:
    return sorted(each["metadata"]["name"] for each in mirror.objects)


def test_a_mirror_has_what_the_list_has_and_what_the_watch_adds(
    server: Proxy, watch: Watch, follows: Follows
) -> None:
    mirror = follows()
    wait_until("the list is known", lambda: mirror.is_known)
    assert names(mirror) == ["one", "two"]
    watch.say(event("ADDED", pod("three", "c", 11)), event("DELETED", pod("one", version=12)))
    wait_until("the watch is applied", lambda: names(mirror) == ["three", "two"])
    assert [each["metadata"]["resourceVersion"] for each in mirror.take_gone()] == ["12"]
    assert mirror.take_gone() == []
    asked = [each.query for each in server.requests]
    assert [each["labelSelector"] for each in asked] == ["job=x", "job=x"]
    assert asked[1]["resourceVersion"] == "10"


def test_a_watch_goes_on_from_the_last_version(
    server: Proxy, watch: Watch, follows: Follows
) -> None:
    mirror = follows()
    bookmark = {"kind": "Pod", "metadata": {"resourceVersion": "20"}}
    watch.say(event("MODIFIED", pod("one", version=15)), event("BOOKMARK", bookmark), end=True)
    wait_until("it is watched again", lambda: server.count(watch="true", resourceVersion="20") > 0)
    assert server.count(path=f"{LIST}$") - server.count(watch="true") == 1
    assert names(mirror) == ["one", "two"]


@pytest.mark.parametrize(
    "gone", [error_event(410, "Expired"), answer(410, "Gone", "too old resource version")]
)
def test_a_version_that_is_too_old_leads_to_the_list(
    gone: Fault, server: Proxy, watch: Watch, follows: Follows
) -> None:
    server.add(gone, path=f"{LIST}$", times=1, watch="true")
    mirror = follows()
    wait_until("it is watched again", lambda: server.count(watch="true") == 2)
    assert server.count(path=f"{LIST}$") == 4
    assert mirror.error is None


@pytest.mark.parametrize(
    "fault",
    [
        answer(500, "InternalError", "etcdserver: leader changed"),
        drop,
        error_event(500, "InternalError"),
        broken(event("MODIFIED", pod("one", version=11)), rest='{"type": "DELE'),
        broken(),
        lines('{"type": "DELE'),
    ],
)
def test_an_error_is_told_and_forgotten_once_a_watch_is_open_again(
    fault: Fault, server: Proxy, watch: Watch, follows: Follows
) -> None:
    errors = []
    known = threading.Event()

    def changed() -> None:
        known.wait()
        errors.append(mirror.error)

    server.add(fault, path=f"{LIST}$", times=1, watch="true")
    mirror = follows(changed)
    known.set()
    wait_until("there is an error", lambda: any(errors))
    wait_until("it is forgotten", lambda: mirror.error is None)
    # No other error is reported, and no object is lost.
    assert names(mirror) == ["one", "two"]
    assert server.count(watch="true") == 2
    assert server.count(path=f"{LIST}$") == 3


def test_a_list_that_is_refused_is_not_known(server: Proxy, follows: Follows) -> None:
    server.add(answer(403, "Forbidden", "cannot list"), path=f"{LIST}$")
    mirror = follows()
    wait_until("it is refused", lambda: mirror.error is not None)
    assert mirror.error is not None
    assert (mirror.error.status, mirror.error.reason) == (403, "Forbidden")
    assert not mirror.error.is_temporary
    assert not mirror.is_known


def test_a_watch_that_ends_at_once_is_not_asked_for_at_once(
    server: Proxy, listed: None, follows: Follows
) -> None:
    server.add(lines(), path=f"{LIST}$", watch="true")
    follows()
    wait_until("it is asked three times", lambda: server.count(watch="true") >= 3)
    times = [each.at for each in server.requests if "watch" in each.query]
    assert min(b - a for a, b in itertools.pairwise(times)) >= LEAST_PAUSE


def test_a_mirror_is_stopped_while_it_waits(watch: Watch, follows: Follows) -> None:
    mirror = follows()
    wait_until("the list is known", lambda: mirror.is_known)
    mirror.stop()
    assert not mirror._thread.is_alive()


# A log


def stamped(seconds: int, nanoseconds: int, text: str) -> str:
    return f"2026-03-01T12:00:{seconds:02d}.{nanoseconds:09d}Z {text}"


class Log:
    """A log that is followed, and the lines that it reported."""

    def __init__(self, api: Api) -> None:
        self.told: list[str] = []
        self.stream = LogStream(api, POD, "a", "pytorch", self.told.append)
        self.stream.start()

    def finish(self) -> list[str]:
        """All lines, once it has ended by itself."""
        self.stream.finish(30, lambda: False)
        assert not self.stream._thread.is_alive()
        return self.told


def pods_log(server: Proxy, *faults: Fault) -> None:
    """Answers the first request for the log with the first fault, and so on."""
    for fault in reversed(faults):
        server.add(fault, path=f"{POD}/log$", times=1)


@pytest.fixture
def over(server: Proxy) -> None:
    """The container has ended."""
    server.add(says(pod(terminated={"exitCode": 0})), path=f"{POD}$")


def test_a_log_is_told_to_its_end(server: Proxy, api: Api, over: None) -> None:
    pods_log(server, lines(stamped(1, 1, "one"), stamped(1, 2, ""), stamped(2, 1, " two  2")))
    assert Log(api).finish() == ["one", "", " two  2"]
    assert server.requests[0].query == {
        "container": "pytorch",
        "follow": "true",
        "timestamps": "true",
    }


def test_each_line_is_told_once_wherever_a_stream_is_cut(
    server: Proxy, api: Api, over: None
) -> None:
    one, two, three = stamped(1, 1, "one"), stamped(1, 500, "two"), stamped(3, 0, "three")
    pods_log(
        server,
        broken(one, rest=two[:25]),
        answer(502, "", "dial tcp 10.0.0.1:10250: connect: connection refused"),
        broken(one, two),  # sinceTime is exact to the second
        lines(one, two, three),
    )
    assert Log(api).finish() == ["one", "two", "three"]
    asked = [each.query.get("sinceTime") for each in server.requests if "follow" in each.query]
    assert asked == [None, one.split()[0], one.split()[0], two.split()[0]]


def test_lines_of_one_moment_are_told_all(server: Proxy, api: Api, over: None) -> None:
    pods_log(server, lines(stamped(1, 1, "one"), stamped(1, 1, "two"), "no time at all"))
    assert Log(api).finish() == ["one", "two", "no time at all"]


def test_a_stream_that_ends_before_its_container_is_opened_again(server: Proxy, api: Api) -> None:
    server.add(says(pod(terminated={"exitCode": 0})), path=f"{POD}$")
    server.add(says(pod(running={})), path=f"{POD}$", times=2)
    pods_log(server, lines(stamped(1, 1, "one")), lines(stamped(2, 1, "two")))
    assert Log(api).finish() == ["one", "two"]


@pytest.mark.parametrize(
    "now", [answer(404, "NotFound", "no pod"), says(pod(uid="another", running={}))]
)
@pytest.mark.parametrize(
    "first", [lines(stamped(1, 1, "one")), broken(stamped(1, 1, "one"))], ids=["ended", "cut"]
)
def test_the_log_of_a_pod_that_is_gone_ends_though_another_has_its_name(
    now: Fault, first: Fault, server: Proxy, api: Api
) -> None:
    server.add(now, path=f"{POD}$")
    pods_log(server, first, lines(stamped(9, 1, "another's")))
    assert Log(api).finish() == ["one"]


def test_a_log_that_may_not_be_read_says_so_once(server: Proxy, api: Api) -> None:
    pods_log(server, answer(403, "Forbidden", 'User "x" cannot get resource "pods/log"'))
    assert Log(api).finish() == ['Cannot read the log: User "x" cannot get resource "pods/log"']


def test_a_log_is_left_where_enough_was_waited(server: Proxy, api: Api) -> None:
    quiet = Watch()
    server.add(quiet, path=f"{POD}/log$")
    log = Log(api)
    quiet.say(stamped(1, 1, "one"))
    wait_until("the line is told", lambda: log.told == ["one"])
    log.stream.finish(30, lambda: True)
    assert not log.stream._thread.is_alive()


# One request


def test_an_answer_of_another_kind_is_an_error_with_what_it_says(server: Proxy, api: Api) -> None:
    server.add(answer(409, "AlreadyExists", "pods is there"), "POST", times=1)
    with pytest.raises(ApiError, match="pods is there") as caught:
        api.create(LIST, {})
    assert (caught.value.status, caught.value.reason) == (409, "AlreadyExists")
    server.add(lambda exchange: exchange.answer(404, b"404 page not found\n", "text/plain"))
    with pytest.raises(ApiError, match="404 page not found"):
        api.get(LIST)
    server.add(lambda exchange: exchange.answer(200, b"<html>", "text/html"))
    with pytest.raises(ApiError, match="not JSON") as caught:
        api.get(LIST)
    assert caught.value.is_temporary


def test_a_delete_names_the_object_and_not_only_its_name(server: Proxy, api: Api) -> None:
    server.add(says({}), "DELETE")
    api.delete(POD, "the-uid")
    assert json.loads(server.requests[0].body) == {
        "propagationPolicy": "Background",
        "preconditions": {"uid": "the-uid"},
    }


def test_a_text_is_read_as_it_is(server: Proxy, api: Api) -> None:
    pods_log(server, lambda exchange: exchange.answer(200, "one\nä\n".encode(), "text/plain"))
    assert api.text(f"{POD}/log", tailLines="2") == "one\nä\n"


def test_a_request_is_tried_again_for_as_long_as_it_may_pass(server: Proxy, api: Api) -> None:
    waits: list[tuple[int, float]] = []

    def wait(error: ApiError, seconds: float) -> None:
        waits.append((error.status, seconds))

    server.add(says({"it": "is there"}))
    server.add(answer(503, "ServiceUnavailable", "not yet"), times=2)
    server.add(drop, times=1)
    assert retried(lambda: api.get(POD), 60, wait) == {"it": "is there"}
    assert waits == [(0, 0.5), (503, 1.0), (503, 2.0)]


@pytest.mark.parametrize(("status", "seconds"), [(403, 60), (500, 0)])
def test_a_request_is_not_tried_for_ever(
    status: int, seconds: float, server: Proxy, api: Api
) -> None:
    server.add(answer(status, "Odd", "so it is"))
    with pytest.raises(ApiError, match="so it is"):
        retried(lambda: api.get(POD), seconds, lambda _error, _seconds: None)
    assert len(server.requests) == 1
