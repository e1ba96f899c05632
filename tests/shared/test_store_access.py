"""Stores elsewhere that refuse, are missing, stumble or lie; and tools that read what we wrote."""

import base64
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest

from shared.engine import EngineSelector
from shared.errors import (
    BlobNotFound,
    InvalidField,
    MillraceError,
    StoreNotFound,
    StoreRefused,
    StoreUnreachable,
)
from shared.store import LocalStore, open_store, pull
from shared.store.oci_registry import OciRegistry
from shared.store.registry_auth import Credentials, challenge_of, credentials_for
from shared.store.registry_store import RegistryStore
from shared.store.s3 import S3Registry
from tests.shared.engines import INT8, engine_key, publish_engine, weight_bytes
from tests.shared.remote_stores import opened
from tests.shared.store_servers import S3Server, oci_registry

USER, PASSWORD = "builder", "open sesame"
HTPASSWD = "builder:$2b$04$QBBHow9ER11V1pycjptVFuSPVV69SxlkwQgJI4fmM25SSTCICuI.m"
DIGEST = "sha256:" + "0" * 64


def every_use(store: RegistryStore, local: LocalStore) -> list[Callable[[], object]]:
    """What can be done to a store that must fail with one clear error."""
    engine = publish_engine(local)
    return [
        store.check,
        store.list,
        lambda: store.find(EngineSelector("tiny", "cpu", INT8)),
        lambda: store.get("0" * 64),
        lambda: b"".join(store.read(DIGEST)),
        lambda: store.push(local, engine),
    ]


def refusals(store: RegistryStore, folder: Path, kind: type[MillraceError]) -> set[str]:
    """The sentences of all uses of the store, each of which raises `kind`."""
    said = set()
    for use in every_use(store, LocalStore(folder / "refused")):
        with pytest.raises(kind) as refused:
            use()
        assert "\n" not in str(refused.value)
        said.add(str(refused.value))
    return said


def test_missing_bucket_is_named(aws: S3Server, tmp_path: Path) -> None:
    for sentence in refusals(opened("s3://no-such-bucket/x"), tmp_path, StoreNotFound):
        assert "s3://no-such-bucket/x does not exist: there is no such bucket" in sentence


