"""Real servers that hold remote stores, each of its own test run, on free ports of 127.0.0.1.

`docker-registry` is Debian's; `weed` is SeaweedFS, whose S3 checks signatures and conditions.
"""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

REGISTRY = shutil.which("docker-registry")
_START_S, _NUM_STARTS = 40.0, 3
_SHELL_TIMEOUT_S = 40.0  # of the command that makes the bucket; it takes about a second


class NotStarted(Exception):
    """A server does not run; what it said."""


@dataclass(frozen=True)
class S3Server:
    """A running S3 and what it takes to use it."""

    endpoint: str
    access_key: str = "test-access"
    secret_key: str = "test-secret-that-must-not-be-logged"

    @property
    def environ(self) -> dict[str, str]:
        """The standard AWS variables."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def s3_server(folder: Path, bucket: str) -> Iterator[S3Server]:
    """SeaweedFS in `folder`, with one bucket."""
    for attempt in range(_NUM_STARTS):
        place = folder / str(attempt)
        place.mkdir()
        with contextlib.ExitStack() as running:
            try:
                server = running.enter_context(_s3_server(place, bucket))
            except NotStarted:  # somebody took one of its many ports meanwhile
                if attempt + 1 == _NUM_STARTS:
                    raise
                continue
            yield server
            return


@contextmanager
def _s3_server(folder: Path, bucket: str) -> Iterator[S3Server]:
    weed = str(Path(sys.executable).parent / "weed")
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = _free_ports(8)
    server = S3Server(f"http://127.0.0.1:{s3}")
    keys = [{"accessKey": server.access_key, "secretKey": server.secret_key}]
    identity = {"name": "test", "credentials": keys, "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [
        weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}",
        f"-master.port={master}", f"-master.port.grpc={master_grpc}",
        "-master.volumePreallocate=false", "-master.volumeSizeLimitMB=128",
        "-master.telemetry=false", f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}",
        "-volume.max=8", "-filer", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}",
        "-s3", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-s3.iam=false", "-s3.autoCreateBucket=false", f"-s3.config={folder / 's3.json'}",
    ]  # fmt: skip
    with _running(command, folder) as process:
        _wait_for(s3, process, folder)
        shell = [weed, "shell", f"-master=127.0.0.1:{master}.{master_grpc}"]
        shell.append(f"-filer=127.0.0.1:{filer}.{filer_grpc}")
        try:
            done = subprocess.run(
                shell, input=f"s3.bucket.create -name {bucket}\n", text=True,
                capture_output=True, timeout=_SHELL_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:  # it waits for ever for a server it cannot find
            raise NotStarted(f"the shell found no server: {error}") from None
        if "created bucket" not in done.stdout:
            raise NotStarted(done.stdout + done.stderr)
        yield server


@contextmanager
def oci_registry(folder: Path, password_hash: str = "") -> Iterator[str]:
    """Debian's registry in `folder`; its `host:port`.

    Args:
        password_hash: a line of an htpasswd file: whom it takes; empty: anybody.
    """
    assert REGISTRY is not None, "apt-get install docker-registry"
    (port,) = _free_ports(1)
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "warn"},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "data")},
            "delete": {"enabled": True},
        },
        "http": {"addr": f"127.0.0.1:{port}", "secret": "test"},
    }
    if password_hash:
        (folder / "htpasswd").write_text(f"{password_hash}\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    # JSON is YAML.
    (folder / "config.yml").write_text(json.dumps(config))
    with _running([REGISTRY, "serve", str(folder / "config.yml")], folder) as process:
        _wait_for(port, process, folder)
        yield f"127.0.0.1:{port}"


class BreakingProxy:
    """A way to a server that breaks off, or stands still, after so many bytes.

    Args:
        limits: bytes that a connection may carry; each limit breaks the first one that reaches it,
            and then the next limit counts. After these it carries all that there is.
        breaks: "answers" or "requests": whose bytes count.
        stands_still: it carries no more then, instead of breaking off; `reached` tells of it.
        ends: the first limit that is reached is the end of all connections.
    """

    def __init__(
        self,
        address: str,
        limits: Iterable[int] = (),
        *,
        breaks: str = "answers",
        stands_still: bool = False,
        ends: bool = False,
    ) -> None:
        host, _, port = address.partition(":")
        self._server = (host, int(port))
        self._limits, self._breaks = list(limits), breaks
        self._stands_still, self._ends = stands_still, ends
        self.num_bytes = {"answers": 0, "requests": 0}
        self.num_breaks = 0
        self.reached = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            if self._ends and self.reached.is_set():
                client.close()
                continue
            server = socket.create_connection(self._server)
            for pair in ((client, server, "requests"), (server, client, "answers")):
                threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, kind: str) -> None:
        carried, is_broken = 0, False
        with contextlib.suppress(OSError):
            while not is_broken and (data := source.recv(1 << 16)):
                with self._lock:
                    if kind == self._breaks and self._limits:
                        data = data[: max(self._limits[0] - carried, 0)]
                        is_broken = carried + len(data) >= self._limits[0]
                    carried += len(data)
                    self.num_bytes[kind] += len(data)
                    if is_broken:
                        self._limits.pop(0)
                        self.num_breaks += 1
                to.sendall(data)
        if is_broken:
            self.reached.set()
            if self._stands_still:
                self._released.wait()
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def _running(command: list[str], folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/v2/")
            if connection.getresponse().status < 500:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise NotStarted((folder / "log").read_text()[-2000:])


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]
