"""One of a generation's samples: its text, what of it waits to be read, and how it ended."""

from collections.abc import Iterator, Sequence

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.sample_text import SampleText
from runtime_service.scheduling.output import TokenLogprobs

# Tokens in one event at most: a message must stay far below every client's size limit.
MAX_EVENT_TOKENS = 4096
MAX_EVENT_LOGPROBS = 512


class Sample:
    """Filled by its generation, emptied by `take_events`."""

    __slots__ = ("finish", "logprobs", "num_tokens", "prompt_logprobs", "text", "token_ids")

    def __init__(self, text: SampleText) -> None:
        self.text = text
        self.num_tokens = 0
        self.finish: pb.SampleFinish | None = None
        # What waits to be read.
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def has_news(self) -> bool:
        """Claims that something waits to be read."""
        return bool(self.token_ids or self.text.is_ready or self.prompt_logprobs)

    def take_events(self, request_id: str, index: int) -> Iterator[pb.Event]:
        """What waits, in pieces small enough for any message; may be taken slowly."""
        token_ids, logprobs, prompt = self.token_ids, self.logprobs, self.prompt_logprobs
        self.token_ids, self.logprobs, self.prompt_logprobs = [], [], []
        text = self.text.take()
        size = MAX_EVENT_LOGPROBS if logprobs or prompt else MAX_EVENT_TOKENS
        while len(prompt) > size:
            yield _event(request_id, index, (), "", (), prompt[:size])
            prompt = prompt[size:]
        while len(token_ids) > size:
            yield _event(request_id, index, token_ids[:size], text, logprobs[:size], prompt)
            token_ids, text, logprobs, prompt = token_ids[size:], "", logprobs[size:], []
        yield _event(request_id, index, token_ids, text, logprobs, prompt)


def _event(
    request_id: str,
    index: int,
    token_ids: Sequence[int],
    text: str,
    logprobs: Sequence[TokenLogprobs],
    prompt_logprobs: Sequence[TokenLogprobs],
) -> pb.Event:
    # Filled in place: made whole and copied in, it would cost twice as much, for every token.
    event = pb.Event(request_id=request_id)
    chunk = event.tokens
    if index:
        chunk.sample_index = index
    chunk.token_ids.extend(token_ids)
    chunk.text = text
    if logprobs:
        chunk.logprobs.extend(map(_logprob, logprobs))
    if prompt_logprobs:
        chunk.prompt_logprobs.extend(map(_logprob, prompt_logprobs))
    return event


def _logprob(row: TokenLogprobs) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=row.token_id,
        logprob=row.logprob,
        rank=row.rank,
        top=[pb.TopLogprob(token_id=token_id, logprob=value) for token_id, value in row.top],
    )
