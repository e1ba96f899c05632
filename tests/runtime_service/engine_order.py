"""What an engine began, in its own order and its own time."""

from collections import deque
from dataclasses import dataclass
from typing import Any

from runtime_service.engine_client import EngineClient
from runtime_service.engine_messages import StepOutputs
from runtime_service.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Begun:
    """A request that has its first token: whose it is, after how many steps the engine knew of it, and began it."""

    tenant: str
    known_step: int
    first_step: int


class EngineOrder:
    """`begun`, in the engine's order: clients hear of it each on a call of its own, and late on a busy machine."""

    def __init__(self, client: EngineClient) -> None:
        self.begun: list[Begun] = []
        # Each with the number of commands after which the engine has it.
        self._sent: deque[tuple[int, Request]] = deque()
        self._known: dict[int, tuple[str, int]] = {}
        self._client, self._submit, self._take = client, client.submit, client._take
        client.submit = self._note_submitted  # type: ignore[method-assign]
        client._take = self._note_step  # type: ignore[method-assign]

    def _note_submitted(self, request: Request, *rest: Any) -> None:
        self._submit(request, *rest)
        self._sent.append((self._client._num_sent + len(self._client._outbox), request))

    def _note_step(self, step: StepOutputs) -> None:
        while self._sent and self._sent[0][0] <= step.num_commands:
            _, request = self._sent.popleft()
            self._known[request.request_id] = request.cache_salt, step.stats.steps
        for output in step.outputs:
            if output.num_cached_tokens is not None:  # its first
                self.begun.append(Begun(*self._known[output.request_id], step.stats.steps))
        self._take(step)
