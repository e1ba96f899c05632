"""A `Registry` over HTTP: any that speaks the OCI distribution spec.

What fails for a moment is tried again, with growing pauses; an upload from its start, as blobs are
at most 256 MiB. The spec knows no conditional update: what a tag names is looked at right before each
attempt to change it, and the condition is sent along, for registries that follow HTTP's own.

Source: OCI distribution-spec 1.1, "Pull", "Push", "Listing Tags", "Content Management"; RFC 9110,
13.1, "Preconditions".
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2

from shared.engine import Blob
from shared.errors import (
    BlobNotFound,
    InvalidField,
    StoreNotFound,
    StoreRefused,
    StoreUnreachable,
)
from shared.store import oci
from shared.store.blob_writer import CHUNK_BYTES
from shared.store.blobs import Sweep
from shared.store.registry import Manifest, TagMoved
from shared.store.registry_auth import RegistryAuth

_MANIFEST_TYPES = ", ".join(
    (oci.MANIFEST_TYPE, oci.INDEX_TYPE, "application/vnd.docker.distribution.manifest.v2+json")
)
_MAX_MANIFEST_BYTES = 16 << 20
_NUM_ATTEMPTS, _MAX_WAIT_S = 5, 30.0
# Longer than a manifest, which is kilobytes, is on its way.
_SETTLE_S = 0.5
_TIMEOUT = httpx2.Timeout(10.0, read=60.0, write=60.0, pool=None)
_NAME = re.compile(
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
)

_DELETES_NOTHING = "it is set to delete nothing"
# What OpenSSL calls an answer that is no TLS; which of them depends on its version.
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")

Body = Callable[[], Iterator[bytes]]


class OciRegistry:
    """The repository `name` of the registry at `host`.

    Args:
        host: `registry.example.org` or `127.0.0.1:5000`.
        is_plain: HTTP without TLS.
        first_wait_s: before the first of the further attempts.
    """

    def __init__(
        self, host: str, name: str, *, is_plain: bool = False, first_wait_s: float = 0.25
    ) -> None:
        if not host or _NAME.fullmatch(name) is None:
            problem = f"{host}/{name} is not a registry's host and the name of a repository"
            raise InvalidField(field="store", problem=problem)
        self.url = f"{'oci+http' if is_plain else 'oci'}://{host}/{name}"
        self._first_wait_s = first_wait_s
        # Docker's own registry answers elsewhere.
        answers_at = "registry-1.docker.io" if host == "docker.io" else host
        self._origin = f"{'http' if is_plain else 'https'}://{answers_at}"
        self._root = f"{self._origin}/v2/{name}"
        self._client = httpx2.Client(
            timeout=_TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity"}
        )
        self._auth = RegistryAuth(host, self._client, is_plain)

    @staticmethod
    def from_url(url: str) -> "OciRegistry":
        """The repository at an `oci://host/name` or `oci+http://host/name` URL.

        Raises:
            InvalidField: it is not of that form.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            problem = "an oci:// URL is a host and the name of a repository, nothing else"
            raise InvalidField(field="store", problem=problem)
        is_plain = parts.scheme == "oci+http"
        return OciRegistry(parts.netloc, parts.path.strip("/"), is_plain=is_plain)

    def check(self) -> None:
        """Returns if it answers and takes our credentials; see `Registry`."""
        with self._ask("GET", f"{self._root}/tags/list?n=1", 200, 404) as response:
            if response.status_code == 200:
                response.read()
                self._tags_in(response)

    @property
    def settle_s(self) -> float:
        """Changes of a tag are exact where the registry follows conditions, which it does not say."""
        return _SETTLE_S

    def adopt(self, digest: str) -> bool:
        """As `has`: how long blobs without a manifest stay is the registry's to know."""
        return self.has(digest)

    def sweep(self, grace_s: float) -> Sweep:
        """Refused; see `Registry`."""
        problem = f"what nothing names in {self.url} is freed by its own garbage collection"
        raise InvalidField(field="store", problem=problem)

    def has(self, digest: str) -> bool:
        """Claims that the blob is there; see `Registry`."""
        with self._ask("HEAD", f"{self._root}/blobs/{digest}", 200, 404) as response:
            return bool(response.status_code == 200)

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `offset` on; see `Registry`."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        url = f"{self._root}/blobs/{digest}"
        with self._ask("GET", url, 200, 206, 404, 416, headers=headers) as response:
            if response.status_code == 404:
                raise BlobNotFound(digest=digest)
            if response.status_code == 416:  # nothing is left of it
                return
            skipped = 0 if response.status_code == 206 else offset
            for chunk in response.iter_raw():
                rest = chunk[skipped:]
                skipped -= len(chunk) - len(rest)
                if rest:
                    yield rest

    def upload(self, blob: Blob, content: Path | bytes) -> None:
        """Puts the blob there; see `Registry`."""
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(blob.size_bytes),
        }

        def place() -> str:
            with self._ask("POST", f"{self._root}/blobs/uploads/", 202, 404) as response:
                if response.status_code == 404:
                    raise StoreNotFound(store=self.url, problem=_problem(response))
                at = urljoin(str(response.url), response.headers["Location"])
            return f"{at}{'&' if '?' in at else '?'}digest={blob.digest}"

        # A broken upload cannot be gone on with everywhere: each attempt asks for a new place.
        with self._ask("PUT", place, 201, headers=headers, body=lambda: _chunks(content)):
            pass

    def manifest(self, reference: str) -> Manifest | None:
        """The manifest that a tag or a digest names; see `Registry`."""
        headers = {"Accept": _MANIFEST_TYPES}
        with self._ask(
            "GET", f"{self._root}/manifests/{reference}", 200, 404, headers=headers
        ) as response:
            if response.status_code == 404:
                return None
            content = b""
            for chunk in response.iter_raw():
                content += chunk
                if len(content) > _MAX_MANIFEST_BYTES:
                    raise StoreUnreachable(store=self.url, problem="it sends no end of a manifest")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
        return oci.blob_from(content, media_type), content

    def put_manifest(
        self, content: bytes, media_type: str, tag: str = "", replaces: str | None = None
    ) -> Blob:
        """Puts a manifest there, and gives it the tag; see `Registry`."""
        blob = oci.blob_from(content, media_type)
        headers = {"Content-Type": media_type, "Content-Length": str(len(content))}
        if tag:
            headers |= {"If-Match": f'"{replaces}"'} if replaces else {"If-None-Match": "*"}

        def unmoved() -> str:
            there = self.manifest(tag) if tag else None
            if tag and (None if there is None else there[0].digest) != replaces:
                raise TagMoved
            return f"{self._root}/manifests/{tag or blob.digest}"

        # An attempt whose answer was lost may have come through: each looks anew.
        with self._ask(
            "PUT", unmoved, 201, 412, headers=headers, body=lambda: iter([content])
        ) as response:
            if response.status_code == 412:
                raise TagMoved
            return blob

    def tags(self) -> tuple[str, ...]:
        """All tags; see `Registry`."""
        found: list[str] = []
        url = f"{self._root}/tags/list?n=1000"
        while url:
            with self._ask("GET", url, 200, 404) as response:
                if response.status_code == 404:  # nothing was pushed yet
                    return ()
                response.read()
                found += self._tags_in(response)
                link = response.links.get("next", {}).get("url", "")
                url = urljoin(str(response.url), link) if link else ""
        return tuple(found)

    def _tags_in(self, response: httpx2.Response) -> list[str]:
        try:
            return list(response.json().get("tags") or ())
        except (
            ValueError,
            TypeError,
            AttributeError,
        ) as error:  # a proxy's page, or no registry at all
            problem = "what it sends is no list of tags: is it a registry?"
            raise StoreUnreachable(store=self.url, problem=problem) from error

    def delete_manifest(self, digest: str) -> None:
        """Removes the manifest; see `Registry`."""
        url = f"{self._root}/manifests/{digest}"
        with self._ask("DELETE", url, 200, 202, 404, 405) as response:
            if response.status_code == 405:
                raise StoreRefused(store=self.url, problem=_DELETES_NOTHING)

    @contextmanager
    def _ask(
        self,
        method: str,
        url: str | Callable[[], str],
        *expected: int,
        headers: dict[str, str] | None = None,
        body: Body | None = None,
    ) -> Iterator[httpx2.Response]:
        """The response to a request, its body unread.

        Args:
            url: where to, or what asks for it anew before each attempt.
            body: begins the body anew for each attempt.
        Raises:
            StoreUnreachable: no answer, or none that was expected, several times.
            StoreRefused: it does not take our credentials.
        """
        response = self._response(method, url, expected, headers or {}, body)
        try:
            yield response
        except httpx2.TransportError as error:
            raise StoreUnreachable(store=self.url, problem=_words(error)) from error
        finally:
            response.close()

    def _response(
        self,
        method: str,
        url: str | Callable[[], str],
        expected: tuple[int, ...],
        headers: dict[str, str],
        body: Body | None,
    ) -> httpx2.Response:
        is_push, was_challenged = method not in ("GET", "HEAD"), False
        num_failures, problem = 0, ""
        while num_failures < _NUM_ATTEMPTS:
            wait_s = 0.0
            try:
                response = self._send(method, url, headers, body, is_push)
                if response.status_code in expected:
                    return response
                response.read()
                problem = _problem(response)
                wait_s = _retry_after_s(response)
            except httpx2.TransportError as error:
                problem = _words(error)
                if any(mark in problem for mark in _NO_TLS):
                    plain = self.url.replace("oci://", "oci+http://", 1)
                    problem = f"it speaks no TLS; without TLS its name is {plain}"
                    break
            else:
                if response.status_code == 401 and not was_challenged:
                    was_challenged = True
                    self._auth.answer(response, is_push, self.url)
                    continue
                if response.status_code in (401, 403):
                    raise StoreRefused(store=self.url, problem=problem)
                if not _may_pass(response.status_code, problem):
                    break
            num_failures += 1
            if num_failures < _NUM_ATTEMPTS:
                pause_s = self._first_wait_s * 2 ** (num_failures - 1) * random.uniform(0.5, 1.0)
                time.sleep(min(max(pause_s, wait_s), _MAX_WAIT_S))
        raise StoreUnreachable(store=self.url, problem=problem)

    def _send(
        self,
        method: str,
        url: str | Callable[[], str],
        headers: dict[str, str],
        body: Body | None,
        is_push: bool,
    ) -> httpx2.Response:
        to = url if isinstance(url, str) else url()
        shown = self._auth.headers(is_push) if self._is_ours(to) else {}
        content = None if body is None else body()
        request = self._client.build_request(
            method, to, headers={**headers, **shown}, content=content
        )
        return self._client.send(request, stream=True)

    def _is_ours(self, url: str) -> bool:
        # An upload may be sent to another host, which our credentials do not concern.
        ours, theirs = urlsplit(self._origin), urlsplit(url)
        return (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)


def _chunks(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _problem(response: httpx2.Response) -> str:
    """What the registry says is wrong, in a line."""
    try:
        response.read()
        errors: Any = response.json()["errors"]
        said = "; ".join(f"{error['code']}: {error.get('message', '')}" for error in errors)
    except (ValueError, KeyError, TypeError):
        said = ""  # not a registry's own words
    return f"HTTP {response.status_code}{f' ({said[:200]})' if said else ''}"


def _may_pass(status: int, problem: str) -> bool:
    """Claims that trying again can help."""
    # Blobs that two push at once may not be found for a moment.
    return status >= 500 or status in (408, 429) or "BLOB_UNKNOWN" in problem


def _words(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}{f' ({text})' if text else ''}"


def _retry_after_s(response: httpx2.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0
