"""Where stages keep their folders: local paths, and ``s3://bucket/key`` behind the same functions.

`fetch` copies a file or folder of a bucket into a local cache, `fetch_part` a part of a file;
`publish` uploads a stage's folder, its manifest last, so that a folder with a manifest is complete.
Any store with an S3 API works; credentials, region and endpoint come from where boto3 looks for
them (``AWS_*`` variables, profiles, the role of a pod).

What a stage wrote is checked against the SHA-256 in its manifest, wherever it is fetched from: of a
folder with a manifest, and of a file or folder in it.

Assumes that a folder is not written while it is fetched, and that the cache belongs to this
package alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from srccore.errors import UserError
from srccore.files import LOCK, MANIFEST, atomically, is_private
from srccore.hashing import hash_file, hash_text

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from s3transfer.futures import TransferFuture
    from s3transfer.manager import TransferManager

__all__ = [
    "AlteredError",
    "StoredFile",
    "address_of",
    "adopt",
    "create",
    "drop_stale",
    "exists",
    "fetch",
    "fetch_part",
    "fingerprint",
    "is_remote",
    "join",
    "listing",
    "local_path",
    "publish",
    "read_text",
    "remove",
    "resolve",
]

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 16
"""Concurrent requests; large files are sent in parts, so a single file can use them all."""
_ATTEMPTS = 5
"""How often a file is downloaded that arrives damaged."""
PAUSES = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)
"""Seconds between attempts while a store is down or overloaded: five minutes in all."""
ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished download is considered abandoned."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}")
_CHECK_ADDRESS = "Check the address, and that the stage that writes it has finished."
_OTHER_CACHE = "Free some space, fix its permissions, or set SRCCORE_CACHE to another folder."
_UPLOADS = (
    "PutObject",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
)
_UNCONDITIONAL = ("NotImplemented", "InvalidArgument", "InvalidRequest")
"""How a store refuses a conditional write that it does not know."""
_PERMISSIONS = {
    "ListObjectsV2": ("list", "s3:ListBucket"),
    "HeadObject": ("read", "s3:GetObject"),
    "GetObject": ("read", "s3:GetObject"),
    **dict.fromkeys(_UPLOADS, ("write", "s3:PutObject")),
    "DeleteObject": ("delete", "s3:DeleteObject"),
}
"""What each request does to an address, and the permission for it."""
_DISK_FAULTS = frozenset(
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS"),
        *("EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG"),
    )
)


class AlteredError(UserError):
    """What is stored is not what a stage wrote there."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a folder, as it appears in a listing.

    Args:
        path: Relative to the folder; for a single file, its name.
        size: In bytes.
        etag: The store's identifier of the content; empty for a local file.
    """

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class _Address:
    """A place in a bucket; an empty key means the whole bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")

    @property
    def prefix(self) -> str:
        """What the keys of a folder's files start with."""
        return f"{self.key}/" if self.key else ""


# Addresses


def is_remote(uri: str) -> bool:
    """Whether an address is in a bucket; plain paths and ``file://`` are local.

    Raises:
        UserError: The address has another scheme.
    """
    found = _SCHEME.match(uri)
    if found is None or uri.startswith("file://"):
        return False
    if not uri.startswith("s3://"):
        raise UserError(
            f"{_shown(uri)} is not an address that srccore can read or write.",
            "Use a local path or s3://BUCKET/KEY. Google Cloud Storage and MinIO also work with "
            "s3://: set AWS_ENDPOINT_URL to https://storage.googleapis.com or MinIO's address.",
        )
    return True


def join(uri: str, name: str) -> str:
    """Resolves a reference that is relative to a folder.

    Args:
        uri: The folder.
        name: ``adapter``, ``../other/adapter``.

    Returns:
        The resolved address, without ``..``.

    Raises:
        UserError: The reference is absolute, or leads out of the bucket.
    """
    if name.startswith("/") or _SCHEME.match(name):
        raise UserError(
            f"{_shown(name)} is not relative to {_shown(uri)}.",
            "Pass a relative reference, such as ../tune-rationale/adapter.",
        )
    if not is_remote(uri):
        return os.path.normpath(_local(uri) / name)
    address = _parse(uri)
    segments = address.key.split("/") if address.key else []
    for segment in name.split("/"):
        if segment == ".." and not segments:
            raise UserError(
                f"{name} points outside the bucket of {address}.",
                "Keep files that refer to each other in the same bucket.",
            )
        if segment == "..":
            segments.pop()
        elif segment not in ("", "."):
            segments.append(segment)
    return str(_Address(address.bucket, "/".join(segments)))


