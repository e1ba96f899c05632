"""A small real gRPC server that plays both daemons by a script, for tests of their clients."""

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health, health_pb2_grpc
from grpc_status import rpc_status
from millrace.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from millrace.engine.v1 import engine_pb2
from millrace.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc

from shared.errors import BuildNotFound, EngineNotFound, InvalidField, MillraceError, to_status

DIGEST = "ab" * 32
WORDS = ("Once", " upon", " a", " time", " ☃")
TEXT = "".join(WORDS)
# What a built engine runs, thirty layers of it.
GRAPH = {
    "inputs": {"token_ids": {"dims": ["T"], "dtype": "int32"}},
    "nodes": [
        {"op": "embedding", "inputs": ["token_ids"], "outputs": ["x"], "weights": {"weight": "e"},
         "attrs": {"dtype": "float32"}},
        *(
            {"op": op, "inputs": [f"{op}.{i}.in"], "outputs": [f"{op}.{i}"], "weights": {},
             "attrs": {"layer": i}}
            for i in range(30)
            for op in ("rms_norm", "linear", "attention")
        ),
    ],
    "outputs": ["logits"],
    "weights": {"e": {"layout": "plain"}},
    "config": {"family": "llama", "num_layers": 30,
               "checkpoint_quantization": ["Q4_1: 210 tensors kept exactly as int4_group 32"]},
}  # fmt: skip


@dataclass
class Script:
    """What the daemon does, and what it was asked.

    Args:
        failures: raised by the next calls, one each, before they do anything.
        words: the answer, a token each.
        changes: what a watched operation goes through.
        breaks: after how many changes WatchOperation breaks, once.
        forgets: how many more times WatchOperation knows no such operation.
        blocks_after: words after which a generation goes on only once it is cancelled.
    """

    failures: list[MillraceError] = field(default_factory=list)
    words: tuple[str, ...] = WORDS
    changes: list[compiler_pb2.Operation] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    forgets: int = 0
    blocks_after: int | None = None
    builds: list[compiler_pb2.Build] = field(default_factory=list)
    engines: list[engine_pb2.Engine] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    fleet: fleet_pb2.GetFleetResponse = field(default_factory=fleet_pb2.GetFleetResponse)
    asked: list[Any] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


