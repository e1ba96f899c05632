"""An engine that is being served: its text side, its process, and how a start reaches both."""

import json
from dataclasses import dataclass

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.engine_client import EngineClient
from runtime_service.generation import Generation
from runtime_service.sample_text import SampleText
from runtime_service.stop_strings import StopAutomaton
from runtime_service.text import ModelText, read_model_files
from runtime_service.validation import (
    Start,
    check_token_ids,
    parse_start,
    template_arguments_of,
    to_request,
)
from shared.engine import EngineManifest
from shared.errors import InvalidModel
from shared.store import ArtifactStore


@dataclass(frozen=True, slots=True)
class EngineText:
    """What the front needs of an engine: its model's text side, and how many tokens it knows."""

    model: ModelText
    vocab_size: int

    @staticmethod
    def read(store: ArtifactStore, engine: EngineManifest) -> "EngineText":
        """The text side of `engine`; blocks.

        Raises:
            InvalidModel: a file is missing or broken.
            BlobNotFound, DigestMismatch: the store does not hold what the engine names.
        """
        try:
            graph = json.loads(b"".join(store.read(engine.layer("graph.json").digest)))
            vocab_size = int(graph["config"]["vocab_size"])
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidModel(problem=f"the engine's graph is broken: {error!r}") from error
        return EngineText(ModelText(read_model_files(store, engine)), vocab_size)


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """An engine, its text side and the process that runs it."""

    engine: EngineManifest
    text: EngineText
    client: EngineClient

    def answers_to(self, model: str, deployment: str) -> bool:
        """Claims that `model` of a start names this engine, its model or its `deployment`."""
        engine = self.engine
        names = (engine.name, engine.model, engine.key.model_digest, deployment)
        return not model or model in names

    def parse(self, start: pb.StartGeneration) -> Start:
        """What `start` asks of this engine.

        Raises:
            InvalidField: the first field that is wrong.
        """
        return parse_start(start, self.text.vocab_size, self.text.model.end_token_ids)

    def encode(self, start: pb.StartGeneration) -> list[int]:
        """The prompt's tokens; for text and chat it blocks, and belongs into a thread.

        Raises:
            InvalidField: the model cannot take this conversation, or what its template is given with it, or its
                tokenizer knows a token of it that the model does not.
        """
        kind = start.WhichOneof("prompt")
        if kind == "token_ids":
            return list(start.token_ids.ids)
        if kind == "text":
            token_ids = self.text.model.encode(start.text)
        else:
            messages = [{"role": m.role, "content": m.content} for m in start.chat.messages]
            token_ids = self.text.model.encode_chat(messages, template_arguments_of(start.chat))
        check_token_ids(token_ids, self.text.vocab_size, f"start.{kind}")
        return token_ids

    def submit(
        self, generation: Generation, start: Start, prompt_token_ids: list[int], cache_salt: str
    ) -> None:
        """Has the engine run `generation`.

        Raises:
            InvalidField, PromptTooLong: the prompt's length is wrong.
            QueueFull, EngineLost: the engine does not take it now.
            QuotaExceeded: its tenant has too few tokens left in this minute.
        """
        client, model = self.client, self.text.model
        generation.engine_name = self.engine.name
        request = to_request(
            start, client.new_request_id(), prompt_token_ids, client.limits, cache_salt
        )
        stops = StopAutomaton(start.stop_strings) if start.stop_strings else None
        texts = [
            SampleText(model.detokenizer(), stops, start.min_new_tokens)
            for _ in range(start.num_samples)
        ]
        if start.resumed_token_ids:
            found = texts[0].resume(start.resumed_token_ids)
            finish = _finish_of_resumed(start, request.stop.max_new_tokens, found)
            if finish is not None:
                generation.resumed_at_end(len(prompt_token_ids), finish)
                return
        num_new_tokens = start.num_samples * request.stop.max_new_tokens
        generation.quota.reserve(len(prompt_token_ids) + num_new_tokens)
        client.submit(request, generation, texts, start.sends_logprobs)


def _finish_of_resumed(
    start: Start, max_new_tokens: int, stop_string: str
) -> pb.SampleFinish | None:
    """How what was generated elsewhere has ended already; None where it goes on."""
    resumed = start.resumed_token_ids
    if stop_string:
        return pb.SampleFinish(reason=pb.FINISH_REASON_STOP_STRING, stop_string=stop_string)
    if resumed[-1] in start.end_token_ids and len(resumed) >= start.min_new_tokens:
        return pb.SampleFinish(reason=pb.FINISH_REASON_STOP_TOKEN, stop_token_id=resumed[-1])
    if len(resumed) >= max_new_tokens:
        return pb.SampleFinish(reason=pb.FINISH_REASON_LENGTH)
    return None