def resolve(uri: str, name: str) -> str:
    """Resolves a reference that is relative to a folder; an absolute one is returned unchanged.

    Raises:
        UserError: The reference leads out of the bucket.
    """
    return name if is_remote(name) or Path(name).is_absolute() else join(uri, name)


def local_path(uri: str) -> Path:
    """Returns where `fetch` puts an address; local files stay where they are.

    Files from a bucket go to ``s3/STORE/BUCKET/KEY`` in the cache: ``$SRCCORE_CACHE``, else
    ``$XDG_CACHE_HOME/srccore`` or ``~/.cache/srccore``. STORE is the host and port of the endpoint,
    or ``aws``: two stores may have buckets of one name.
    """
    if not is_remote(uri):
        return _local(uri)
    address = _parse(uri)
    return _bucket_folder(address) / address.key


def address_of(path: Path) -> str:
    """Returns the address of a file in the cache, whether or not it was fetched.

    Args:
        path: A `local_path`, or a link to one.

    Raises:
        ValueError: The path is not in the cache.
    """
    place = path.resolve().relative_to(_store_folder().resolve())
    return f"s3://{place.as_posix()}"


def _local(uri: str) -> Path:
    if not uri.startswith("file://"):
        return Path(uri)
    path = unquote(uri.removeprefix("file://"))
    if not path.startswith("/"):
        raise UserError(f"{uri} names another machine.", "Use file:///PATH or just the path.")
    return Path(path)


def _parse(uri: str) -> _Address:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    address = _Address(bucket, key.rstrip("/"))
    if not _BUCKET.fullmatch(bucket) or (address.key and not _is_safe(address.key)):
        raise UserError(
            f"{_shown(uri)} is not a valid address in a bucket.",
            "Use s3://BUCKET/KEY; no part of the key may be empty, '.' or '..'.",
        )
    return address


def _is_safe(path: str) -> bool:
    """Whether a relative path of a store means the same in a local folder."""
    return "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _shown(uri: str) -> str:
    """Strips possible secrets from an address: user, password, the query of a signed link."""
    return re.sub(r"//[^/]*@", "//", uri).partition("?")[0]


