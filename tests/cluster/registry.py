"""Puts one-program images into a registry, without a container tool."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import platform
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

USER = "65532:65532"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def push(registry: str, repository: str, program: Path, path: str) -> str:
    """Pushes an image with one static program, which runs as an unprivileged user.

    Args:
        registry: Host and port, for plain HTTP.
        repository: The name of the image in the registry.
        program: The program on this machine.
        path: The path of the program in the image, which is its entrypoint.

    Returns:
        The image with its digest, which only depends on the program. It also has the tag ``test``.
    """
    layer = _layer(program, path)
    settings = {
        "architecture": ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": [path], "User": USER},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    config = json.dumps(settings).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _blob("application/vnd.oci.image.config.v1+json", config),
        "layers": [_blob("application/vnd.oci.image.layer.v1.tar", layer)],
    }
    base = f"http://{registry}/v2/{repository}"
    for content in (layer, config):
        _upload(base, content)
    content = json.dumps(manifest).encode()
    _send("PUT", f"{base}/manifests/test", content, _MANIFEST)
    return f"{registry}/{repository}@{_digest(content)}"


def _layer(program: Path, path: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tmp = tarfile.TarInfo("tmp")
        tmp.type, tmp.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(tmp)
        file = tarfile.TarInfo(path.lstrip("/"))
        file.size, file.mode = program.stat().st_size, 0o755
        with program.open("rb") as content:
            tar.addfile(file, content)
    return packed.getvalue()


def _upload(base: str, content: bytes) -> None:
    try:
        _send("HEAD", f"{base}/blobs/{_digest(content)}")
        return
    except urllib.error.HTTPError as error:
        if error.code != http.client.NOT_FOUND:
            raise
    begun = _send("POST", f"{base}/blobs/uploads/", b"")
    to = urllib.parse.urljoin(base, begun)
    separator = "&" if "?" in to else "?"
    _send("PUT", f"{to}{separator}digest={_digest(content)}", content, "application/octet-stream")


def _send(method: str, url: str, content: bytes | None = None, kind: str = "") -> str:
    """Sends a request; returns the location in the response."""
    headers = {"Content-Type": kind} if kind else {}
    request = urllib.request.Request(url, data=content, headers=headers, method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=60) as answer:
        return str(answer.headers.get("Location", ""))


def _blob(kind: str, content: bytes) -> dict[str, object]:
    return {"mediaType": kind, "digest": _digest(content), "size": len(content)}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