def test_wrong_aws_credentials_are_refused_without_showing_them(
    aws: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    for sentence in refusals(opened(s3_url), tmp_path, StoreRefused):
        # An answer to HEAD has no words.
        assert "SignatureDoesNotMatch" in sentence or "403 Forbidden" in sentence
        assert "secret" not in sentence.replace("credentials", "")


@pytest.mark.parametrize("url", ["s3://bucket/x", "oci+http://127.0.0.1:1/x"])
def test_store_that_does_not_answer_is_named_and_may_be_tried_again(
    url: str, aws: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    registry = (
        S3Registry("bucket", "x", retry_timeout_s=0.2)
        if url.startswith("s3:")
        else OciRegistry("127.0.0.1:1", "x", is_plain=True, first_wait_s=0.001)
    )
    with pytest.raises(StoreUnreachable, match="does not answer") as lost:
        RegistryStore(registry).check()
    assert url in str(lost.value)
    assert "retr" not in str(lost.value)  # how often it was tried is nothing that helps
    assert lost.value.retry_after_s


def test_bucket_without_any_credentials_says_which_are_missing(
    aws: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreRefused, match="AWS_ACCESS_KEY_ID is not set"):
        RegistryStore(S3Registry("bucket", "x", retry_timeout_s=0.2)).check()


def test_registry_without_tls_is_told_by_the_name_that_it_needs(tmp_path: Path) -> None:
    with oci_registry(tmp_path) as host, pytest.raises(StoreUnreachable) as refused:
        open_store(f"oci://{host}/engines").list()
    assert str(refused.value).endswith(
        f"it speaks no TLS; without TLS its name is oci+http://{host}/engines."
    )


@pytest.mark.parametrize(
    "url",
    [
        "s3://", "s3:///prefix", "s3://key:secret@bucket/x", "s3://bucket/x?region=y",
        "oci://", "oci://host", "oci://user:secret@host/name", "oci://host/Name", "oci://host/a//b",
        "oci://host/name:tag", "oci://host/name?x=1",
    ],
)  # fmt: skip
def test_url_of_another_form_is_refused_without_showing_secrets(url: str, aws: S3Server) -> None:
    with pytest.raises(InvalidField, match="store") as refused:
        open_store(url)
    assert "secret" not in str(refused.value)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[str]:
    """A registry that wants a user's password."""
    (tmp_path / "guarded").mkdir()
    with oci_registry(tmp_path / "guarded", HTPASSWD) as address:
        yield f"oci+http://{address}/team/engines"


def docker_config(path: Path, host: str, secret: str) -> None:
    """Docker's file with one login."""
    path.parent.mkdir(exist_ok=True)
    auth = base64.b64encode(f"{USER}:{secret}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def test_registry_takes_the_login_of_docker_and_no_other(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, config = guarded.split("/")[2], tmp_path / "docker" / "config.json"
    monkeypatch.setenv("DOCKER_CONFIG", str(config.parent))
    for sentence in refusals(opened(guarded), tmp_path, StoreRefused):
        assert f"no file of Docker's has any for {host}" in sentence
    docker_config(config, host, "a wrong secret")
    for sentence in refusals(opened(guarded), tmp_path, StoreRefused):
        assert "HTTP 401" in sentence
        assert "secret" not in sentence
    docker_config(config, host, PASSWORD)
    local = LocalStore(tmp_path / "local")
    engine = publish_engine(local)
    assert opened(guarded).push(local, engine) == engine
    docker_config(tmp_path / "podman.json", host, PASSWORD)
    config.unlink()
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "podman.json"))
    assert opened(guarded).list() == (engine,)


def test_credentials_come_from_helpers_too_and_hide_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        '#!/bin/sh\nread host; echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"of $host\\"}"'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    config = tmp_path / "config.json"
    for content in (
        {"credHelpers": {"host": "test"}},
        {"credsStore": "test", "auths": {"host": {}}},
    ):
        config.write_text(json.dumps(content))
        found = credentials_for("host", [tmp_path / "none.json", config])
        assert found == Credentials("u", "of host")
        assert "of host" not in repr(found)
        assert credentials_for("another", [config]) is None
    for broken in (
        "{",
        "[]",
        '{"auths": {"host": {"auth": "!"}}}',
        '{"credHelpers":{"host":"no"}}',
    ):
        config.write_text(broken)
        with pytest.raises(StoreRefused, match=r"config\.json"):
            credentials_for("host", [config])


def test_challenge_is_read() -> None:
    header = 'Bearer realm="https://auth/token",service="r",scope="repository:a:pull,push"'
    assert challenge_of(header) == (
        "bearer",
        {"realm": "https://auth/token", "service": "r", "scope": "repository:a:pull,push"},
    )


class Script(BaseHTTPRequestHandler):
    """A registry of few words: it does what `server.answers` says, by method and path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answers = self.server.answers  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        seen = {name: self.headers.get(name) for name in ("Authorization", "Range")}
        self.server.seen.append((self.path, seen))  # type: ignore[attr-defined]
        status, headers, body = answers[path](seen) if path in answers else (404, {}, b"")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Says nothing."""


Answer = Callable[[dict[str, str | None]], tuple[int, dict[str, str], bytes]]


@contextmanager
def scripted(answers: dict[str, Answer]) -> Iterator[tuple[str, list[tuple[str, dict[str, str]]]]]:
    """A running registry of `answers`; its address, and what it was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.answers, server.seen = answers, []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


def registry_at(address: str) -> OciRegistry:
    """The repository `a` there, of little patience."""
    return OciRegistry(address, "a", is_plain=True, first_wait_s=0.001)


BLOB, TAGS, BODY = f"/v2/a/blobs/{DIGEST}", "/v2/a/tags/list", b"0123456789"


def test_token_is_fetched_with_the_login_and_sent_to_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, Answer] = {}

    def tags(seen: dict[str, str | None]) -> tuple[int, dict[str, str], bytes]:
        if seen["Authorization"] == "Bearer good":
            return 200, {}, b'{"tags": ["x"]}'
        realm = f'Bearer realm="http://{address}/token",service="s",scope="repository:a:pull"'
        return 401, {"WWW-Authenticate": realm}, b""

    login = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    answers["/v2/a/tags/list"] = tags
    answers["/token"] = lambda seen: (
        (200, {}, b'{"token": "good"}') if seen["Authorization"] == login else (401, {}, b"")
    )
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with scripted(answers) as (address, seen):
        with pytest.raises(StoreRefused, match="no token from"):
            registry_at(address).tags()
        docker_config(tmp_path / "docker/config.json", address, PASSWORD)
        registry = registry_at(address)
        assert registry.tags() == registry.tags() == ("x",)
        assert [path for path, _ in seen].count("/token?service=s&scope=repository%3Aa%3Apull") == 2


def test_login_is_not_sent_to_a_token_server_without_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.store.registry_auth import RegistryAuth

    auth = RegistryAuth("host", registry_at("127.0.0.1:1")._client, is_plain=False)
    with pytest.raises(StoreRefused, match="it wants a token from"):
        auth._token({"realm": "http://127.0.0.1:1/token"}, Credentials("u", "s"), "oci://host/a")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_registry_that_stumbles_is_asked_again(status: int) -> None:
    left = [status, status]

    def tags(_: object) -> tuple[int, dict[str, str], bytes]:
        return (left.pop(), {}, b"") if left else (200, {}, b'{"tags": ["x"]}')

    with scripted({TAGS: tags}) as (address, _):
        assert registry_at(address).tags() == ("x",)
        left.extend([status] * 9)
        with pytest.raises(StoreUnreachable, match=f"HTTP {status}"):
            registry_at(address).tags()
        assert len(left) == 4


def test_registry_that_says_that_we_are_wrong_is_asked_once() -> None:
    answer = b'{"errors": [{"code": "TAG_INVALID", "message": "no such form"}]}'
    with scripted({TAGS: lambda _: (400, {}, answer)}) as (address, seen):
        with pytest.raises(StoreUnreachable, match="TAG_INVALID: no such form"):
            registry_at(address).tags()
        assert len(seen) == 1


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b"[]", b'{"tags": 7}'])
def test_what_is_no_registry_is_said_to_be_none(page: bytes) -> None:
    """A proxy's page, or the wrong address: not an unforeseen failure."""
    with scripted({TAGS: lambda _: (200, {}, page)}) as (address, _):
        for ask in (registry_at(address).tags, registry_at(address).check):
            with pytest.raises(StoreUnreachable, match="is it a registry"):
                ask()


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b"[]", b"{}"])
def test_what_is_no_token_is_not_sent_as_one(
    page: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    answers: dict[str, Answer] = {"/token": lambda _: (200, {}, page)}
    with scripted(answers) as (address, seen):
        realm = f'Bearer realm="http://{address}/token",service="s"'
        answers[TAGS] = lambda _: (401, {"WWW-Authenticate": realm}, b"")
        with pytest.raises(StoreUnreachable, match="is no token"):
            registry_at(address).tags()
        assert all(shown["Authorization"] is None for _, shown in seen)


def test_tags_come_in_pages() -> None:
    pages = [b'{"tags": ["a", "b"]}', b'{"tags": ["c"]}']
    link = {"Link": '</v2/a/tags/list?last=b&n=2>; rel="next"'}

    def tags(_: object) -> tuple[int, dict[str, str], bytes]:
        return 200, link if len(pages) == 2 else {}, pages.pop(0)

    with scripted({TAGS: tags}) as (address, _):
        assert registry_at(address).tags() == ("a", "b", "c")


def test_login_stays_behind_where_a_blob_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registries send readers to a bucket, which must not learn the token."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with scripted({"/elsewhere": lambda _: (206, {}, BODY[4:])}) as (other, seen):

        def blob(shown: dict[str, str | None]) -> tuple[int, dict[str, str], bytes]:
            if shown["Authorization"] is None:
                return 401, {"WWW-Authenticate": 'Basic realm="x"'}, b""
            return 307, {"Location": f"http://{other}/elsewhere"}, b""

        with scripted({BLOB: blob}) as (address, _):
            docker_config(tmp_path / "docker/config.json", address, PASSWORD)
            assert b"".join(registry_at(address).read(DIGEST, 4)) == BODY[4:]
        assert seen == [("/elsewhere", {"Authorization": None, "Range": "bytes=4-"})]


def test_registry_that_knows_no_ranges_is_read_all_the_same() -> None:
    with scripted({BLOB: lambda _: (200, {}, BODY)}) as (address, _):
        for offset in range(len(BODY) + 1):
            assert b"".join(registry_at(address).read(DIGEST, offset)) == BODY[offset:]
        with pytest.raises(BlobNotFound):
            b"".join(registry_at(address).read("sha256:" + "1" * 64))


def skopeo(*arguments: str) -> str:
    """What skopeo says."""
    done = subprocess.run(
        ["skopeo", "--insecure-policy", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_skopeo_copied_to_a_registry_is_found_there(oci_url: str, tmp_path: Path) -> None:
    local, other = LocalStore(tmp_path / "local"), LocalStore(tmp_path / "other")
    engine = publish_engine(local)
    name = oci_url.removeprefix("oci+http:")
    ref = engine.key.digest
    skopeo("copy", "--dest-tls-verify=false", f"oci:{local.root}:{ref}", f"docker:{name}:{ref}")
    found = opened(oci_url).find(EngineSelector("tiny", "cpu", INT8))
    assert found is not None
    assert found.manifest == engine.manifest
    other.verify(pull(opened(oci_url), found, other))


def test_what_was_pushed_to_a_registry_is_what_skopeo_knows(oci_url: str, tmp_path: Path) -> None:
    local = LocalStore(tmp_path / "local")
    engines = [publish_engine(local, engine_key(arch)) for arch in ("cpu", "sm_90")]
    for engine in engines:
        opened(oci_url).push(local, engine)
    at = "docker:" + oci_url.removeprefix("oci+http:")
    shown = json.loads(skopeo("inspect", "--tls-verify=false", f"{at}:{engines[0].key.digest}"))
    assert shown["Digest"] == engines[0].manifest.digest
    index = json.loads(skopeo("inspect", "--tls-verify=false", "--raw", f"{at}:tiny-int8"))
    assert {each["platform"]["variant"] for each in index["manifests"]} == {"cpu", "sm_90"}
    copied = f"oci:{tmp_path / 'copied'}:tiny-int8"
    skopeo("copy", "--all", "--src-tls-verify=false", f"{at}:tiny-int8", copied)


def test_copy_of_a_bucket_is_an_image_layout(s3_url: str, tmp_path: Path) -> None:
    local = LocalStore(tmp_path / "local")
    engine = publish_engine(local, weights=weight_bytes(50_000))
    remote = opened(s3_url)
    remote.push(local, engine)
    assert isinstance(remote.registry, S3Registry)
    for batch in obstore.list(remote.registry._objects):
        for each in batch:
            path = tmp_path / "copy" / each["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(obstore.get(remote.registry._objects, each["path"]).bytes())
    shown = json.loads(skopeo("inspect", f"oci:{tmp_path / 'copy'}:{engine.key.digest}"))
    assert shown["Digest"] == engine.manifest.digest
    assert len(shown["Layers"]) == 2
