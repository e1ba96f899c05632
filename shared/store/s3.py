"""A `Registry` in a bucket of any S3.

Below the prefix lies an OCI image layout, so that a copy of it is one on disk too:

    oci-layout             the layout's version
    index.json             every tag and what it names; changed only on condition that it is as read
    blobs/sha256/<hex>     blobs and manifests
    fresh/<hex>            a blob on its way to being as young as a new one

Credentials, region and endpoint are those of the standard AWS variables, or of the machine's role.
Source: OCI image-spec 1.1, image-layout.md; S3's conditional writes.
"""

import json
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from shared.engine import Blob, canonical_json, is_digest
from shared.errors import (
    BlobNotFound,
    InvalidField,
    StoreNotFound,
    StoreRefused,
    StoreUnreachable,
)
from shared.settings import s3_is_plain
from shared.store import oci
from shared.store.blob_writer import CHUNK_BYTES
from shared.store.blobs import Sweep
from shared.store.local import DEFAULT_GRACE_S
from shared.store.registry import Manifest, TagMoved

_INDEX, _LAYOUT = "index.json", "oci-layout"
_MAX_CHANGES, _CHANGE_WAIT_S = 50, 0.2
_BLOBS, _FRESH, _CLOCKS = "blobs/sha256/", "fresh/", "clocks/"
# A push may take half of what a sweep spares, and clocks may differ by some of the other half.
_YOUNG_S = DEFAULT_GRACE_S / 2

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NO_RANGE = re.compile(r"<Code>InvalidRange|status code: 416")

# Without variables of it the credentials are those of the machine's role, asked for here.
_NO_ROLE = "/latest/api/token"
# What was asked how often and for how long says no more than that there is no answer.
_TRIES = re.compile(
    r"(?:Generic S3 error: )?Error performing (\w+ \S+) in .*? - (?:HTTP error: )?(.*)"
)

Tags = dict[str, Blob]


