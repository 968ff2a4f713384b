"""A real HTTP server on this machine that responds like Kubeflow Pipelines 2.17.

Its responses are models of `kfp_server_api`, so that no field is made up, and it validates requests
as the backend does: credentials, namespaces, pipelines, and types of parameters. The rest was read
in the backend's sources: times that are not known yet are 1970; the tasks of a run are a flat list
of the nodes of Argo's workflow, whose parents, pods and errors are empty and whose children are
node IDs; terminating a finished run is an error; a run of an uploaded version is returned without
its pipeline; and errors of uploads have a different format.
"""

from __future__ import annotations

import contextlib
import email
import functools
import json
import re
import socket
import ssl
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

NEVER = "1970-01-01T00:00:00Z"
HTTP_OF_CODE = {3: 400, 5: 404, 6: 409, 7: 403, 13: 500, 14: 503, 16: 401}
PLAIN = api.ApiClient().sanitize_for_serialization
FINISHED = {"SUCCEEDED", "FAILED", "CANCELED"}


class RefusalError(Exception):
    """An error of the backend, with its gRPC code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class Step:
    """The progress of a run: its state, and that of every task that has started.

    Tasks are identified by their keys in the pipeline, such as ``prepare`` or
    ``src-round-2.for-loop-2.0.search``.
    """

    state: str
    tasks: Mapping[str, str] = field(default_factory=dict)


def read_body(content_type: str, content: bytes) -> Any:
    """A JSON body, or the files of a form by field, each with its name and text."""
    if not content_type.startswith("multipart/form-data"):
        return json.loads(content) if content else None
    form = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + content)
    return {
        part.get_param("name", header="Content-Disposition"): (
            part.get_filename(),
            part.get_payload(decode=True).decode(),
        )
        for part in form.get_payload()
    }


def clock(second: int) -> str:
    return f"2026-03-01T02:{second // 60:02d}:{second % 60:02d}Z"


def argo_node_id(workflow: str, path: str) -> str:
    digest = functools.reduce(
        lambda value, byte: ((value ^ byte) * 16777619) % 2**32, path.encode(), 2166136261
    )
    return f"{workflow}-{digest}"


class Workflow:
    """The nodes that Kubeflow's compiler and Argo create for a pipeline.

    Args:
        pipeline: As compiled.
        name: The workflow's name.
        states: Those of the tasks, as in `Step`.
        attempts: The number of attempts of each node, under a node for all of them; 0 for nodes
            without a retry strategy. Kubeflow's own installation sets one for every template.
    """

    def __init__(
        self, pipeline: dict[str, Any], name: str, states: Mapping[str, str], attempts: int = 1
    ) -> None:
        self.pipeline, self.name, self.leaves, self.attempts = pipeline, name, states, attempts
        self.states: dict[str, str] = {}
        self.children: dict[str, list[str]] = defaultdict(list)
        whole = self._state("")
        top = self._node(name, whole or "RUNNING", [])
        driver = self._node(f"{top}.root-driver", "SUCCEEDED" if whole else "RUNNING", [top])
        if whole:
            self._dag(pipeline["root"]["dag"], self._node(f"{top}.root", whole, [driver]), "")

    def details(self, run_id: str) -> list[api.V2beta1PipelineTaskDetail]:
        made = [
            api.V2beta1PipelineTaskDetail(
                run_id=run_id,
                task_id=str(uuid.uuid5(uuid.NAMESPACE_URL, path)),
                display_name=path.rpartition(".")[2],
                create_time=clock(0),
                start_time=clock(number),
                end_time=clock(number + 75) if state not in ("RUNNING", "PENDING") else NEVER,
                state=state,
                child_tasks=[
                    api.PipelineTaskDetailChildTask(pod_name=argo_node_id(self.name, child))
                    for child in self.children[path]
                ]
                or None,
            )
            for number, (path, state) in enumerate(self.states.items())
        ]
        # Executions in the metadata store that match no node.
        made += [
            api.V2beta1PipelineTaskDetail(
                run_id=run_id, task_id=str(uuid.uuid5(uuid.NAMESPACE_URL, number)), start_time=NEVER
            )
            for number in "12"
        ]
        return sorted(made, key=lambda each: each.task_id)

    def _state(self, task: str) -> str | None:
        within = {
            s
            for t, s in self.leaves.items()
            if t == task or t.startswith(f"{task}." if task else "")
        }
        for state in ("FAILED", "RUNNING", "SUCCEEDED"):
            if state in within:
                return state
        return next(iter(within), None)

    def _node(self, path: str, state: str, parents: Sequence[str]) -> str:
        """Adds a node of a template; returns the path for its content."""
        inside = self._bare(path, state, parents)
        for number in range(self.attempts):
            is_last = number + 1 == self.attempts
            inside = self._bare(f"{path}({number})", state if is_last else "FAILED", [path])
        return inside

    def _bare(self, path: str, state: str, parents: Sequence[str]) -> str:
        self.states[path] = state
        for parent in parents:
            self.children[parent].append(path)
        return path

    def _dag(self, dag: dict[str, Any], path: str, above: str) -> list[str]:
        """Adds the tasks that have started; returns the last nodes of the DAG."""
        ends: dict[str, list[str]] = {}
        waiting = dict(sorted(dag["tasks"].items()))
        while waiting:
            key = next(
                k for k, t in waiting.items() if not {*t.get("dependentTasks", ())} & {*waiting}
            )
            task = waiting.pop(key)
            name = f"{above}.{key}".lstrip(".")
            if self._state(name) is None:
                continue
            before = [end for dep in task.get("dependentTasks", ()) for end in ends.get(dep, ())]
            grow = self._loop if "parameterIterator" in task else self._task
            ends[key] = grow(task, f"{path}.{key}", name, before or [path])
        return [end for each in ends.values() for end in each]

    def _task(self, task: dict[str, Any], path: str, name: str, before: list[str]) -> list[str]:
        state = self._state(name) or "PENDING"
        if state == "DRIVER FAILED":
            return [self._node(f"{path}-driver", "FAILED", before)]
        driver = self._node(f"{path}-driver", "SUCCEEDED", before)
        node = self._node(path, state, [driver])
        component = self.pipeline["components"][task["componentRef"]["name"]]
        if "dag" in component:
            return self._dag(component["dag"], node, name)
        return [self._node(f"{node}.executor", state, [node])]

    def _loop(self, task: dict[str, Any], path: str, name: str, before: list[str]) -> list[str]:
        state = self._state(name) or "PENDING"
        node = self._node(path, state, before)
        driver = self._node(f"{node}.iteration-driver", "SUCCEEDED", [node])
        group = self._bare(f"{node}.iteration-iterations", state, [driver])
        ends = []
        index = 0
        while inner := self._state(f"{name}.{index}"):
            item = self._node(f"{group}({index}:{index})", inner, [group])
            ends += self._task(task, f"{item}.iteration-item", f"{name}.{index}", [item])
            index += 1
        return ends


class KfpServer:
    """The backend. Tests read and set its attributes."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.multi_user = False
        self.required: tuple[str, str] | None = None
        """A header that every request must carry, and its value."""
        self.forbidden = False
        self.page: str | None = None
        """An HTML page to respond with to every request."""
        self.gateway: str | None = None
        """Why the Kubernetes API, in front of the backend, denies every request."""
        self.login: str | None = None
        """The address to redirect every request to."""
        self.prefix = ""
        """The prefix of every path, as with the proxy of the Kubernetes API."""
        self.failures: list[tuple[str, int | None]] = []
        """Requests to fail: a pattern of ``METHOD path``, and a status; None hangs up."""
        self.races: list[str] = []
        """Requests that another client also sends, just before: patterns as above."""
        self.lists_versions = True
        """Whether versions are listed; one that is not ready yet exists, but is not listed."""
        self.largest_page = 200
        self.script: list[Step] = [Step("PENDING")]
        """The progress of a run at the first request, the second, and so on; the last one stays."""
        self.requests: list[Request] = []
        self.experiments: dict[str, api.V2beta1Experiment] = {}
        self.pipelines: dict[str, api.V2beta1Pipeline] = {}
        self.versions: dict[str, api.V2beta1PipelineVersion] = {}
        self.texts: dict[str, str] = {}
        """The uploaded texts, by the ID of the version."""
        self.runs: dict[str, api.V2beta1Run] = {}
        self.recurring_runs: dict[str, api.V2beta1RecurringRun] = {}
        self.looks: dict[str, int] = defaultdict(int)
        self.lock = threading.Lock()
        self.seen = threading.Condition(self.lock)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                outer.answer(self)

            do_POST = do_GET  # noqa: N815 - the name that http.server looks for

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                """Prints nothing when a client disconnects."""

        self.http = Server(("127.0.0.1", 0), Handler)
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self.http.server_port}"

    def sent(self, method: str, path: str) -> list[Request]:
        """The requests whose path ends with this path."""
        return [r for r in self.requests if r.method == method and r.path.endswith(path)]

    def wait_for(self, method: str, path: str, times: int = 1) -> None:
        """Waits until this many requests have a matching path."""
        with self.seen:
            arrived = self.seen.wait_for(
                lambda: sum(
                    r.method == method and re.search(path, r.path) is not None
                    for r in self.requests
                )
                >= times,
                timeout=60,
            )
        assert arrived, [f"{r.method} {r.path}" for r in self.requests]

    def add_run(self, **fields: Any) -> api.V2beta1Run:
        """Adds a run of another client."""
        run_id = str(uuid.uuid4())
        values = {
            "run_id": run_id,
            "display_name": "a run",
            "state": "SUCCEEDED",
            "created_at": clock(0),
            "scheduled_at": clock(0),
            "finished_at": clock(125),
        }
        self.runs[run_id] = api.V2beta1Run(**(values | fields))
        return self.runs[run_id]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        text = handler.rfile.read(length)
        url = urlsplit(handler.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        request = Request(
            handler.command,
            unquote(url.path),
            query,
            dict(handler.headers),
            read_body(handler.headers.get("Content-Type") or "", text),
        )
        with self.seen:
            self.requests.append(request)
            self.seen.notify_all()
            failure = self._first(self.failures, request, lambda each: each[0])
            if self._first(self.races, request, str) is not None:
                self._reply(request)
            if failure is None:
                status, body, headers = self._reply(request)
            elif failure[1] is not None:
                status, body, headers = failure[1], b"upstream connect error", {}
            else:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
        with contextlib.suppress(OSError):  # the client has disconnected
            handler.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

    @staticmethod
    def _first(entries: list[Any], request: Request, pattern: Callable[[Any], str]) -> Any:
        """Removes and returns the first entry whose pattern matches the request, or None."""
        line = f"{request.method} {request.path}"
        found = next((each for each in entries if re.search(pattern(each), line)), None)
        if found is not None:
            entries.remove(found)
        return found

    def _reply(self, request: Request) -> tuple[int, bytes, dict[str, str]]:
        if self.login is not None:
            return 302, b"", {"Location": self.login}
        if self.gateway is not None:
            status = {"kind": "Status", "message": self.gateway, "details": {"name": "ml-pipeline"}}
            return 403, json.dumps(status).encode(), {}
        if self.page is not None:
            return 200, self.page.encode(), {"Content-Type": "text/html"}
        try:
            self._admit(request)
            return 200, json.dumps(PLAIN(self._route(request)), default=str).encode(), {}
        except RefusalError as refusal:
            detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": refusal.code}
            error = {
                "code": refusal.code,
                "message": f"Failed: {refusal}",
                "details": [detail | {"message": str(refusal)}],
            }
            if request.path.endswith("/upload_version"):
                error = {"error_message": str(refusal), "error_details": str(refusal)}
            return HTTP_OF_CODE[refusal.code], json.dumps(error).encode(), {}

    def _admit(self, request: Request) -> None:
        if self.required is not None:
            name, value = self.required
            headers = {key.casefold(): each for key, each in request.headers.items()}
            if headers.get(name.casefold()) != value:
                raise RefusalError(16, "Request header error: there is no user identity header.")
        if self.forbidden:
            raise RefusalError(7, "User 'ann@example.org' is not authorized with reason: none")

    def _route(self, request: Request) -> Any:
        routes: dict[str, Callable[..., Any]] = {
            r"GET healthz": self._health,
            r"GET experiments": self._list_experiments,
            r"POST experiments": self._create_experiment,
            r"GET pipelines": self._list_pipelines,
            r"POST pipelines": self._create_pipeline,
            r"POST pipelines/upload_version": self._upload_version,
            r"GET pipelines/([^/:]+)/versions": self._list_versions,
            r"GET pipelines/([^/:]+)/versions/([^/:]+)": self._get_version,
            r"GET runs": self._list_runs,
            r"POST runs": self._create_run,
            r"GET runs/([^/:]+)": self._get_run,
            r"POST runs/([^/:]+):terminate": self._terminate_run,
            r"GET recurringruns": self._list_recurring_runs,
            r"POST recurringruns": self._create_recurring_run,
            r"POST recurringruns/([^/:]+):disable": self._disable_recurring_run,
        }
        start = f"{self.prefix}/apis/v2beta1/"
        if request.path.startswith(start):
            line = f"{request.method} {request.path.removeprefix(start)}"
            for pattern, route in routes.items():
                if found := re.fullmatch(pattern, line):
                    return route(request, *found.groups())
        raise RefusalError(5, "Not Found")

    def _health(self, _request: Request) -> Any:
        return {"multi_user": self.multi_user} | PLAIN(
            api.V2beta1GetHealthzResponse(pipeline_store="database")
        )

    def _listed(
        self, request: Request, entries: list[Any], make: Callable[..., Any], name: str
    ) -> Any:
        for predicate in json.loads(request.query.get("filter", "{}")).get("predicates", ()):
            assert predicate["operation"] in (1, "EQUALS"), predicate
            entries = [
                e for e in entries if getattr(e, predicate["key"]) == predicate["stringValue"]
            ]
        begin = int(request.query.get("page_token") or 0)
        end = begin + min(int(request.query.get("page_size") or 20), self.largest_page)
        following = str(end) if end < len(entries) else None
        return make(
            **{name: entries[begin:end]}, total_size=len(entries), next_page_token=following
        )

    def _namespace(self, namespace: str | None) -> str | None:
        if not self.multi_user:
            return None
        if not namespace:
            raise RefusalError(3, "Invalid input error: a namespace is needed in multi-user mode")
        return namespace

    def _list_experiments(self, request: Request) -> Any:
        namespace = self._namespace(request.query.get("namespace"))
        found = [e for e in self.experiments.values() if e.namespace == namespace]
        return self._listed(request, found, api.V2beta1ListExperimentsResponse, "experiments")

    def _create_experiment(self, request: Request) -> Any:
        body = api.V2beta1Experiment(**request.body)
        body.namespace = self._namespace(body.namespace)
        if any(
            (e.display_name, e.namespace) == (body.display_name, body.namespace)
            for e in self.experiments.values()
        ):
            raise RefusalError(6, "Experiment name already exists")
        body.experiment_id = str(uuid.uuid4())
        body.created_at, body.storage_state = clock(0), "AVAILABLE"
        body.last_run_created_at = NEVER
        self.experiments[body.experiment_id] = body
        return body

    def _list_pipelines(self, request: Request) -> Any:
        namespace = self._namespace(request.query.get("namespace"))
        found = [p for p in self.pipelines.values() if p.namespace == namespace]
        return self._listed(request, found, api.V2beta1ListPipelinesResponse, "pipelines")

    def _create_pipeline(self, request: Request) -> Any:
        body = api.V2beta1Pipeline(**request.body)
        body.namespace = self._namespace(body.namespace)
        if any(
            (p.name, p.namespace) == (body.name, body.namespace) for p in self.pipelines.values()
        ):
            raise RefusalError(6, f"Failed to create a new pipeline. The name {body.name} exists")
        body.pipeline_id, body.created_at = str(uuid.uuid4()), clock(0)
        self.pipelines[body.pipeline_id] = body
        return body

    def _list_versions(self, request: Request, pipeline_id: str) -> Any:
        found = [
            v
            for v in self.versions.values()
            if self.lists_versions and v.pipeline_id == pipeline_id
        ]
        return self._listed(
            request, found, api.V2beta1ListPipelineVersionsResponse, "pipeline_versions"
        )

    def _upload_version(self, request: Request) -> Any:
        file, text = request.body.get("uploadfile", ("", ""))
        pipeline_id, name = request.query.get("pipelineid"), request.query["name"]
        if not file.endswith((".yaml", ".yml")) or pipeline_id not in self.pipelines:
            raise RefusalError(3, "Failed to create a pipeline version")
        try:
            pipeline, *platforms = (yaml.safe_load(each) for each in text.split("\n---\n"))
        except yaml.YAMLError:
            raise RefusalError(3, "Failed to create a pipeline version") from None
        spec = {"pipeline_spec": pipeline, "platform_spec": platforms[0]} if platforms else pipeline
        self._parsed(spec)
        if any((v.name, v.pipeline_id) == (name, pipeline_id) for v in self.versions.values()):
            raise RefusalError(6, "Failed to create a pipeline version")
        version = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id,
            pipeline_version_id=str(uuid.uuid4()),
            name=name,
            display_name=name,
            created_at=clock(0),
            pipeline_spec=spec,
        )
        self.versions[version.pipeline_version_id] = version
        self.texts[version.pipeline_version_id] = text
        return version

    def _get_version(self, _request: Request, pipeline_id: str, version_id: str) -> Any:
        version = self.versions.get(version_id)
        if version is None or version.pipeline_id != pipeline_id:
            raise RefusalError(5, f"PipelineVersion {version_id} not found")
        return version

    def _source(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """The pipeline of a run or recurring run, with its platforms, if it still exists."""
        reference = body.get("pipeline_version_reference")
        if reference is None:
            return body.get("pipeline_spec")
        version = self.versions.get(reference["pipeline_version_id"])
        return version and version.pipeline_spec

    def _parsed(self, spec: dict[str, Any]) -> dict[str, Any]:
        """The pipeline of a request, without its platforms."""
        pipeline = spec.get("pipeline_spec", spec)
        try:
            json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
            platform = spec.get("platform_spec", {})
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
        except json_format.ParseError as error:
            raise RefusalError(3, f"invalid v2 pipeline spec: {error}") from None
        return pipeline

    def _checked(self, body: dict[str, Any]) -> dict[str, Any]:
        """The pipeline of a run or recurring run, after validating the request."""
        if body.get("experiment_id") not in self.experiments:
            raise RefusalError(5, f"Experiment {body.get('experiment_id')} not found")
        if not body.get("display_name"):
            raise RefusalError(3, "The run name is empty. Please specify a valid name")
        source = self._source(body)
        if source is None:
            raise RefusalError(13, "Internal Server Error")
        pipeline = self._parsed(source)
        parameters = body.get("runtime_config", {}).get("parameters", {})
        wanted = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
        kinds = {"STRING": str, "STRUCT": dict, "LIST": list, "BOOLEAN": bool}
        for name, definition in wanted.items():
            kind = kinds.get(definition["parameterType"], (int, float))
            if name in parameters and not isinstance(parameters[name], kind):
                raise RefusalError(3, f"input parameter {name} requires type {kind}")
            if name not in parameters and "defaultValue" not in definition:
                raise RefusalError(
                    3, f"parameter {name} is not optional, yet has neither default value"
                )
        if extra := parameters.keys() - wanted.keys():
            raise RefusalError(3, f"parameter(s) provided are not required by pipeline: {extra}")
        return pipeline

    def _create_run(self, request: Request) -> Any:
        self._checked(request.body)
        run = self.add_run(**request.body)
        run.state, run.finished_at = None, NEVER
        return run

    def _run(self, run_id: str) -> api.V2beta1Run:
        if run_id not in self.runs:
            raise RefusalError(5, f"Run {run_id} not found")
        return self.runs[run_id]

    def _get_run(self, _request: Request, run_id: str) -> Any:
        run = self._run(run_id)
        if run.state == "CANCELING":
            run.state, run.finished_at = "CANCELED", clock(300)
        if run.state in FINISHED:
            return run
        step = self.script[min(self.looks[run_id], len(self.script) - 1)]
        self.looks[run_id] += 1
        run.state = step.state
        source = self._source(run.to_dict())
        if source:
            pipeline = source.get("pipeline_spec", source)
            details = Workflow(pipeline, "src-tiny-x7k2p", step.tasks).details(run_id)
            run.run_details = api.V2beta1RunDetails(task_details=details)
        if step.state in FINISHED:
            run.finished_at = clock(600)
        return run

    def _list_runs(self, request: Request) -> Any:
        experiment = request.query.get("experiment_id")
        if experiment is None:
            self._namespace(request.query.get("namespace"))
        found = [r for r in self.runs.values() if experiment in (None, r.experiment_id)]
        assert request.query.get("sort_by") == "created_at desc"
        found.sort(key=lambda run: run.created_at, reverse=True)
        return self._listed(request, found, api.V2beta1ListRunsResponse, "runs")

    def _terminate_run(self, _request: Request, run_id: str) -> Any:
        run = self._run(run_id)
        if run.state in FINISHED:
            raise RefusalError(3, f"Failed to terminate a run {run_id}. Row not found")
        run.state = "CANCELING"
        return {}

    def _create_recurring_run(self, request: Request) -> Any:
        self._checked(request.body)
        body = request.body
        if not 1 <= int(body.get("max_concurrency", 0)) <= 10:
            raise RefusalError(
                3, "Max concurrency of a recurring run must be at leas 1 and at most 10"
            )
        if len(body["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise RefusalError(3, "Schedule cron is not a supported format")
        recurring = api.V2beta1RecurringRun(**body)
        recurring.namespace = self._namespace(recurring.namespace)
        recurring.recurring_run_id = str(uuid.uuid4())
        recurring.status = "ENABLED" if recurring.mode == "ENABLE" else "DISABLED"
        recurring.created_at = recurring.updated_at = clock(0)
        self.recurring_runs[recurring.recurring_run_id] = recurring
        return recurring

    def _list_recurring_runs(self, request: Request) -> Any:
        namespace = self._namespace(request.query.get("namespace"))
        found = [r for r in self.recurring_runs.values() if r.namespace == namespace]
        return self._listed(request, found, api.V2beta1ListRecurringRunsResponse, "recurring_runs")

    def _disable_recurring_run(self, _request: Request, recurring_run_id: str) -> Any:
        recurring = self.recurring_runs[recurring_run_id]
        recurring.mode, recurring.status = "DISABLE", "DISABLED"
        return {}


@contextlib.contextmanager
def serving(certificate: Path | None = None) -> Iterator[KfpServer]:
    """Runs the server."""
    it = KfpServer(certificate)
    thread = threading.Thread(target=it.http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield it
    finally:
        it.http.shutdown()
        thread.join()
        it.http.server_close()
