"""One build in a child process: a crash, or the system's out-of-memory killer, ends only the child.

What the child is told and tells is written at the head of build_child.py.
"""

import asyncio
import base64
import json
import time
from collections.abc import Sequence

import structlog
from google.rpc import status_pb2

from compiler_service.progress import BuildProgress, remaining_s

_TERMINATE_S = 5.0
_MAX_LINE_BYTES = 1 << 20


class BuildProcess:
    """A running build. The child sees to it that it dies with this process; call `end` anyhow.

    Args:
        command: starts the child.
        job: the line that the child reads.
    """

    def __init__(self, command: Sequence[str], job: str) -> None:
        self._command = command
        self._job = job
        self._process: asyncio.subprocess.Process | None = None
        self._start = time.monotonic()
        self._end = 0.0
        self._stages: list[tuple[str, float]] = []
        self.progress: BuildProgress | None = None

    async def run(self) -> status_pb2.Status | None:
        """How the build ended: OK, or why not; None where the child ended without a word."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            # A Ctrl-C in the terminal is for the daemon, which then returns the build.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(self._job.encode())
            await self._process.stdin.drain()
            self._process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it ended before it read its job: it is found out below
        async for line in self._process.stdout:
            status = self._take(line)
            if status is not None:
                self._end = time.monotonic()
                return status
        code = await self._process.wait()
        structlog.get_logger().warning("build_child_ended", exit_code=code)
        return None

    async def end(self) -> None:
        """Ends the child if it runs: asks it to, and kills it where it does not listen."""
        if self._process is None or self._process.returncode is not None:
            return
        if self._end:  # it has said its last word
            self._process.kill()
        else:
            self._process.terminate()
        try:
            async with asyncio.timeout(_TERMINATE_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    @property
    def stages(self) -> list[tuple[str, float, float]]:
        """Each stage so far, in order: its name, and when it began and ended (monotonic)."""
        ends = [start for _, start in self._stages[1:]] + [self._end or time.monotonic()]
        return [(stage, start, end) for (stage, start), end in zip(self._stages, ends, strict=True)]

    @property
    def stage_timings(self) -> list[tuple[str, float]]:
        """How long each stage took so far, in order."""
        return [(stage, round(end - start, 3)) for stage, start, end in self.stages]

    def _take(self, line: bytes) -> status_pb2.Status | None:
        try:
            message = json.loads(line)
            if "engine" in message:
                return status_pb2.Status()
            if "error" in message:
                return status_pb2.Status.FromString(base64.b64decode(message["error"]))
            stage, fraction = str(message["stage"]), float(message["fraction"])
            done, total = int(message["done_bytes"]), int(message["total_bytes"])
        except (ValueError, KeyError, TypeError):
            # A library printed to stdout.
            text = line[:200].decode(errors="replace").rstrip()
            structlog.get_logger().warning("build_child_said", text=text)
            return None
        now = time.monotonic()
        if not self._stages or self._stages[-1][0] != stage:
            self._stages.append((stage, now))
        eta_s = remaining_s(now - self._start, stage, fraction)
        self.progress = BuildProgress(stage, fraction, done, total, eta_s)
        return None