class S3Registry:
    """The objects of `bucket` whose names begin with `prefix`.

    Args:
        retry_timeout_s: how long one request may be tried again.
        young_s: a blob that is older is made young when it is adopted.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        retry_timeout_s: float = 30.0,
        young_s: float = _YOUNG_S,
    ) -> None:
        self._young_s = young_s
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        try:
            self._objects = S3Store(
                bucket,
                prefix=prefix or None,
                client_options={
                    "allow_http": s3_is_plain(),
                    "connect_timeout": timedelta(seconds=10),
                    "read_timeout": timedelta(seconds=60),
                    # In all: a large blob on a slow line takes long.
                    "timeout": timedelta(hours=6),
                },
                retry_config={
                    "max_retries": 5,
                    "retry_timeout": timedelta(seconds=retry_timeout_s),
                },
            )
        except BaseError as error:
            raise InvalidField(field="store", problem=f"{self.url}: {_words(error)}") from error

    @staticmethod
    def from_url(url: str) -> "S3Registry":
        """The objects at an `s3://bucket/prefix` URL.

        Raises:
            InvalidField: it is not of that form, or the AWS variables contradict themselves.
        """
        parts = urlsplit(url)
        if not parts.netloc or "@" in parts.netloc or parts.query or parts.fragment:
            raise InvalidField(field="store", problem="an s3:// URL is s3://bucket/prefix")
        return S3Registry(parts.netloc, unquote(parts.path).strip("/"))

    @property
    def settle_s(self) -> float:
        """0: S3's conditional writes are exact."""
        return 0.0

    def check(self) -> None:
        """Returns if it answers and takes our credentials; see `Registry`."""
        self._read_index()

    def has(self, digest: str) -> bool:
        """Claims that the blob is there; see `Registry`."""
        with self._told():
            try:
                obstore.head(self._objects, _path(digest))
            except FileNotFoundError:
                return False
        return True

    def adopt(self, digest: str) -> bool:
        """Claims that the blob is there and young: an old one is copied there and back for it."""
        path, fresh = _path(digest), _FRESH + digest.removeprefix("sha256:")
        with self._told():
            try:
                made_s = obstore.head(self._objects, path)["last_modified"].timestamp()
                if time.time() - made_s > self._young_s:
                    # S3 copies no object onto itself, and knows no other way to make one younger.
                    obstore.copy(self._objects, path, fresh)
                    obstore.copy(self._objects, fresh, path)
                    obstore.delete(self._objects, fresh)
            except FileNotFoundError:
                return False
        return True

    def read(self, digest: str, offset: int = 0) -> Iterator[bytes]:
        """A blob's bytes from `offset` on; see `Registry`."""
        with self._told():
            try:
                found = obstore.get(
                    self._objects, _path(digest), options={"range": {"offset": offset}}
                )
            except FileNotFoundError as error:
                self._require_bucket(error)
                raise BlobNotFound(digest=digest) from error
            except BaseError as error:
                if _NO_RANGE.search(str(error)):  # nothing is left of it
                    return
                raise
            for chunk in found.stream(CHUNK_BYTES):
                yield bytes(chunk)

    def upload(self, blob: Blob, content: Path | bytes) -> None:
        """Puts the blob there; see `Registry`."""
        with self._told():
            try:
                obstore.put(self._objects, _path(blob.digest), content)
            except FileNotFoundError as error:
                self._require_bucket(error)
                raise

    def manifest(self, reference: str) -> Manifest | None:
        """The manifest that a tag or a digest names; see `Registry`."""
        if is_digest(reference):
            digest = reference
        else:
            named = self._read_index()[0].get(reference)
            if named is None:
                return None
            digest = named.digest
        content = self._object(_path(digest))
        if content is None:
            return None
        return Blob(_media_type_of(content), digest, len(content)), content

    def put_manifest(
        self, content: bytes, media_type: str, tag: str = "", replaces: str | None = None
    ) -> Blob:
        """Puts a manifest there, and gives it the tag; see `Registry`."""
        blob = oci.blob_from(content, media_type)
        self.upload(blob, content)
        if tag:

            def set_tag(tags: Tags) -> Tags:
                if (tags[tag].digest if tag in tags else None) != replaces:
                    raise TagMoved
                return {**tags, tag: blob}

            self._change_tags(set_tag)
        return blob

    def tags(self) -> tuple[str, ...]:
        """All tags; see `Registry`."""
        return tuple(self._read_index()[0])

    def delete_manifest(self, digest: str) -> None:
        """Removes the manifest and its tags; see `Registry`."""
        self._change_tags(
            lambda tags: {tag: blob for tag, blob in tags.items() if blob.digest != digest}
        )
        with self._told():
            obstore.delete(self._objects, _path(digest))

    def sweep(self, grace_s: float) -> Sweep:
        """Removes what no tag leads to and is older than `grace_s`, by the server's clock.

        A push that began later finds what it names young (`adopt`), or looks again when its tag is
        there. Several may sweep at once.
        """
        with self._told():
            # Each sweep has a clock of its own, which others leave alone unless it was left behind.
            clock = f"{_CLOCKS}{secrets.token_hex(8)}"
            obstore.put(self._objects, clock, b"")
            now_s = obstore.head(self._objects, clock)["last_modified"].timestamp()
            obstore.delete(self._objects, clock)
            spared_s = {_BLOBS: grace_s, _FRESH: grace_s, _CLOCKS: max(grace_s, DEFAULT_GRACE_S)}
            found = [
                one
                for prefix in spared_s
                for page in obstore.list(self._objects, prefix)
                for one in page
                if one["last_modified"].timestamp() <= now_s - spared_s[prefix]
            ]
        # Only now: what was tagged until here is kept.
        keep = {_path(digest) for digest in self._tagged_digests()}
        num_blobs = num_bytes = 0
        for one in found:
            if one["path"] not in keep and self._delete_old(one["path"], now_s - grace_s):
                num_blobs, num_bytes = num_blobs + 1, num_bytes + one["size"]
        return Sweep(num_blobs, num_bytes)

    def _delete_old(self, path: str, old_s: float) -> bool:
        """Whether it was there, and still as old."""
        with self._told():
            try:
                if obstore.head(self._objects, path)["last_modified"].timestamp() > old_s:
                    return False
            except FileNotFoundError:
                return False
            obstore.delete(self._objects, path)
        return True

    def _tagged_digests(self) -> set[str]:
        """Everything that a tag leads to: indexes, manifests, and what these name in any field."""
        found: set[str] = set()
        ahead = {blob.digest for blob in self._read_index()[0].values()}
        while ahead:
            digest = ahead.pop()
            found.add(digest)
            content = self._object(_path(digest))
            named = set(_DIGEST.findall((content or b"").decode(errors="replace")))
            if content is not None and _media_type_of(content) == oci.INDEX_TYPE:
                ahead |= named - found
            else:
                found |= named
        return found

    def _read_index(self) -> tuple[Tags, str | None]:
        """What is tagged, and the version of `index.json` that says so; None where there is none."""
        with self._told():
            try:
                found = obstore.get(self._objects, _INDEX)
            except FileNotFoundError as error:
                self._require_bucket(error)
                return {}, None
            text, version = bytes(found.bytes()), found.meta["e_tag"]
        return oci.tags_in_layout(text), version

    def _change_tags(self, change: Callable[[Tags], Tags]) -> None:
        for _ in range(_MAX_CHANGES):
            tags, version = self._read_index()
            changed = change(tags)
            if changed == tags:
                return
            with self._told():
                try:
                    if version is None:
                        obstore.put(self._objects, _LAYOUT, canonical_json(oci.LAYOUT))
                    text = oci.layout_index_json(sorted(changed.items()))
                    if version is None:
                        obstore.put(self._objects, _INDEX, text, mode="create")
                    else:
                        obstore.put(self._objects, _INDEX, text, mode={"e_tag": version})
                    return
                except (AlreadyExistsError, PreconditionError):
                    pass  # somebody else changed it: what is wanted is asked of what is there now
            time.sleep(random.uniform(0, _CHANGE_WAIT_S))
        raise StoreUnreachable(store=self.url, problem="others keep changing its index.json")

    def _object(self, path: str) -> bytes | None:
        with self._told():
            try:
                return bytes(obstore.get(self._objects, path).bytes())
            except FileNotFoundError as error:
                self._require_bucket(error)
                return None

    def _require_bucket(self, error: FileNotFoundError) -> None:
        if "NoSuchBucket" in str(error):
            raise StoreNotFound(store=self.url, problem="there is no such bucket") from error

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what S3 says into our errors."""
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreRefused(store=self.url, problem=_words(error)) from error
        except BaseError as error:
            if _NO_ROLE in str(error):
                problem = "AWS_ACCESS_KEY_ID is not set, and the machine has no role"
                raise StoreRefused(store=self.url, problem=problem) from error
            if "NoSuchBucket" in str(error):
                problem = "there is no such bucket"
                raise StoreNotFound(store=self.url, problem=problem) from error
            raise StoreUnreachable(store=self.url, problem=_words(error)) from error


def _path(digest: str) -> str:
    if not is_digest(digest):
        raise InvalidField(field="digest", problem=f"{digest!r} is not sha256: and 64 digits")
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def _words(error: Exception) -> str:
    """What is wrong, in a few words: S3's own code, where it says one."""
    code = re.search(r"<Code>(\w+)</Code>|status code: (4\d\d[ \w]*)", str(error))
    if code:
        return code[1] or code[2]
    return _TRIES.sub(r"\2 (\1)", str(error).splitlines()[0])[:300].rstrip(" .:")


def _media_type_of(manifest: bytes) -> str:
    try:
        return str(json.loads(manifest)["mediaType"])
    except (ValueError, KeyError, TypeError):
        return ""
