"""``srccore submit``: what it sends, with which credentials, and what can go wrong."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import ipaddress
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from backend_commands import ROOT, Outcome, call
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kfp_server import KfpServer, serving
from small_pipeline import CONFIG
from typer.main import get_command

import srccore
from srccore.cli.main import app
from srccore.cli.options import CONNECTION
from srccore.kubeflow import connection
from srccore.kubeflow.client import connect
from srccore.pipelines.compiling import COMPILED

SECRET = "eyJhbGciOi.the-secret.of-ann"


def submit(server: KfpServer, pipeline: Path, *options: object, **environment: str | Path) -> dict:
    """Submits, and returns the body of the request."""
    result = call("submit", pipeline, ROOT, "--host", server.url, *options, **environment)
    assert result.code == 0, result.out
    return server.sent("POST", "/runs")[-1].body


def test_submit_sends_the_pipeline_and_says_where_the_run_is(
    server: KfpServer, pipeline: Path
) -> None:
    result = call("submit", pipeline, ROOT, "--host", f"{server.url}/#/runs")
    assert result.code == 0, result.out
    [run_id] = server.runs
    assert result.out.splitlines() == [
        f"Run {run_id}",
        f"{server.url}/#/runs/details/{run_id}",
        f"Follow it: srccore runs status {run_id} --wait --host {server.url}/#/runs".replace(
            f"{server.url}/#/runs", f"'{server.url}/#/runs'"
        ),
    ]
    body = server.sent("POST", "/runs")[0].body
    documents = list(yaml.safe_load_all(pipeline.read_text()))
    assert body["pipeline_spec"] == {"pipeline_spec": documents[0], "platform_spec": documents[1]}
    assert body["runtime_config"] == {"parameters": {"artifact_root": "s3://bucket/runs"}}
    assert body["display_name"].startswith("src-tiny 2")
    assert "service_account" not in body
    [experiment] = server.experiments.values()
    assert (experiment.display_name, experiment.namespace) == ("src-tiny", None)


def test_a_setting_is_sent_with_its_whole_section_and_nothing_else(
    server: KfpServer, pipeline: Path
) -> None:
    body = submit(
        server,
        pipeline,
        *("--set", "search.width=6", "--set", "seed=7", "--set", "threads=2"),
        *("--set", f"dpo.beta={CONFIG['dpo']['beta']}", "--set", "scorer.lora=null"),
    )
    assert body["runtime_config"]["parameters"] == {
        "artifact_root": "s3://bucket/runs",
        "search": CONFIG["search"] | {"width": 6},
        "seed": 7,
        "threads": 2,
    }


def test_a_path_is_sent_as_it_is_written_though_there_is_such_a_folder_here(
    server: KfpServer, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    body = submit(server, pipeline, "--set", "model.path=model")
    assert body["runtime_config"]["parameters"]["model"]["path"] == "model"


def test_other_parameters_are_given_in_their_type(server: KfpServer, pipeline: Path) -> None:
    body = submit(
        server,
        pipeline,
        *("--param", "scorer_uri=s3://bucket/a=b", "--param", 'tolerations=[{"key": "gpu"}]'),
    )
    parameters = body["runtime_config"]["parameters"]
    assert parameters["scorer_uri"] == "s3://bucket/a=b"
    assert parameters["tolerations"] == [{"key": "gpu"}]


def test_without_the_cache_no_task_of_any_round_takes_an_earlier_result(
    server: KfpServer, pipeline: Path
) -> None:
    spec = submit(server, pipeline, "--no-cache")["pipeline_spec"]["pipeline_spec"]
    dags = [each["dag"] for each in (spec["root"], *spec["components"].values()) if "dag" in each]
    tasks = [task for dag in dags for task in dag["tasks"].values()]
    assert len(tasks) == 3 + 2 * (2 + 1)
    assert all(task["cachingOptions"] == {} for task in tasks)
    with_cache = submit(server, pipeline)["pipeline_spec"]["pipeline_spec"]
    assert with_cache["root"]["dag"]["tasks"]["prepare"]["cachingOptions"] == {"enableCache": True}


def test_names_and_account_are_passed_on_and_an_experiment_is_used_again(
    server: KfpServer, pipeline: Path
) -> None:
    server.largest_page = 1
    options = ("--run-name", "nightly", "--service-account", "src")
    first = submit(server, pipeline, *options, "--experiment", "other")
    assert (first["display_name"], first["service_account"]) == ("nightly", "src")
    second = submit(server, pipeline, *options, "--experiment", "tiny")
    third = submit(server, pipeline, *options, "--experiment", "tiny")
    assert first["experiment_id"] != second["experiment_id"] == third["experiment_id"]
    assert len(server.experiments) == 2


def test_an_uploaded_pipeline_is_kept_as_a_version_that_the_run_refers_to(
    server: KfpServer, pipeline: Path
) -> None:
    result = call("submit", pipeline, ROOT, "--host", server.url, "--upload")
    assert result.code == 0, result.out
    [(pipeline_id, kept)] = server.pipelines.items()
    [(version_id, version)] = server.versions.items()
    text = server.texts[version_id]
    assert list(yaml.safe_load_all(text)) == list(yaml.safe_load_all(pipeline.read_text()))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert version.name == f"{srccore.__version__}-{digest[:12]}"
    assert (kept.name, kept.namespace, version.pipeline_id) == ("src-tiny", None, pipeline_id)
    body = server.sent("POST", "/runs")[0].body
    assert "pipeline_spec" not in body
    assert body["pipeline_version_reference"] == {
        "pipeline_id": pipeline_id,
        "pipeline_version_id": version_id,
    }
    url = f"{server.url}/#/pipelines/details/{pipeline_id}/version/{version_id}"
    assert result.out.splitlines()[2] == f"Pipeline: {url}"


def test_a_pipeline_that_concerns_kubernetes_in_nothing_is_one_document(
    server: KfpServer, pipeline: Path, tmp_path: Path
) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(pipeline.read_text().partition("\n---\n")[0])
    submit(server, path, "--upload")
    [text] = server.texts.values()
    assert yaml.safe_load(text) == yaml.safe_load(path.read_text())


def test_the_same_text_is_uploaded_once_and_another_is_a_new_version(
    server: KfpServer, pipeline: Path, tmp_path: Path
) -> None:
    server.largest_page = 1
    other = tmp_path / "other.yaml"
    other.write_text(pipeline.read_text().replace("src-tiny", "src-other"))
    submit(server, other, "--upload")
    [kept] = server.pipelines.values()
    first = submit(server, pipeline, "--upload")["pipeline_version_reference"]
    # Users can change the display name, which then differs from the name.
    for each in (*server.pipelines.values(), *server.versions.values()):
        each.display_name = "shown"
    assert submit(server, pipeline, "--upload")["pipeline_version_reference"] == first
    comment = tmp_path / "comment.yaml"
    comment.write_text("# The same.\n" + pipeline.read_text())
    assert submit(server, comment, "--upload")["pipeline_version_reference"] == first
    changed = tmp_path / "changed.yaml"
    changed.write_text(pipeline.read_text().replace("python:3.11-slim", "python:3.12-slim"))
    second = submit(server, changed, "--upload")["pipeline_version_reference"]
    third = submit(server, pipeline, "--upload", "--no-cache")["pipeline_version_reference"]
    assert len({each["pipeline_version_id"] for each in (first, second, third)}) == 3
    assert {each["pipeline_id"] for each in (first, second, third)} == {
        each for each in server.pipelines if each != kept.pipeline_id
    }
    assert len(server.sent("POST", "/upload_version")) == len(server.versions) == 4
    assert "enableCache" not in server.texts[third["pipeline_version_id"]]


def test_another_client_may_make_the_same_at_the_same_time(
    server: KfpServer, pipeline: Path
) -> None:
    server.races = ["POST .*/experiments$", "POST .*/pipelines$", "POST .*/upload_version$"]
    body = submit(server, pipeline, "--upload")
    assert not server.races
    made = (server.experiments, server.pipelines, server.versions)
    assert [len(each) for each in made] == [1, 1, 1]
    assert body["pipeline_version_reference"]["pipeline_version_id"] in server.versions


def test_a_version_that_is_there_but_not_listed_is_told(server: KfpServer, pipeline: Path) -> None:
    submit(server, pipeline, "--upload")
    server.lists_versions = False
    result = call("submit", pipeline, ROOT, "--host", server.url, "--upload")
    _refused(
        result, "already has an object of this name: Failed to create a pipeline version. Try again"
    )
    assert len(server.runs) == 1


def test_in_a_multi_user_install_a_pipeline_is_uploaded_to_the_namespace(
    server: KfpServer, pipeline: Path
) -> None:
    server.multi_user = True
    for namespace in ("ann", "bob", "ann"):
        submit(server, pipeline, "--upload", "--namespace", namespace)
    assert [each.namespace for each in server.pipelines.values()] == ["ann", "bob"]
    assert len(server.versions) == 2


@pytest.mark.parametrize(
    "request_line",
    ["GET .*/pipelines$", "POST .*/pipelines$", "GET .*/versions$", "POST .*/upload"],
)
@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "requires authentication (401)"),
        (403, "denies access (403)"),
        (503, "failed to handle the request (503)"),
        (None, "is not responding"),
    ],
)
def test_an_upload_that_fails_is_told_and_nothing_is_started(
    server: KfpServer, pipeline: Path, request_line: str, status: int | None, told: str
) -> None:
    server.failures = [(request_line, status)]
    result = call("submit", pipeline, ROOT, "--host", server.url, "--upload")
    _refused(result, told)
    assert not server.failures
    assert not server.sent("POST", "/runs")
    submit(server, pipeline, "--upload")
    assert (len(server.pipelines), len(server.versions)) == (1, 1), "the same command fixes it"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "rounds=4"], "rounds is fixed when the pipeline is compiled"),
        (["--set", "shards=4"], "srccore compile --set shards=4"),
        (["--set", "name=x"], "is fixed"),
        (["--set", "on_regression=continue"], "is fixed"),
        (["--set", "search.widht=6"], "Did you mean search.width"),
        (["--set", "search.width=wide"], "search.width"),
        (["--set", "search.width"], "NAME=VALUE"),
        (["--set", "device=tpu"], "device"),
        (["--param", "scorer_ury=x"], "It has scorer_uri"),
        (["--param", "seed=1"], "Pass it with --set"),
        (["--param", "artifact_root=s3://x"], "Pass it with --artifact-root"),
        (["--param", "scorer_uri"], "name=value"),
        (["--param", "tolerations={}"], "is not a value of type list"),
        (["--param", "tolerations=["], "is not a value of type list"),
        (["--artifact-root", "/tmp/runs"], "s3://BUCKET/PREFIX"),
        (["--artifact-root", "s3://"], "s3://BUCKET/PREFIX"),
        (["--artifact-root", "s3://key:secret@bucket/runs"], "a URL with a user name or password"),
        (["--artifact-root", "s3://bucket/$(AWS_SECRET_ACCESS_KEY)"], "artifact_root has $( in it"),
        (["--set", "annotation.endpoint.model=$(KEY)"], "annotation has $( in it"),
        (["--set", "data.source=s3://key:secret@bucket"], "data.source: a URL must not have"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_sent(
    server: KfpServer, pipeline: Path, options: list[str], told: str
) -> None:
    result = call("submit", pipeline, ROOT, "--host", server.url, *options)
    assert result.code == 2
    assert told in result.out
    assert not server.requests


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (f"srccore {srccore.__version__},", "srccore 0.0.1,", "compiled by srccore 0.0.1, but"),
        (f"srccore {srccore.__version__}, preset", "from preset", "not compiled by srccore"),
        ("schemaVersion: 2.1.0", "schemaVersion: 2.0.0", "version 2.0.0"),
        ("\nroot:", "\nroots:", "is not a compiled pipeline"),
        ("\nroot:", "\nroot: [", "not YAML"),
        ("artifact_root", "artifact_boot", "no parameter artifact_root"),
    ],
)
def test_a_file_that_this_version_did_not_compile_is_told_with_its_mend(
    server: KfpServer, pipeline: Path, tmp_path: Path, old: str, new: str, told: str
) -> None:
    text = pipeline.read_text()
    assert old in text
    path = tmp_path / "changed.yaml"
    path.write_text(text.replace(old, new))
    result = call("submit", path, ROOT, "--host", server.url)
    assert result.code == 2
    assert told in result.out
    assert len(result.out.splitlines()) == 1
    assert not server.requests


def test_a_parameter_without_a_default_must_be_given(
    server: KfpServer, pipeline: Path, tmp_path: Path
) -> None:
    documents = list(yaml.safe_load_all(pipeline.read_text()))
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    parameters["scorer_uri"] = {"parameterType": "STRING"}
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    result = call("submit", path, ROOT, "--host", server.url)
    assert result.code == 2
    assert "requires scorer_uri. Pass --param scorer_uri=VALUE." in result.out
    assert submit(server, path, "--param", "scorer_uri=s3://a/b")


def test_a_missing_or_foreign_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff")
    for name in ("none.yaml", "empty.yaml", "image.yaml"):
        result = call("submit", tmp_path / name, ROOT)
        assert result.code == 2
        assert "srccore compile" in result.out


def _refused(result: Outcome, told: str) -> None:
    assert result.code == 2, result.out
    assert told in result.out
    assert len(result.out.strip().splitlines()) == 1
    assert "HTTPConnectionPool" not in result.out
    assert SECRET not in result.out


def test_an_unreachable_host_is_told_at_once(pipeline: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{unused.getsockname()[1]}"
        result = call("submit", pipeline, ROOT, "--host", host)
    _refused(result, f"{host} is not responding: Connection refused. Check the address, or forward")
    assert "kubectl port-forward --namespace kubeflow service/ml-pipeline-ui" in result.out
    _refused(call("submit", pipeline, ROOT, "--host", "http://no host"), "http://no host")


def test_without_a_host_a_pod_or_a_kubeconfig_the_ways_are_named(
    pipeline: Path, tmp_path: Path
) -> None:
    result = call("submit", pipeline, ROOT, KUBECONFIG=tmp_path / "none", HOME=tmp_path)
    _refused(result, "No Kubeflow Pipelines host is set")
    assert "Pass --host or set KFP_HOST" in result.out


@pytest.mark.parametrize("host", ["https://ann:s3cret@kubeflow.example.com", "ann:s3cret@kubeflow"])
def test_a_host_with_a_password_is_refused_without_quoting_it(pipeline: Path, host: str) -> None:
    result = call("submit", pipeline, ROOT, "--host", host)
    assert result.code == 2
    assert "has a user name or password in it" in result.out
    assert "s3cret" not in result.out


def test_a_missing_credential_is_told_with_the_ways_to_give_one(
    server: KfpServer, pipeline: Path
) -> None:
    server.required = ("Authorization", f"Bearer {SECRET}")
    result = call("submit", pipeline, ROOT, "--host", server.url)
    _refused(result, "requires authentication (401: Request header error")
    assert "--token-file or KFP_TOKEN" in result.out


def test_an_expired_token_is_told_by_where_it_came_from(
    server: KfpServer, pipeline: Path, tmp_path: Path
) -> None:
    server.required = ("Authorization", "Bearer the new one")
    file = tmp_path / "token"
    file.write_text(SECRET)
    for given in (["--token-file", file], []):
        environment = {} if given else {"KFP_TOKEN": SECRET}
        result = call("submit", pipeline, ROOT, "--host", server.url, *given, **environment)
        _refused(result, f"Renew the token in {file if given else 'KFP_TOKEN'}")
    result = call("submit", pipeline, ROOT, "--host", server.url, KFP_COOKIES=f"session={SECRET}")
    _refused(result, "Renew the cookies")


def test_missing_rights_are_told(server: KfpServer, pipeline: Path) -> None:
    server.forbidden = True
    result = call("submit", pipeline, ROOT, "--host", server.url, "--user-header", "user=ann")
    _refused(result, "denies access (403: User 'ann@example.org' is not authorized")


def test_a_login_page_is_taken_for_one(server: KfpServer, pipeline: Path) -> None:
    server.login = "https://login.example.org/dex/auth?client_id=secret"
    result = call("submit", pipeline, ROOT, "--host", server.url)
    _refused(result, "redirects to https://login.example.org, which seems to be a login page")
    assert "client_id" not in result.out
    server.login = server.url.replace("http", "https") + "/apis"
    result = call("submit", pipeline, ROOT, "--host", server.url)
    _refused(result, f"only accepts HTTPS. Pass --host {server.url.replace('http', 'https')}.")


def test_a_host_that_is_no_kubeflow_is_told(server: KfpServer, pipeline: Path) -> None:
    server.page = "<html>Welcome to nginx!</html>"
    _refused(
        call("submit", pipeline, ROOT, "--host", server.url),
        "does not respond like Kubeflow Pipelines 2",
    )
    server.page = '{"status": "fine"}'
    _refused(
        call("submit", pipeline, ROOT, "--host", server.url),
        "does not respond like Kubeflow Pipelines 2",
    )
    server.page, server.prefix = None, "/pipeline"
    _refused(call("submit", pipeline, ROOT, "--host", server.url), "Not Found")
    server.failures = [("healthz", 404)]
    _refused(
        call("submit", pipeline, ROOT, "--host", server.url),
        "does not respond like Kubeflow Pipelines 2",
    )


@pytest.mark.parametrize(
    ("status", "told"), [(503, "failed to handle the request (503)"), (None, "is not responding")]
)
def test_a_backend_in_trouble_is_told_and_a_run_is_never_asked_for_twice(
    server: KfpServer, pipeline: Path, status: int | None, told: str
) -> None:
    server.failures = [("POST .*/runs", status)]
    _refused(call("submit", pipeline, ROOT, "--host", server.url), told)
    assert len(server.sent("POST", "/runs")) == 1


def test_what_the_backend_refuses_is_told_in_its_words(server: KfpServer, pipeline: Path) -> None:
    path = pipeline.with_name("odd.yaml")
    path.write_text(pipeline.read_text().replace("iteratorPolicy", "iteratorPolitics"))
    for options in ((), ("--upload",)):
        result = call("submit", path, ROOT, "--host", server.url, *options)
        _refused(result, "rejected the request (400): invalid v2 pipeline spec")
        assert "iteratorPolitics" in result.out


def test_a_multi_user_install_needs_a_namespace_and_gets_it(
    server: KfpServer, pipeline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.multi_user = True
    monkeypatch.setattr(connection, "POD_NAMESPACE", tmp_path / "namespace")
    _refused(call("submit", pipeline, ROOT, "--host", server.url), "--namespace or KFP_NAMESPACE")
    submit(server, pipeline, "--namespace", "ann")
    submit(server, pipeline, KFP_NAMESPACE="bob")
    (tmp_path / "namespace").write_text("pod\n")
    submit(server, pipeline)
    assert [each.namespace for each in server.experiments.values()] == ["ann", "bob", "pod"]


@pytest.mark.parametrize(
    ("header", "value", "options", "environment"),
    [
        ("Authorization", f"Bearer {SECRET}", ["--token-file", "{secret}"], {}),
        ("Authorization", f"Bearer {SECRET}", [], {"KFP_TOKEN": SECRET}),
        ("Cookie", SECRET, ["--cookies-file", "{secret}"], {}),
        ("Cookie", SECRET, [], {"KFP_COOKIES": SECRET}),
        ("kubeflow-userid", "ann@x.org", ["--user-header", "kubeflow-userid=ann@x.org"], {}),
    ],
)
def test_every_request_carries_the_credential_and_nothing_prints_it(
    server: KfpServer,
    pipeline: Path,
    tmp_path: Path,
    header: str,
    value: str,
    options: list[str],
    environment: dict[str, str],
) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    server.required = (header, value)
    given = [option.format(secret=tmp_path / "secret") for option in options]
    result = call("submit", pipeline, ROOT, "--host", server.url, *given, **environment)
    assert result.code == 0, result.out
    assert SECRET not in result.out
    # The printed command to follow the run works: it has the options, but not the secret.
    line = result.out.splitlines()[-1].removeprefix("Follow it: srccore ").replace("--wait ", "")
    assert call(*line.split(), **environment).code == 0


def test_a_token_that_is_renewed_in_its_file_is_taken_up(server: KfpServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    backend = connect(connection.Connection(host=server.url, token_file=file))
    file.write_text("new")
    backend.experiment("none")
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == ["Bearer old", "Bearer new"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "single line"),
        ("two\nlines", "single line"),
        ("ümlaut", "single line"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_token_is_told_without_its_content(
    server: KfpServer, pipeline: Path, tmp_path: Path, text: str | None, told: str
) -> None:
    if text is not None:
        (tmp_path / "token").write_text(text)
    result = call(
        "submit", pipeline, ROOT, "--host", server.url, "--token-file", tmp_path / "token"
    )
    _refused(result, told)
    assert not text or text.splitlines()[0] not in result.out
    result = call("submit", pipeline, ROOT, "--host", server.url, "--user-header", "ann")
    _refused(result, "NAME=VALUE")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for this machine, not signed by a public authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_an_authority_of_ones_own_is_trusted_when_it_is_given(
    pipeline: Path, certificate: Path
) -> None:
    with serving(certificate) as server:
        host = server.url.removeprefix("https://")
        submit(server, pipeline, "--ca-bundle", certificate)
        _refused(call("submit", pipeline, ROOT, "--host", host), "--ca-bundle")
        result = call("submit", pipeline, ROOT, "--host", host, "--ca-bundle", pipeline)
        _refused(result, "has no readable certificates")
    with serving() as plain:
        host = plain.url.removeprefix("http://")
        _refused(call("submit", pipeline, ROOT, "--host", host), "pass --host http://")


def test_the_kubeconfig_leads_through_the_proxy_of_the_kubernetes_api(
    server: KfpServer, pipeline: Path, tmp_path: Path
) -> None:
    server.prefix = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
    server.required = ("Authorization", f"Bearer {SECRET}")
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "users": [{"name": "u", "user": {"token": SECRET}}],
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(kubeconfig))
    result = call("submit", pipeline, ROOT, KUBECONFIG=path)
    assert result.code == 0, result.out
    assert "/pipeline/#/runs/details/" in result.out
    result = call("submit", pipeline, ROOT, "--ui-url", "https://kf.example.org", KUBECONFIG=path)
    assert "\nhttps://kf.example.org/#/runs/details/" in result.out
    assert SECRET not in result.out
    server.gateway = 'services "ml-pipeline" is forbidden'
    result = call("submit", pipeline, ROOT, KUBECONFIG=path)
    _refused(
        result, f"(403: {server.gateway}). Renew the kubeconfig's user. If it is still valid, ask"
    )


def test_in_a_pod_the_service_and_the_projected_token_are_found(
    server: KfpServer, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "IN_CLUSTER_HOST", server.url)
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KF_PIPELINES_SA_TOKEN_PATH": tmp_path / "token"}
    assert call("submit", pipeline, ROOT, **pod).code == 0, "a single-user install has no token"
    server.required = ("Authorization", f"Bearer {SECRET}")
    (tmp_path / "token").write_text(SECRET)
    assert call("submit", pipeline, ROOT, **pod).code == 0


def test_nothing_is_written_to_the_home_of_the_user(
    server: KfpServer, pipeline: Path, tmp_path: Path
) -> None:
    server.multi_user = True
    submit(server, pipeline, "--namespace", "ann", HOME=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_options_of_a_connection_are_its_fields_and_come_last_in_every_command() -> None:
    fields = [each.name for each in dataclasses.fields(connection.Connection)]
    assert list(CONNECTION) == fields
    commands = get_command(app).commands
    for command in (commands["submit"], commands["schedule"], *commands["runs"].commands.values()):
        assert [each.name for each in command.params][-len(fields) :] == fields


def test_the_commands_are_imported_without_a_heavy_package() -> None:
    code = (
        "import sys, srccore.cli.runs\n"
        "heavy = {'kfp', 'kfp_server_api', 'kubernetes', 'pydantic', 'croniter'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "setting",
    ["data.source=/home/ann/data", "data.source=data/src", "model.path=./mine", "model.path=/m"],
)
def test_what_lies_on_a_disk_is_refused(server: KfpServer, pipeline: Path, setting: str) -> None:
    result = call("submit", pipeline, ROOT, "--host", server.url, "--set", setting)
    assert result.code == 2
    assert "which pods cannot reach" in result.out
    assert not server.requests


@pytest.mark.parametrize("launcher", ["inprocess", "pytorchjob", "trainjob"])
def test_a_pipeline_is_submitted_wherever_it_trains(
    server: KfpServer, tmp_path: Path, launcher: str
) -> None:
    profile, package = tmp_path / "profile.yaml", tmp_path / "src.yaml"
    profile.write_text(f"launcher: {launcher}")
    assert call("compile", "--profile", profile, "-o", package).code == 0
    assert call("submit", package, ROOT, "--host", server.url).code == 0


def test_a_pipeline_that_trains_as_a_job_is_not_run_without_a_cluster(tmp_path: Path) -> None:
    result = call("pipeline-local", "--preset", "llava-1.5-7b", "--out", tmp_path / "out")
    assert result.code == 2
    assert "trains as a pytorchjob, which only a cluster can run" in result.out
    assert "launcher: inprocess" in result.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            [],
            "augment-rationales would ask an endpoint (augmentation.teacher), but "
            "augmentation.endpoint.url and augmentation.endpoint.model are not set. "
            "Pass --set augmentation.endpoint.url=",
        ),
        (
            ["augmentation.endpoint.url=https://teacher/v1", "augmentation.endpoint.model=m"],
            "annotate-ratings would ask an endpoint (annotation.teacher), but "
            "annotation.endpoint.url and annotation.endpoint.model are not set.",
        ),
        (
            ["augmentation.teacher=facts", "annotation.endpoint.url=https://teacher/v1"],
            "annotation.endpoint.model is not set.",
        ),
    ],
)
def test_a_teacher_without_an_address_is_refused_before_anything_runs(
    server: KfpServer, settings: list[str], told: str
) -> None:
    options = [word for each in ("data.source=s3://b/d", *settings) for word in ("--set", each)]
    path = COMPILED / "llava-1.5-7b.yaml"
    result = call("submit", path, ROOT, "--host", server.url, *options)
    assert result.code == 2
    assert told in result.out
    assert not server.runs


def test_a_run_that_needs_no_teacher_is_not_asked_for_one(
    server: KfpServer, tmp_path: Path
) -> None:
    profile, path = tmp_path / "profile.yaml", tmp_path / "src.yaml"
    profile.write_text("augment: false\nscorer: train-on-given-pairs\n")
    setting = ("--set", "data.source=s3://b/d")
    options = ("--preset", "llava-1.5-7b", "--profile", profile, "-o", path)
    assert call("compile", *options, *setting).code == 0
    pairs = ("--param", "labelled_pairs_uri=s3://b/pairs")
    result = call("submit", path, ROOT, "--host", server.url, *pairs)
    assert result.code == 0, result.out
