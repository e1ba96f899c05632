"""A runtime daemon's work behind its wire: calls and their generations, and the engine that runs them.

What each half does is elsewhere: `engine_keeper.py` keeps the engine served, `start_line.py` brings starts to it. Knows
no gRPC.
"""

import asyncio
from collections.abc import Callable

import structlog
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service import validation
from runtime_service.deployments import DeploymentProblem
from runtime_service.engine_keeper import EngineKeeper
from runtime_service.engine_source import EngineSource
from runtime_service.engine_starter import EngineStarter, StartClient
from runtime_service.generation import Generation
from runtime_service.generation_call import GenerationCall, OnMember
from runtime_service.metrics import RuntimeMetrics
from runtime_service.served_engine import EngineText, ServedEngine
from runtime_service.start_line import StartLine
from runtime_service.startup import Startup
from shared.auth import ANYBODY, Principal
from shared.engine import EngineManifest, EngineSelector
from shared.errors import Draining, GenerationNotFound, ModelNotServed, QueueFull
from shared.log import Tally
from shared.quotas import GenerationQuota

_log = structlog.get_logger()


class Runtime:
    """Serves one engine at a time.

    Args:
        source, read_text, start_client: as `EngineStarter` takes them.
        arch, on_change, exchange_s: as `EngineKeeper` does.
    """

    def __init__(
        self,
        arch: str,
        source: EngineSource,
        read_text: Callable[[EngineManifest], EngineText],
        start_client: StartClient,
        metrics: RuntimeMetrics,
        on_change: Callable[[], None],
        exchange_s: float = 600.0,
    ) -> None:
        self.arch = arch
        self.metrics = metrics
        # The deployment that it belongs to, and the version of it that it serves.
        self.deployment, self.deployment_version = "", 0
        # Why it does not serve what a deployment had it try last.
        self.deployment_problem: DeploymentProblem | None = None
        starter = EngineStarter(source, read_text, start_client)
        self.keeper = EngineKeeper(arch, starter, metrics, on_change, exchange_s)
        self._line = StartLine(self.keeper, self._check_model)
        self._calls: set[GenerationCall[Generation]] = set()
        self._refused = Tally("starts_refused", reason=QueueFull.reason)

    @property
    def served(self) -> ServedEngine | None:
        """The engine that is served, if one is."""
        return self.keeper.served

    @property
    def startup(self) -> Startup:
        """Where the time of a load goes."""
        return self.keeper.startup

    @property
    def state(self) -> pb.RuntimeState.ValueType:
        """Where the daemon stands; while its engine is exchanged it is not the place for more."""
        return self.keeper.state

    @property
    def is_serving(self) -> bool:
        """Claims that starts are welcome, even if they wait for a swap."""
        return self.keeper.is_serving

    def open_call(self, caller: Principal = ANYBODY) -> GenerationCall[Generation]:
        """A call of `caller` whose generations run here; give it back with `close_call`."""
        call = GenerationCall(self, caller)
        self._calls.add(call)
        if self.keeper.is_draining:
            call.drain()
        return call

    def close_call(self, call: GenerationCall[Generation]) -> None:
        """Ends what still runs on `call`: nobody reads it."""
        self._calls.discard(call)
        call.close()

    def check_room(self, start: pb.StartGeneration, cache_salt: str) -> None:
        """Refuses `start` where the engine that would take it has no room.

        Raises:
            QueueFull: so it is.
        """
        served = self.served
        if served is None or not self.keeper.has(served) or self.keeper.is_draining:
            return
        # A prompt that never runs waits for nothing: it is refused as what it is.
        never_runs = validation.is_too_long(start, served.client.limits.max_sequence_tokens)
        if never_runs or not served.answers_to(start.model, self.deployment):
            return
        if validation.waits_apart(start):
            return
        try:
            served.client.check_room(validation.num_prompt_tokens_of(start), cache_salt)
        except QueueFull as error:
            self.metrics.ended(error.reason, 0.0)
            self._refused.add()
            raise

    def new_generation(
        self, request_id: str, on_news: OnMember, on_end: OnMember, quota: GenerationQuota
    ) -> Generation:
        """A generation that is not started yet."""
        return Generation(request_id, self.metrics, on_news, on_end, quota)

    def share_of_resumed(self, resume: pb.ResumeGeneration, cache_salt: str) -> None:
        """None: a runtime forgets the generations of a lost call."""

    def resume(self, generation: Generation, resume: pb.ResumeGeneration, cache_salt: str) -> None:
        """Ends it with an error: a runtime forgets the generations of a lost call."""
        generation.fail(GenerationNotFound(generation=resume.generation_id))

    def start(self, generation: Generation, start: pb.StartGeneration, cache_salt: str) -> None:
        """Sees to it that `generation` runs, or ends it with an error; never raises."""
        self._line.start(generation, start, cache_salt)

    async def load(
        self, selector: EngineSelector, model_uri: str, *, anew: bool = True
    ) -> EngineManifest:
        """Serves the newest engine that fits, from now on; see `EngineKeeper.load`."""
        return await self.keeper.load(selector, model_uri, anew=anew)

    async def unload(self) -> None:
        """Finishes what runs and releases the engine; starts are refused from now on."""
        await self.keeper.unload()

    async def drain(self, grace_s: float) -> None:
        """Takes nothing new, lets what runs finish, and ends what is left with DRAINING."""
        self.keeper.refuse()
        for call in self._calls:
            call.drain()
        served = self.served
        if served is not None:
            try:
                async with asyncio.timeout(grace_s):
                    await served.client.wait_idle()
            except TimeoutError:
                _log.warning("drain_grace_ended", calls=len(self._calls))
        for call in list(self._calls):
            call.fail_all(Draining())

    async def close(self) -> None:
        """Ends the engine process and everything else that this runtime started."""
        await self._line.close()
        await self.keeper.close()

    def _check_model(self, served: ServedEngine, model: str) -> None:
        """Raises ModelNotServed unless `model` names the engine that is served, or its deployment."""
        if not served.answers_to(model, self.deployment):
            known = filter(None, (self.deployment, served.engine.model))
            raise ModelNotServed(model=model, known=", ".join(dict.fromkeys(known)))