def _cache() -> Path:
    if named := os.environ.get("SRCCORE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srccore"


def _bucket_folder(address: _Address) -> Path:
    return _store_folder() / address.bucket


def _store_folder() -> Path:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    store = re.sub(r"[^A-Za-z0-9.-]", "_", urlsplit(endpoint).netloc.rpartition("@")[2])
    return _cache() / "s3" / (store or "aws")


# Looking


class _UnavailableError(UserError):
    """The store is down or overloaded, or the network is, which may pass."""


_waiting = threading.Lock()
"""Held by the thread that said that it waits for the store, so that others need not say it."""


def _patient(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that may be called again wait until the store is available."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        said = False
        try:
            for pause in PAUSES:
                try:
                    return function(*args, **kwargs)
                except _UnavailableError as error:
                    if not said and (said := _waiting.acquire(blocking=False)):
                        minutes = round(sum(PAUSES) / 60)
                        print(f"{error} Trying again for {minutes} minutes.", file=sys.stderr)
                # Pods that were interrupted together must not come back together.
                time.sleep(pause * random.uniform(0.5, 1))
            return function(*args, **kwargs)
        finally:
            if said:
                _waiting.release()

    return wrapped


@_patient
def exists(uri: str) -> bool:
    """Whether there is a file of exactly that name, or a folder with anything in it.

    Raises:
        UserError: The store cannot be queried.
    """
    if not is_remote(uri):
        path = _local(uri)
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    address = _parse(uri)
    with _store_explained(address):
        return any(_objects(address)) or _single(address) is not None


@_patient
def listing(uri: str) -> list[StoredFile]:
    """Lists the files at an address, sorted by path: those of a folder, or the one file.

    Raises:
        UserError: There is nothing, or an object's key cannot be a file's name.
    """
    if is_remote(uri):
        address = _parse(uri)
        with _store_explained(address):
            return _stored(address)[1]
    path = _local(uri)
    if not exists(uri):
        raise _nothing(uri)
    folder = path.parent if path.is_file() else path
    found = [
        StoredFile(file.relative_to(folder).as_posix(), file.stat().st_size, "")
        for file in _files_at(path)
    ]
    return sorted(found, key=lambda file: file.path)


def fingerprint(uri: str) -> str:
    """Returns a SHA-256 of the listing: identifies a checkpoint in a bucket without reading it.

    Raises:
        UserError: There is nothing.
    """
    return hash_text(json.dumps([astuple(file) for file in listing(uri)]))


@_patient
def read_text(uri: str) -> str:
    """Reads a small file, bypassing the cache.

    Raises:
        UserError: There is no such file, it is not what a stage wrote there, or not UTF-8 text.
    """
    if is_remote(uri):
        address = _parse(uri)
        if not address.key:
            raise _nothing(uri)
        with _store_explained(address):
            found = _read(address)
            known = _hashes_above(address).get(address.key)
        if known not in (None, hashlib.sha256(found).hexdigest()):
            raise _altered(address)
    elif _local(uri).is_file():
        found = _local(uri).read_bytes()
    else:
        raise _nothing(uri)
    try:
        return found.decode()
    except UnicodeDecodeError:
        raise UserError(f"{uri} is not UTF-8 text.", "Check the address.") from None


def _nothing(uri: str) -> UserError:
    return UserError(f"Nothing is stored at {uri}.", _CHECK_ADDRESS)


def _files_at(path: Path) -> list[Path]:
    """Lists the file itself, or all files below the folder; none if neither exists."""
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _stored(address: _Address) -> tuple[str, list[StoredFile]]:
    """Returns what is stored at an address: the common prefix of all keys, and the files below it.

    Raises:
        UserError: There is nothing, or the keys are not valid paths of files.
    """
    prefix, files = address.prefix, list(_objects(address))
    if not files:
        single = _single(address)
        if single is None:
            raise _nothing(str(address))
        prefix, files = address.key.removesuffix(single.path), [single]
    folders = {str(folder) for file in files for folder in PurePosixPath(file.path).parents}
    for file in files:
        if not _is_safe(file.path) or file.path in folders:
            raise UserError(
                f"The object {file.path!r} at {address} cannot be a file in a local folder.",
                "Rename or delete it: no part of a key may be empty, '.' or '..', and no object "
                "may have the name of a folder.",
            )
    return prefix, sorted(files, key=lambda file: file.path)


def _objects(address: _Address) -> Iterator[StoredFile]:
    """Yields the files of a folder, page by page, without the markers of some tools for folders."""
    prefix = address.prefix
    pages = _client().get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=address.bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            if not found["Key"].endswith("/"):
                path = found["Key"].removeprefix(prefix)
                yield StoredFile(path, found["Size"], found["ETag"].strip('"'))


def _single(address: _Address) -> StoredFile | None:
    """Returns the object with exactly that key.

    Call it after `_objects`: the response to a HEAD request says less about a fault.
    """
    from botocore.exceptions import ClientError

    if not address.key:
        return None
    try:
        found = _client().head_object(Bucket=address.bucket, Key=address.key)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return None
        raise
    name = PurePosixPath(address.key).name
    return StoredFile(name, found["ContentLength"], found["ETag"].strip('"'))


# Fetching


@_patient
def fetch(uri: str) -> Path:
    """Brings a file, or a folder with everything below it, to this machine.

    Files that the cache has with the same size and ETag are not downloaded again; files that were
    fetched and are no longer in the bucket are deleted, since a stale shard must not be read. Files
    appear under their names once they are complete, the manifest last. If several processes fetch
    the same address at once, one of them downloads it.

    What a manifest lists is read from the cache only with the SHA-256 that it lists, and else
    downloaded again. A local file stays as it is.

    Returns:
        `local_path` of the address.

    Raises:
        UserError: There is nothing, it is not what a stage wrote there, the store denies access,
            or the cache cannot be written.
    """
    path = local_path(uri)
    if is_remote(uri):
        address = _parse(uri)
        with _disk_explained(_cache(), _OTHER_CACHE), _store_explained(address):
            _mirror(address, path)
    elif not exists(uri):
        raise _nothing(uri)
    return path


@_patient
def drop_stale(uri: str) -> None:
    """Deletes what was fetched of a file from the cache unless it equals the stored one.

    Raises:
        UserError: The store denies access, or the cache cannot be written.
    """
    path, address = local_path(uri), _parse(uri)
    # Without a record, it was not fetched, but is the work of a process.
    if path.is_file() and _record_path(path).exists():
        with _disk_explained(_cache(), _OTHER_CACHE), _store_explained(address):
            found = _single(address)
            if found is None or not _is_cached(path, found):
                _drop(path)


@_patient
def fetch_part(uri: str, start: int, length: int, sha256: str) -> bytes | None:
    """Reads part of a file in a bucket, and keeps it in the cache under its hash.

    Args:
        uri: The file.
        start: The place of the first byte.
        length: The number of bytes, at least 1.
        sha256: Of the part.

    Returns:
        The part; None if it has another hash, because the file in the bucket has changed.

    Raises:
        UserError: There is no such file, or the store denies access.
    """
    kept = _cache() / "parts" / sha256[:2] / sha256
    with contextlib.suppress(OSError):
        found = kept.read_bytes()
        if hashlib.sha256(found).hexdigest() == sha256:
            return found
    address = _parse(uri)
    with _store_explained(address):
        found = _read(address, f"bytes={start}-{start + length - 1}")
    if hashlib.sha256(found).hexdigest() != sha256:
        return None
    try:
        with _staging() as staging:
            (staging / "part").write_bytes(found)
            kept.parent.mkdir(parents=True, exist_ok=True)
            (staging / "part").replace(kept)
    except OSError as error:
        # A full disk should not end hours of work: the bytes are here.
        _say_once(
            f"Parts of files cannot be kept in {_cache()}: {error.strerror}. They are read from "
            f"the bucket each time. {_OTHER_CACHE}"
        )
    return found


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _read(address: _Address, part: str = "bytes=0-") -> bytes:
    """Reads an object, or a part of it: fewer bytes if the object ends before the part does."""
    from botocore.exceptions import ClientError

    try:
        found = _client().get_object(Bucket=address.bucket, Key=address.key, Range=part)
        return found["Body"].read()
    except ClientError as error:
        if error.response["Error"]["Code"] == "InvalidRange":
            return b""
        raise


def _mirror(address: _Address, path: Path) -> None:
    """Makes the cached files at a path equal to the stored ones."""
    prefix, files = _stored(address)
    wanted = {_bucket_folder(address) / prefix / file.path: file for file in files}
    known = _hashes(address, prefix, files)

    def is_right(place: Path, content: Path) -> bool:
        # A base model that no manifest lists is not read for this.
        return place not in known or known[place] == hash_file(content)

    def is_intact(place: Path) -> bool:
        return _is_cached(place, wanted[place]) and is_right(place, place)

    for stale in set(_files_at(path)) - wanted.keys():
        # Anything else was not fetched, but is the work of a process.
        if _record_path(stale).exists():
            _drop(stale)
    if all(is_intact(each) for each in wanted):
        return
    with _one_by_one(address), _staging() as staging:
        missing = [each for each in wanted if not is_intact(each)]
        for batch in _manifest_last(missing, path):
            left, attempts = batch, _ATTEMPTS
            # Bytes may change on their way without an error.
            while left and attempts:
                attempts -= 1
                with _transfers() as transfers:
                    begun = [
                        (
                            each,
                            _download(transfers, address, prefix, wanted[each], staging / str(n)),
                        )
                        for n, each in enumerate(left)
                    ]
                    for n, (each, download) in enumerate(begun):
                        download.result()
                        # Another process may have placed it in the meantime, and be reading it.
                        if is_right(each, staging / str(n)) and not is_intact(each):
                            _place(staging / str(n), each, wanted[each].etag, staging)
                left = [each for each in left if not is_intact(each)]
            if left:
                raise _altered(_parse(address_of(left[0])))


def _hashes(address: _Address, prefix: str, files: Iterable[StoredFile]) -> dict[Path, str]:
    """Returns what manifests say of the files at an address: SHA-256 by place in the cache.

    Raises:
        UserError: A file that a manifest lists is missing.
    """
    bucket, keys = _bucket_folder(address), {prefix + file.path: file for file in files}
    known = {} if address.prefix + MANIFEST in keys else _hashes_above(address)
    for key, file in keys.items():
        if PurePosixPath(key).name == MANIFEST:
            is_here = _is_cached(bucket / key, file)
            text = (bucket / key).read_bytes() if is_here else _read(_Address(address.bucket, key))
            known |= _listed(key, text)
    for key in known:
        if key.startswith(address.prefix) and key not in keys:
            raise _altered(_Address(address.bucket, key))
    return {bucket / key: sha256 for key, sha256 in known.items()}


def _hashes_above(address: _Address) -> dict[str, str]:
    """Returns what the nearest manifest above an address says: SHA-256 by key."""
    from botocore.exceptions import ClientError

    # A stage's files are at most two folders deep: adapter/adapter_model.safetensors.
    for folder in list(PurePosixPath(address.key).parents)[:2]:
        key = MANIFEST if folder == PurePosixPath(".") else f"{folder}/{MANIFEST}"
        if key == address.key:
            continue
        try:
            return _listed(key, _read(_Address(address.bucket, key)))
        except ClientError as error:
            # Without the permission to list, a store says so of what does not exist.
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (403, 404):
                raise
    return {}


def _listed(key: str, manifest: bytes) -> dict[str, str]:
    """Returns the files that a manifest lists, by key; none for someone else's manifest."""
    try:
        outputs = json.loads(manifest)["outputs"]
        return {str(PurePosixPath(key).parent / name): str(outputs[name]) for name in outputs}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _altered(address: _Address) -> AlteredError:
    return AlteredError(
        f"{address} is missing or is not what its stage wrote: the SHA-256 in {MANIFEST} differs.",
        "Delete the stage's folder, so that the stage is done again. If this is not the first "
        "time, check who else can write there.",
    )


@contextlib.contextmanager
def _one_by_one(address: _Address) -> Iterator[None]:
    """Makes the processes that share a cache download an address one after the other."""
    path = _cache() / "locks" / hash_text(f"{_store_folder()} {address}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        # Some network file systems have no locks; there, each process downloads for itself.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _manifest_last(paths: Iterable[Path], folder: Path) -> Iterator[list[Path]]:
    """Yields the data, then the folder's manifest: its presence means that all files are there."""
    manifest = folder / MANIFEST
    yield [path for path in paths if path != manifest]
    yield [path for path in paths if path == manifest]


def _download(
    transfers: TransferManager, address: _Address, prefix: str, file: StoredFile, to: Path
) -> TransferFuture:
    from s3transfer.subscribers import BaseSubscriber

    class Listed(BaseSubscriber):
        """Passes on size and ETag, which saves a request and pins the parts to that object."""

        def on_queued(self, future: TransferFuture, **kwargs: Any) -> None:
            future.meta.provide_transfer_size(file.size)
            future.meta.provide_object_etag(f'"{file.etag}"')

    return transfers.download(address.bucket, prefix + file.path, str(to), subscribers=[Listed()])


def _drop(path: Path) -> None:
    path.unlink(missing_ok=True)
    _record_path(path).unlink(missing_ok=True)


def _place(downloaded: Path, path: Path, etag: str, staging: Path) -> None:
    """Puts a complete file under its name.

    Its record is written first, and does not match any file until this one is in place.
    """
    _record(path, downloaded, etag, staging)
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    downloaded.replace(path)


def _is_cached(path: Path, file: StoredFile) -> bool:
    try:
        state = path.stat()
        return state.st_size == file.size and (
            _record_path(path).read_text(encoding="ascii") == _state(file.etag, state)
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def _record(path: Path, content: Path, etag: str, staging: Path) -> None:
    """Records which object a cached file is; its time and size show whether it still is."""
    written, record = staging / "record", _record_path(path)
    written.write_text(_state(etag, content.stat()), encoding="ascii")
    record.parent.mkdir(parents=True, exist_ok=True)
    written.replace(record)


def _record_path(path: Path) -> Path:
    return _cache() / "etags" / hash_text(str(path.relative_to(_cache())))


def _state(etag: str, state: os.stat_result) -> str:
    return f"{etag} {state.st_size} {state.st_mtime_ns}\n"


@contextlib.contextmanager
def _staging() -> Iterator[Path]:
    """Yields a folder for unfinished downloads, outside the folders that fetches clean up."""
    folder = _cache() / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        # A killed process cannot clean up, and checkpoints are large.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


# Publishing


@_patient
def publish(folder: Path, uri: str) -> None:
    """Uploads a stage's folder, or copies it to a local one: data first, the manifest last.

    Journals, locks and ``*.tmp`` are left out. If the folder is the `local_path` of the address, a
    later `fetch` downloads nothing. Files with other names that are already at the address stay
    there.

    Args:
        folder: The folder of a stage.
        uri: The folder to publish to.

    Raises:
        UserError: The folder is empty, or the address cannot be written.
    """
    files = sorted(file for file in _files_at(folder) if not is_private(file.relative_to(folder)))
    if not folder.is_dir() or not files:
        raise UserError(
            f"There is nothing to publish in {folder}.", "Pass the folder of a finished stage."
        )
    batches = list(_manifest_last(files, folder))
    if is_remote(uri):
        address = _parse(uri)
        with _disk_explained(_cache(), _OTHER_CACHE), _store_explained(address):
            for batch in batches:
                _upload(folder, batch, address)
            if folder.resolve() == local_path(uri).resolve():
                _record_all(address)
        return
    target = _local(uri)
    if folder.resolve() != target.resolve():
        with _disk_explained(target, "Free some space or fix its permissions."):
            for file in (file for batch in batches for file in batch):
                _copy(file, target / file.relative_to(folder))


def _upload(folder: Path, files: Iterable[Path], address: _Address) -> None:
    with _transfers() as transfers:
        begun = [
            transfers.upload(
                str(file), address.bucket, address.prefix + file.relative_to(folder).as_posix()
            )
            for file in files
        ]
        for upload in begun:
            upload.result()


def _record_all(address: _Address) -> None:
    """Records that the cached folder equals what was uploaded from it."""
    prefix, files = _stored(address)
    with _staging() as staging:
        for file in files:
            path = _bucket_folder(address) / prefix / file.path
            if path.is_file() and path.stat().st_size == file.size:
                _record(path, path, file.etag, staging)


def adopt(folder: Path, uri: str) -> None:
    """Moves a folder that was published to the `local_path` of its address.

    A later `fetch` downloads nothing.

    Args:
        folder: The folder; its lock stays where it is.
        uri: The folder in a bucket that it was published to.

    Raises:
        UserError: The cache cannot be written.
    """
    address, place = _parse(uri), local_path(uri)
    with _disk_explained(_cache(), _OTHER_CACHE), _store_explained(address):
        place.mkdir(parents=True, exist_ok=True)
        for file in _files_at(folder):
            if not is_private(file.relative_to(folder)):
                target = place / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        for left in folder.iterdir():
            if left.name != LOCK:
                remove(str(left))
        _record_all(address)


def create(uri: str, data: bytes, *, patient: bool = True) -> bool:
    """Stores a small file in a bucket unless there is one: of several writers, the first one wins.

    A store without conditional writes replaces what is there. So the name of a file that several
    may write must have a hash of its content.

    Args:
        uri: The file.
        data: Its content.
        patient: Whether to wait for a store that is not available.

    Returns:
        Whether it was stored; False if there is one already.

    Raises:
        UserError: The address cannot be written.
    """
    write = _patient(_create) if patient else _create
    return write(_parse(uri), data)


def _create(address: _Address, data: bytes) -> bool:
    from botocore.exceptions import ClientError

    bucket, key, left = address.bucket, address.key, _ATTEMPTS
    with _store_explained(address):
        while True:
            left -= 1
            try:
                _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == HTTPStatus.PRECONDITION_FAILED:
                    return False
                # Another conditional write of the same key is under way.
                if status == HTTPStatus.CONFLICT and left:
                    time.sleep(random.uniform(0.1, 1))
                    continue
                if error.response["Error"]["Code"] not in _UNCONDITIONAL:
                    raise
                _client().put_object(Bucket=bucket, Key=key, Body=data)
            return True


@_patient
def remove(uri: str) -> None:
    """Deletes a file, or a folder with everything below it; does nothing if it does not exist.

    Manifests are deleted first: a half-deleted folder must not count as complete.

    Raises:
        UserError: The address is a whole bucket, or deleting it is not allowed.
    """
    if is_remote(uri):
        address = _parse(uri)
        if not address.key:
            raise UserError(f"{uri} is a whole bucket.", "Name what to delete in it.")
        with _store_explained(address):
            keys = [address.prefix + file.path for file in _objects(address)]
            if not keys and _single(address):
                keys = [address.key]
            # One by one: not every store can delete in batches, and our folders are small.
            for key in sorted(keys, key=lambda key: PurePosixPath(key).name != MANIFEST):
                _client().delete_object(Bucket=address.bucket, Key=key)
        return
    path = _local(uri)
    with _disk_explained(path, "Fix its permissions."):
        for file in sorted(_files_at(path), key=lambda file: file.name != MANIFEST):
            file.unlink(missing_ok=True)
        if path.is_dir():
            shutil.rmtree(path)


def _copy(source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        shutil.copyfile(source, temporary)


# The client


def _client() -> S3Client:
    """Returns the client of this process, or a new one if the environment has changed.

    A forked process gets its own: two processes cannot use one connection.
    """
    settings = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _connect(os.getpid(), tuple(sorted(settings.items())))


@functools.cache
def _connect(_process: int, _settings: tuple[tuple[str, str], ...]) -> S3Client:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    # boto3 itself reads AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION") or session.region_name
    config = Config(retries={"mode": "standard"}, connect_timeout=10, max_pool_connections=THREADS)
    try:
        client: S3Client = session.client("s3", region_name=region, config=config)
    except ValueError as error:
        if not str(error).startswith("Invalid endpoint"):
            raise
        raise UserError(
            "AWS_ENDPOINT_URL is not a URL.", "Set it to http://HOST:PORT or https://HOST."
        ) from None
    if _is_amazon(client.meta.endpoint_url):
        return client
    # Other stores have no host per bucket, and older ones reject the newer checksums.
    lenient = Config(
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    merged = config.merge(lenient)
    other: S3Client = session.client("s3", region_name=region, config=merged)
    return other


def _is_amazon(endpoint: str) -> bool:
    return (urlsplit(endpoint).hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _transfers() -> TransferManager:
    """Makes a pool of threads for transfers: large files in parts, each part with its retries."""
    from s3transfer.manager import TransferConfig, TransferManager

    config = TransferConfig(max_request_concurrency=THREADS)
    return TransferManager(_client(), config)


# Errors


@contextlib.contextmanager
def _disk_explained(path: Path, fix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Connection errors are OSErrors, too, with other numbers or none.
        if error.errno not in _DISK_FAULTS:
            raise
        raise UserError(f"Cannot write to {path}: {error.strerror}.", fix) from None


@dataclass(frozen=True)
class _Fault:
    """A fault that a user can fix.

    Args:
        signs: The store's error codes, the class of its HTTP status, or the names of exceptions.
        what: What is wrong; the names in braces are those of `_explain`.
        fix: How to fix it.
        passes: Whether it may pass without a fix.
    """

    signs: tuple[str, ...]
    what: str
    fix: str
    passes: bool = False


_FAULTS = (
    _Fault(
        ("NoSuchBucket", "InvalidBucketName"),
        "There is no bucket {bucket} at {endpoint} ({address}).",
        "Create it, or check its name and AWS_ENDPOINT_URL.",
    ),
    _Fault(
        ("NoSuchKey", "NotFound", "404"),
        "Nothing is stored at {address}.",
        _CHECK_ADDRESS,
    ),
    _Fault(
        ("AccessDenied", "AllAccessDisabled", "Forbidden", "403"),
        "These credentials are not allowed to {action} {address} ({sign}).",
        "Grant them {permission}, or use other credentials.",
    ),
    _Fault(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity"),
        "The store at {endpoint} rejected the access key for {address} ({sign}).",
        "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    ),
    _Fault(
        (
            *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"),
            *("UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError"),
        ),
        "The session token for {address} has expired or is not valid.",
        "Sign in again (aws sso login), or set new credentials with their AWS_SESSION_TOKEN.",
    ),
    _Fault(
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        "No credentials were found for {address}.",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the pod's "
        "service account an IAM role.",
    ),
    _Fault(
        ("ProfileNotFound",),
        "There is no profile {profile} with credentials for {address}.",
        "Check AWS_PROFILE, and the file ~/.aws/config or AWS_CONFIG_FILE.",
    ),
    _Fault(
        ("AssumeRole",),
        "The IAM role for {address} cannot be assumed.",
        "Check that the role exists and trusts this service account or profile.",
    ),
    _Fault(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "301"),
        "The bucket {bucket} is not in the configured region ({address}).",
        "Set AWS_REGION to {region}.",
    ),
    _Fault(
        ("SSLError",),
        "Cannot open a trusted TLS connection to {endpoint} for {address}.",
        "Check that it accepts TLS connections. If your own certificate authority issued its "
        "certificate, set AWS_CA_BUNDLE to the file with that authority's certificate.",
    ),
    _Fault(
        ("EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"),
        "The store at {endpoint} does not respond ({address}).",
        "Check AWS_ENDPOINT_URL and AWS_REGION, and that this machine can connect to it.",
        passes=True,
    ),
    _Fault(
        (
            *("ConnectionClosedError", "ReadTimeoutError", "ResponseStreamingError"),
            *("IncompleteReadError", "ConnectionError", "TimeoutError"),
        ),
        "The connection to the store broke or timed out ({address}).",
        "Check the network between this machine and the store.",
        passes=True,
    ),
    _Fault(
        (
            *("5xx", "429", "SlowDown", "Throttling", "ThrottlingException"),
            *("TooManyRequests", "RequestLimitExceeded", "RequestTimeout"),
        ),
        "The store at {endpoint} is overloaded or has a fault ({address}, {sign}).",
        "Check the store.",
        passes=True,
    ),
)


@contextlib.contextmanager
def _store_explained(address: _Address) -> Iterator[None]:
    """Turns what a user can fix into a `UserError`; anything else passes unchanged."""
    from botocore.exceptions import BotoCoreError, ClientError
    from s3transfer.exceptions import RetriesExceededError

    try:
        yield
    # While a body is read, errors of the socket may be the system's own.
    except (
        *(BotoCoreError, ClientError, RetriesExceededError),
        *(ConnectionError, TimeoutError),
    ) as error:
        cause = error.last_exception if isinstance(error, RetriesExceededError) else error
        explained = _explain(cause, address)
        if explained is None:
            raise
        raise explained from None


def _explain(error: BaseException, address: _Address) -> UserError | None:
    from botocore.exceptions import BotoCoreError, ClientError

    detail: Mapping[str, Any] = error.kwargs if isinstance(error, BotoCoreError) else {}
    operation, endpoint = "", str(detail.get("endpoint_url", ""))
    signs = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, ClientError):
        detail, operation = dict(error.response["Error"]), error.operation_name
        endpoint = _client().meta.endpoint_url
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        signs = [str(detail.get("Code"))]
        # 501 says that the store lacks something, and always will.
        if status >= 500 and status != 501:
            signs.append("5xx")
        # Also AssumeRoleWithWebIdentity, with which a service account gets its role.
        elif operation.startswith("AssumeRole"):
            signs = ["AssumeRole"]
    action, permission = _PERMISSIONS.get(operation, ("use", "the permission"))
    for fault in _FAULTS:
        if any(sign in fault.signs for sign in signs):
            names = {
                "address": address,
                "bucket": address.bucket,
                "sign": signs[0],
                "endpoint": _host(endpoint),
                "action": action,
                "permission": permission,
                "profile": detail.get("profile"),
                "region": detail.get("Region", "the region of the bucket"),
            }
            kind = _UnavailableError if fault.passes else UserError
            return kind(fault.what.format(**names), fault.fix.format(**names))
    return None


def _host(url: str) -> str:
    """Strips a URL of its path, which is long for a request, and of any password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
