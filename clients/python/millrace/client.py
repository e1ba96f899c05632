"""The blocking client: builds through a compile daemon, generations through a runtime daemon.

One `Client` may be used from several threads. Wire messages that are already what a caller wants
(`Build`, `Engine`, ...) are returned as they are; docs/API.md shows them.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Self, TypeVar, Unpack

import grpc

from millrace.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from millrace.attempts import resume_generation
from millrace.builds import RecipeOptions, build_request, has_ended, raise_if_failed
from millrace.channels import DEFAULT_COMPILER, DEFAULT_RUNTIME, Security, open_channel
from millrace.compiler.v1 import compiler_pb2, compiler_pb2_grpc
from millrace.engine.v1 import engine_pb2
from millrace.errors import MillraceError, call_ended, corrupt_blob, from_rpc_error
from millrace.generation import GenerateOptions, Prompt, start_generation
from millrace.retries import LASTING_WATCH_S, Retries
from millrace.runtime.v1 import runtime_pb2, runtime_pb2_grpc
from millrace.stream import Stream

_Answer = TypeVar("_Answer")
_PAGE_SIZE = 200


class Client:
    """Both daemons, from one place; connects when it is used.

    Args:
        compiler: `host:port` of a compile daemon.
        runtime: `host:port` of a runtime daemon.
        timeout_s: for calls that answer at once; builds, loads and generations take their time.
        api_key: `mr_...`, where the daemons ask for one.
        tls_ca: path of the CA that signed the daemons' certificates; "" speaks plaintext.
        tls_cert: path of the client's own certificate, where daemons ask for one; with `tls_key`.
    Raises:
        ValueError: a file cannot be used, or the key would cross a network in plaintext.
    """

    def __init__(
        self,
        compiler: str = DEFAULT_COMPILER,
        runtime: str = DEFAULT_RUNTIME,
        *,
        timeout_s: float = 30.0,
        retries: Retries | None = None,
        api_key: str = "",
        tls_ca: str = "",
        tls_cert: str = "",
        tls_key: str = "",
    ) -> None:
        security = Security(api_key, tls_ca, tls_cert, tls_key)
        self._compiler_address, self._runtime_address = compiler, runtime
        self._timeout_s = timeout_s
        self._retries = retries or Retries()
        self._compiler_channel = open_channel(compiler, security)
        self._runtime_channel = open_channel(runtime, security)
        self._compiler = compiler_pb2_grpc.CompilerServiceStub(self._compiler_channel)
        self._artifacts = artifact_pb2_grpc.ArtifactServiceStub(self._compiler_channel)
        self._runtime = runtime_pb2_grpc.RuntimeServiceStub(self._runtime_channel)

    def close(self) -> None:
        """Closes the connections; what streams still run end as cancelled."""
        self._compiler_channel.close()
        self._runtime_channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Builds

    def build(
        self,
        model_uri: str,
        archs: Sequence[str] = ("cpu",),
        quant: str = "",
        *,
        group_size: int = 0,
        model: str = "",
        on_change: Callable[[compiler_pb2.Operation], None] | None = None,
        **recipe: Unpack[RecipeOptions],
    ) -> compiler_pb2.Operation:
        """The finished operation: one engine per arch, built now or found in the store.

        Args:
            on_change: called with the operation as it stands, and at every change.
            recipe: see `millrace.builds.RecipeOptions`.

        Raises:
            MillraceError: it was refused, or one of its builds failed.
        """
        ask = partial(
            self.start_build,
            model_uri, archs, quant, group_size=group_size, model=model, **recipe,
        )  # fmt: skip
        name = ask().name
        for operation in self.watch_operation(name, ask):
            if on_change is not None:
                on_change(operation)
        raise_if_failed(operation)
        return operation

    def start_build(
        self,
        model_uri: str,
        archs: Sequence[str] = ("cpu",),
        quant: str = "",
        *,
        group_size: int = 0,
        model: str = "",
        **recipe: Unpack[RecipeOptions],
    ) -> compiler_pb2.Operation:
        """The operation as it stands; `watch_operation` follows it. Asking twice is asking once."""
        request = build_request(model_uri, archs, quant, group_size, model, **recipe)
        return self._ask_compiler(self._compiler.BuildEngine, request).operation

    def watch_operation(
        self, name: str, ask_again: Callable[[], compiler_pb2.Operation] | None = None
    ) -> Iterator[compiler_pb2.Operation]:
        """The operation as it stands, then at every change, until all of its builds have ended.

        Args:
            ask_again: asks for the same where nobody knows the operation any more, as after a Redis that came back
                empty; without it that is an error.
        """
        request = compiler_pb2.WatchOperationRequest(name=name)
        attempt, known = 0, None
        while True:
            began_s = time.monotonic()
            try:
                for response in self._compiler.WatchOperation(request):
                    if response.operation != known:  # a watch begins with what it told last
                        attempt, known = 0, response.operation
                    yield response.operation
                    if has_ended(response.operation):
                        return
                error = call_ended(self._compiler_address)
            except grpc.RpcError as raised:
                error = from_rpc_error(raised, self._compiler_address)
            # A watch that lasted was answered: what lies between may end calls on which nothing is said.
            attempt = 1 if time.monotonic() - began_s > LASTING_WATCH_S else attempt + 1
            if ask_again is None or not self._retries.asks_again(error, attempt):
                self._wait_or_raise(error, attempt)
            else:
                request.name = ask_again().name

    def get_build(self, name: str) -> compiler_pb2.Build:
        """The build as it stands."""
        request = compiler_pb2.GetBuildRequest(name=name)
        return self._ask_compiler(self._compiler.GetBuild, request).build

    def cancel_build(self, name: str) -> compiler_pb2.Build:
        """The build as it stands, cancelled unless it has ended."""
        request = compiler_pb2.CancelBuildRequest(name=name)
        return self._ask_compiler(self._compiler.CancelBuild, request).build

    def list_builds(self) -> Iterator[compiler_pb2.Build]:
        """All builds that are remembered, newest first."""
        token = ""
        while True:
            request = compiler_pb2.ListBuildsRequest(page_size=_PAGE_SIZE, page_token=token)
            page = self._ask_compiler(self._compiler.ListBuilds, request)
            yield from page.builds
            token = page.next_page_token
            if not token:
                return

    # Engines

    def list_engines(self) -> Iterator[engine_pb2.Engine]:
        """All engines in the store, newest first."""
        token = ""
        while True:
            request = compiler_pb2.ListEnginesRequest(page_size=_PAGE_SIZE, page_token=token)
            page = self._ask_compiler(self._compiler.ListEngines, request)
            yield from page.engines
            token = page.next_page_token
            if not token:
                return

    def get_engine(self, name: str) -> compiler_pb2.GetEngineResponse:
        """An engine, and the build that made it while that is remembered."""
        request = compiler_pb2.GetEngineRequest(name=name)
        return self._ask_compiler(self._compiler.GetEngine, request)

    def delete_engine(self, name: str) -> None:
        """Removes an engine's name; its blobs go when nothing else names them."""
        request = compiler_pb2.DeleteEngineRequest(name=name)
        self._ask_compiler(self._compiler.DeleteEngine, request)

    def sign_engine(self, name: str, public_key: bytes, signature: bytes) -> engine_pb2.Engine:
        """The engine, with a signature of its manifest; `Signature` says what is signed."""
        signed = engine_pb2.Signature(public_key=public_key, signature=signature)
        request = compiler_pb2.SignEngineRequest(name=name, signature=signed)
        return self._ask_compiler(self._compiler.SignEngine, request).engine

    def read_blob(self, digest: str) -> bytes:
        """A whole blob of the store, verified.

        Raises:
            MillraceError: there is none, or its bytes are others (`DIGEST_MISMATCH`).
        """
        data = bytearray()
        request = artifact_pb2.ReadBlobRequest(digest=digest)
        try:
            for response in self._artifacts.ReadBlob(request):
                data += response.data
        except grpc.RpcError as raised:
            raise from_rpc_error(raised, self._compiler_address) from None
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if found != digest:
            raise corrupt_blob(digest, found)
        return bytes(data)

    # Generations

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """A generation, as a stream of chunks; it starts when the stream is read.

            with client.generate("Once upon a time", max_new_tokens=64) as stream:
                for chunk in stream:
                    print(chunk.text, end="")
            print(stream.result.tokens_per_s)

        Leaving the block, or closing the stream, cancels what still runs.
        """
        start = start_generation(prompt, **options)
        return self._stream(runtime_pb2.GenerateStreamRequest(start=start))

    def resume(self, generation_id: str, received_tokens: Sequence[int] = ()) -> Stream:
        """Goes on with a generation of a gateway whose reader is gone, such as another process.

        A stream that loses its connection does so by itself.

        Args:
            generation_id: as `Stream.generation_id` was.
            received_tokens: what its reader had, by sample; only what comes after is streamed.
        """
        return self._stream(resume_generation(generation_id, received_tokens))

    def _stream(self, command: runtime_pb2.GenerateStreamRequest) -> Stream:
        return Stream(
            lambda request, timeout_s: self._runtime.GenerateStream(request, timeout=timeout_s),
            command,
            self._runtime_address,
            self._retries,
        )

    def get_status(self) -> runtime_pb2.GetStatusResponse:
        """What the runtime daemon serves, its limits and its load."""
        request = runtime_pb2.GetStatusRequest()
        return self._ask(self._runtime.GetStatus, request, self._runtime_address, self._timeout_s)

    def load_engine(
        self,
        model: str,
        quant: str,
        *,
        group_size: int = 0,
        kv_cache: str = "",
        arch: str = "",
        model_uri: str = "",
    ) -> engine_pb2.Engine:
        """The engine that the runtime daemon serves from now on.

        Args:
            model: name or digest of the model.
            kv_cache: that the engine was built with; empty for none.
            arch: empty for the daemon's own.
            model_uri: where the checkpoint is; then a missing engine is built first.
        """
        request = runtime_pb2.LoadEngineRequest(
            selector=engine_pb2.EngineSelector(
                model=model,
                arch=arch,
                quant=engine_pb2.QuantConfig(
                    scheme=quant, group_size=group_size, kv_cache=kv_cache
                ),
            ),
            model_uri=model_uri,
        )
        return self._ask(self._runtime.LoadEngine, request, self._runtime_address, None).engine

    def unload_engine(self) -> None:
        """Finishes what runs and releases the engine."""
        request = runtime_pb2.UnloadEngineRequest()
        self._ask(self._runtime.UnloadEngine, request, self._runtime_address, None)

    def _ask_compiler(self, method: Callable[..., _Answer], request: object) -> _Answer:
        return self._ask(method, request, self._compiler_address, self._timeout_s)

    def _ask(
        self,
        method: Callable[..., _Answer],
        request: object,
        address: str,
        timeout_s: float | None,
    ) -> _Answer:
        for attempt in count(1):
            try:
                return method(request, timeout=timeout_s)
            except grpc.RpcError as raised:
                self._wait_or_raise(from_rpc_error(raised, address), attempt)
        raise AssertionError("unreachable: the loop returns or raises")

    def _wait_or_raise(self, error: MillraceError, attempt: int) -> None:
        delay_s = self._retries.delay_s(error, attempt)
        if delay_s is None:
            raise error from None
        time.sleep(delay_s)