class ScriptedDaemon:
    """Serves all services of `script` at `address`; a context manager."""

    def __init__(self, script: Script) -> None:
        self._server = grpc.server(ThreadPoolExecutor(16))
        compiler_pb2_grpc.add_CompilerServiceServicer_to_server(_Compiler(script), self._server)
        artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(_Artifacts(script), self._server)
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(_Runtime(script), self._server)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(_Fleet(script), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> "ScriptedDaemon":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


def a_build(state: int, **fields: Any) -> compiler_pb2.Build:
    """A build of the scripted engine in `state`."""
    return compiler_pb2.Build(
        name=f"builds/{DIGEST}",
        key=a_key(),
        model_uri="sample:tiny",
        state=state,  # type: ignore[arg-type]
        **fields,
    )


def a_key() -> engine_pb2.EngineKey:
    """The scripted engine's key."""
    return engine_pb2.EngineKey(
        model_digest="cd" * 32,
        arch="cpu",
        quant=engine_pb2.QuantConfig(scheme="int8"),
        builder="1.0123456789ab",
    )


def an_operation(*builds: compiler_pb2.Build) -> compiler_pb2.Operation:
    """A resolved operation of `builds`."""
    return compiler_pb2.Operation(
        name="operations/0001", state=compiler_pb2.OPERATION_STATE_RESOLVED, builds=builds
    )


def running(fraction: float, stage: str, done_bytes: int = 0) -> compiler_pb2.Operation:
    """An operation whose build runs."""
    progress = compiler_pb2.Progress(
        stage=stage,
        fraction=fraction,
        done_bytes=done_bytes,
        total_bytes=100_000_000,
        eta=Duration(seconds=7),
    )
    return an_operation(a_build(compiler_pb2.BUILD_STATE_RUNNING, progress=progress))


def succeeded(cached: bool = False) -> compiler_pb2.Operation:
    """An operation whose build has made its engine."""
    return an_operation(a_build(compiler_pb2.BUILD_STATE_SUCCEEDED, cached=cached))


def an_engine(blobs: dict[str, bytes], layers: dict[str, object]) -> engine_pb2.Engine:
    """The scripted engine; JSON `layers` by title go into `blobs`."""
    descriptors = []
    for title, document in layers.items():
        data = json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        blobs[digest] = data
        descriptors.append(
            engine_pb2.Blob(
                media_type="application/json", digest=digest, size_bytes=len(data), title=title
            )
        )
    return engine_pb2.Engine(
        name=f"engines/{DIGEST}",
        key=a_key(),
        model="tiny",
        format_version=1,
        manifest=engine_pb2.Blob(digest="sha256:" + "0" * 64),
        layers=descriptors,
    )


def _fail_as_scripted(script: Script, context: grpc.ServicerContext) -> None:
    if script.failures:
        _abort(context, script.failures.pop(0))


def _abort(context: grpc.ServicerContext, error: MillraceError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class _Compiler(compiler_pb2_grpc.CompilerServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def BuildEngine(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        _fail_as_scripted(self._script, context)
        first = self._script.changes[0] if self._script.changes else succeeded(cached=True)
        return compiler_pb2.BuildEngineResponse(operation=first)

    def WatchOperation(self, request: Any, context: Any) -> Iterator[Any]:
        self._script.asked.append(request)
        if self._script.forgets:
            self._script.forgets -= 1
            _abort(context, BuildNotFound(build=request.name, kept="7 days"))
        stop = self._script.breaks.pop(0) if self._script.breaks else None
        for index, change in enumerate(self._script.changes or [succeeded(cached=True)]):
            if index == stop:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            yield compiler_pb2.WatchOperationResponse(operation=change)

    def ListBuilds(self, request: Any, context: Any) -> Any:
        _fail_as_scripted(self._script, context)
        page, token = _page(self._script.builds, request.page_token)
        return compiler_pb2.ListBuildsResponse(builds=page, next_page_token=token)

    def ListEngines(self, request: Any, context: Any) -> Any:
        page, token = _page(self._script.engines, request.page_token)
        return compiler_pb2.ListEnginesResponse(engines=page, next_page_token=token)

    def GetEngine(self, request: Any, context: Any) -> Any:
        for engine in self._script.engines:
            if engine.name.startswith(request.name):
                build = self._script.builds[0] if self._script.builds else None
                return compiler_pb2.GetEngineResponse(engine=engine, build=build)
        _abort(context, EngineNotFound(engine=request.name))

    def GetBuild(self, request: Any, context: Any) -> Any:
        for build in self._script.builds:
            if build.name == request.name:
                return compiler_pb2.GetBuildResponse(build=build)
        _abort(context, BuildNotFound(build=request.name, kept="7 days"))

    def DeleteEngine(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        return compiler_pb2.DeleteEngineResponse()

    def CancelBuild(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        for build in self._script.builds:
            if build.name == request.name:
                build.state = compiler_pb2.BUILD_STATE_CANCELLED
                return compiler_pb2.CancelBuildResponse(build=build)
        _abort(context, BuildNotFound(build=request.name, kept="7 days"))


def _page(items: list[Any], token: str) -> tuple[list[Any], str]:
    """Pages of two, so that every reader has to turn one."""
    start = int(token or 0)
    return items[start : start + 2], str(start + 2) if start + 2 < len(items) else ""


class _Artifacts(artifact_pb2_grpc.ArtifactServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def ReadBlob(self, request: Any, context: Any) -> Iterator[Any]:
        data = self._script.blobs[request.digest]
        for start in range(0, len(data), 100):
            yield artifact_pb2.ReadBlobResponse(data=data[start : start + 100])


class _Runtime(runtime_pb2_grpc.RuntimeServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    def GetStatus(self, request: Any, context: Any) -> Any:
        engine = self._script.engines[0] if self._script.engines else None
        status = runtime_pb2.GetStatusResponse(
            state=runtime_pb2.RUNTIME_STATE_SERVING, engine=engine
        )
        for name, milliseconds in (("find_engine", 1), ("import", 1500), ("copy_weights", 2500)):
            status.startup.add(name=name).duration.FromMilliseconds(milliseconds)
        return status

    def LoadEngine(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        return runtime_pb2.LoadEngineResponse(engine=self._script.engines[0])

    def UnloadEngine(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        return runtime_pb2.UnloadEngineResponse()

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        start = request.start
        self._script.asked.append(start)
        _fail_as_scripted(self._script, context)
        if not (start.text or start.token_ids.ids or start.chat.messages):
            _abort(context, InvalidField(field="prompt", problem="is empty"))
        if self._script.blocks_after is not None:  # it ends in no other way
            context.add_callback(self._script.cancelled.set)
        for index, event in enumerate(_events(self._script, start)):
            if index - 1 == self._script.blocks_after:
                self._script.cancelled.wait(60)
                return
            yield runtime_pb2.GenerateStreamResponse(events=[event])

    def Generate(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        events: Queue[Any] = Queue()
        threading.Thread(target=self._read, args=(requests, events), daemon=True).start()
        while (event := events.get()) is not None:
            yield runtime_pb2.GenerateResponse(events=[event])

    def _read(self, requests: Iterator[Any], events: "Queue[Any]") -> None:
        waiting: set[str] = set()
        try:
            for request in requests:
                self._script.asked.append(request)
                if request.WhichOneof("command") == "cancel":
                    self._script.cancelled.set()
                    waiting.discard(request.cancel.request_id)
                    continue
                start = request.start
                if self._script.failures:
                    status = to_status(self._script.failures.pop(0))
                    events.put(runtime_pb2.Event(request_id=start.request_id, error=status))
                    continue
                for index, event in enumerate(_events(self._script, start)):
                    if index - 1 == self._script.blocks_after:
                        waiting.add(start.request_id)
                        break
                    events.put(event)
        except grpc.RpcError:  # the caller broke its call
            self._script.cancelled.set()
        events.put(None)


class _Fleet(fleet_pb2_grpc.FleetServiceServicer):
    """A replica more is ready at each look."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def GetFleet(self, request: Any, context: Any) -> Any:
        _fail_as_scripted(self._script, context)
        for deployment in self._script.fleet.deployments:
            ready = deployment.ready_replicas + 1
            deployment.ready_replicas = min(ready, deployment.replicas)
        return self._script.fleet

    def ApplyDeployment(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        _fail_as_scripted(self._script, context)
        deployment = self._script.fleet.deployments.add()
        deployment.CopyFrom(request.deployment)
        deployment.version = 7
        return fleet_pb2.ApplyDeploymentResponse(deployment=deployment)

    def DeleteDeployment(self, request: Any, context: Any) -> Any:
        self._script.asked.append(request)
        _fail_as_scripted(self._script, context)
        return fleet_pb2.DeleteDeploymentResponse()


def _events(script: Script, start: runtime_pb2.StartGeneration) -> list[runtime_pb2.Event]:
    """A whole generation, told word by word for each of its samples."""
    name = start.request_id
    num_samples = max(1, start.sampling.n)
    limit = start.stop.max_new_tokens or len(script.words)
    words = (script.words * (limit // len(script.words) + 1))[:limit]
    started = runtime_pb2.GenerationStarted(seed=start.sampling.seed or 42, prompt_tokens=3)
    events = [runtime_pb2.Event(request_id=name, started=started)]
    for index, word in enumerate(words):
        for sample in range(num_samples):
            tokens = runtime_pb2.TokenChunk(sample_index=sample, token_ids=[index], text=word)
            events.append(runtime_pb2.Event(request_id=name, tokens=tokens))
    finished = runtime_pb2.GenerationFinished(
        samples=[
            runtime_pb2.SampleFinish(sample_index=sample, reason=runtime_pb2.FINISH_REASON_LENGTH)
            for sample in range(num_samples)
        ],
        usage=runtime_pb2.Usage(prompt_tokens=3, generated_tokens=len(words) * num_samples),
        timings=runtime_pb2.Timings(
            time_to_first_token=Duration(nanos=50_000_000), total=Duration(nanos=250_000_000)
        ),
    )
    return [*events, runtime_pb2.Event(request_id=name, finished=finished)]
