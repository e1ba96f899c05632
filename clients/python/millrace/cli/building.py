"""`millrace build`: asks for engines and shows how they come about."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from millrace.builds import RecipeOptions, raise_if_failed
from millrace.cli import output
from millrace.cli.failures import USAGE, CommandFailed
from millrace.client import Client
from millrace.compiler.v1 import compiler_pb2 as pb

if TYPE_CHECKING:
    from rich.progress import Progress

_STATES = {
    pb.BUILD_STATE_QUEUED: "queued",
    pb.BUILD_STATE_RUNNING: "running",
    pb.BUILD_STATE_SUCCEEDED: "succeeded",
    pb.BUILD_STATE_FAILED: "failed",
    pb.BUILD_STATE_CANCELLED: "cancelled",
}


def state_text(build: pb.Build) -> str:
    """Where a build stands, in a word."""
    if build.state == pb.BUILD_STATE_SUCCEEDED and build.cached:
        return "cached"
    return _STATES.get(build.state, "unknown")


def build(
    client: Client,
    model_uri: str,
    archs: Sequence[str],
    quant: str,
    group_size: int,
    model: str,
    recipe: RecipeOptions | None = None,
    *,
    detach: bool = False,
    as_json: bool = False,
    tell: Callable[[str], None] = output.print_line,
) -> pb.Operation:
    """The operation, finished unless `detach`; shown while it goes on.

    Args:
        tell: gets a line per finished engine, for people.

    Raises:
        MillraceError: it was refused, or one of its builds failed.
    """
    start = time.monotonic()
    ask = partial(
        client.start_build,
        model_uri, archs, quant, group_size=group_size, model=model, **(recipe or {}),
    )  # fmt: skip
    operation = ask()
    if detach:
        _show_detached(operation, as_json)
        return operation
    changes = client.watch_operation(operation.name, ask)
    if as_json:
        for operation in changes:
            output.print_json(output.to_dict(operation))
    elif output.is_fancy(is_stderr=True):
        operation = _show_bars(changes, operation)
    else:
        operation = _show_lines(changes, operation)
    raise_if_failed(operation)
    if not as_json:
        for line in _result_lines(operation, time.monotonic() - start):
            tell(line)
    return operation


def parse_quant(text: str) -> tuple[str, int, str]:
    """Scheme, group size and KV cache of `int8`, `int4-g128` or `bf16-kv-fp8`.

    Raises:
        CommandFailed: it is not of that form.
    """
    # A scheme's own name may hold `-g`, as int4-gptq does.
    found = re.fullmatch(r"(.*?)(?:-g([1-9]\d*))?(?:-kv-(fp8|int8))?", text)
    if found is None or re.search(r"-g(?!ptq)|-kv", found[1]):
        form = "int8, int4-awq-g64 or bf16-kv-fp8"
        raise CommandFailed(f"--quant {text!r} is not of the form {form}", USAGE)
    return found[1], int(found[2] or 0), found[3] or ""


def parse_keep(text: str) -> list[str]:
    """The patterns in `lm_head,layers.0.*=bf16`; what is kept stays in bf16, said or not.

    Raises:
        CommandFailed: another format is asked for, or nothing is named.
    """
    patterns = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, _, kept_as = part.partition("=")
        if kept_as not in ("", "bf16"):
            raise CommandFailed(f"--keep {part!r}: what is kept stays in bf16", USAGE)
        patterns.append(pattern)
    if text and not patterns:
        raise CommandFailed(f"--keep {text!r} names no weight", USAGE)
    return patterns


class Speed:
    """Bytes a second of the running stage, over its last seconds."""

    _WINDOW_S = 5.0

    def __init__(self) -> None:
        self._stage = ""
        self._samples: list[tuple[float, int]] = []

    def update(self, stage: str, done_bytes: int, now_s: float) -> float:
        """The speed, after `done_bytes` of `stage` were read at `now_s`; 0 while unknown."""
        # A search for what to keep reads the checkpoint again and again in one stage.
        if stage != self._stage or (self._samples and done_bytes < self._samples[-1][1]):
            self._stage, self._samples = stage, []
        self._samples.append((now_s, done_bytes))
        while len(self._samples) > 2 and now_s - self._samples[0][0] > self._WINDOW_S:
            self._samples.pop(0)
        (first_s, first_bytes), (last_s, last_bytes) = self._samples[0], self._samples[-1]
        return (last_bytes - first_bytes) / (last_s - first_s) if last_s > first_s else 0.0


def progress_columns(build: pb.Build, speed: float) -> dict[str, Any]:
    """What the bar of a build shows beside its percent: stage, speed, time left."""
    if build.state != pb.BUILD_STATE_RUNNING:
        return {"stage": state_text(build), "speed": "", "eta": ""}
    progress = build.progress
    return {
        "stage": progress.stage or "starting",
        "speed": f"{speed / 1e6:.0f} MB/s" if speed and progress.total_bytes else "",
        "eta": _left_text(progress),
    }


def done_text(build: pb.Build) -> str:
    """How far a build that runs is, in a table; "" of one that does not."""
    if build.state != pb.BUILD_STATE_RUNNING:
        return ""
    progress = build.progress
    left = _left_text(progress)
    return f"{progress.fraction:.0%} {progress.stage}" + (f", {left}" if left else "")


def _left_text(progress: pb.Progress) -> str:
    """How long a build still takes; while nobody knows, how far it has read the checkpoint."""
    if progress.HasField("eta"):
        return output.left_text(progress.eta.ToMilliseconds() / 1000)
    if progress.total_bytes:
        return f"{progress.done_bytes / progress.total_bytes:.0%} read"
    return ""


def _show_bars(changes: Iterator[pb.Operation], operation: pb.Operation) -> pb.Operation:
    speeds: dict[str, Speed] = {}
    tasks: dict[str, Any] = {}
    with _bars() as bars:
        resolving = bars.add_task(
            "reading the checkpoint",
            total=None, visible=not operation.builds, stage="", speed="", eta="",
        )  # fmt: skip
        for operation in changes:
            if operation.builds:
                bars.update(resolving, visible=False)
            for build in operation.builds:
                if build.name not in tasks:
                    tasks[build.name] = bars.add_task(
                        f"{operation.builds[0].key.quant.scheme} for {build.key.arch}",
                        total=1.0, stage="", speed="", eta="",
                    )  # fmt: skip
                    speeds[build.name] = Speed()
                progress = build.progress
                speed = speeds[build.name].update(
                    progress.stage, progress.done_bytes, time.monotonic()
                )
                is_done = build.state == pb.BUILD_STATE_SUCCEEDED
                bars.update(
                    tasks[build.name],
                    completed=1.0 if is_done else progress.fraction,
                    **progress_columns(build, speed),
                )
            bars.refresh()
    return operation


def _bars() -> "Progress":
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        TextColumn("[cyan]{task.fields[stage]:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("[dim]{task.fields[speed]:>9}"),
        TextColumn("[dim]{task.fields[eta]}"),
        console=output.console(is_stderr=True),
    )


def _show_lines(changes: Iterator[pb.Operation], operation: pb.Operation) -> pb.Operation:
    """A line when a build enters a stage or state: for logs."""
    shown: dict[str, str] = {}
    for operation in changes:
        for build in operation.builds:
            stage = progress_columns(build, 0.0)["stage"]
            if shown.get(build.name) != stage:
                shown[build.name] = stage
                percent = f"{build.progress.fraction:4.0%} " if build.HasField("progress") else ""
                output.say(f"{build.key.arch}: {percent}{stage}")
    return operation


def _show_detached(operation: pb.Operation, as_json: bool) -> None:
    if as_json:
        output.print_json(output.to_dict(operation))
        return
    for build in operation.builds:
        output.print_line(f"{build.name}  {build.key.arch}  {state_text(build)}")
    if not operation.builds:
        output.print_line(f"{operation.name}  resolving")
    output.say("See how it goes with: [bold]millrace builds[/]")


def _result_lines(operation: pb.Operation, seconds: float) -> Iterator[str]:
    for build in operation.builds:
        how = "was in the store" if build.cached else f"built in {output.duration_text(seconds)}"
        key = build.key
        name = output.short_name(build.name)
        yield f"engines/{name}  {key.arch}  {key.quant.scheme}  {how}"
