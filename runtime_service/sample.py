"""One of a generation's samples: its text, what of it waits to be read, and how it ended."""

from collections.abc import Callable, Iterator, Sequence

from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.sample_text import SampleText
from runtime_service.scheduling.output import TokenLogprobs

# Tokens in one event at most: a message must stay far below every client's size limit.
MAX_EVENT_TOKENS = 4096
MAX_EVENT_LOGPROBS = 512


class Sample:
    """Filled by its generation, emptied by `take_events`."""

    __slots__ = (
        "_sealed", "finish", "last_token_s", "logprobs", "num_tokens", "prompt_logprobs", "text",
        "token_ids",
    )  # fmt: skip

    def __init__(self, text: SampleText) -> None:
        self.text = text
        self.num_tokens = 0
        self.last_token_s = 0.0
        self.finish: pb.SampleFinish | None = None
        # What waits to be read.
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        # Whole pieces of it, oldest first: token ids, text, logprobs.
        self._sealed: list[tuple[list[int], str, list[TokenLogprobs]]] = []

    @property
    def has_news(self) -> bool:
        """Claims that something waits to be read."""
        return bool(self.token_ids or self._sealed or self.text.is_ready or self.prompt_logprobs)

    def make_room(self) -> None:
        """Call before tokens are added: closes a piece that is large enough for a message.

        A piece has the text of its own tokens, so that who has read up to there can go on from
        there, elsewhere.
        """
        if len(self.token_ids) >= (MAX_EVENT_LOGPROBS if self.logprobs else MAX_EVENT_TOKENS):
            self._sealed.append(self._cut())

    def take_events(self, request_id: str, index: int) -> Iterator[pb.Event]:
        """What waits, in pieces small enough for any message; may be taken slowly."""
        prompt, self.prompt_logprobs = self.prompt_logprobs, []
        pieces, self._sealed = [*self._sealed, self._cut()], []
        while len(prompt) > MAX_EVENT_LOGPROBS:
            head = prompt[:MAX_EVENT_LOGPROBS]
            yield _event(request_id, index, (), "", (), head, self.text.spelling)
            prompt = prompt[MAX_EVENT_LOGPROBS:]
        for token_ids, text, logprobs in pieces:
            yield _event(request_id, index, token_ids, text, logprobs, prompt, self.text.spelling)
            prompt = []

    def _cut(self) -> tuple[list[int], str, list[TokenLogprobs]]:
        piece = self.token_ids, self.text.take(), self.logprobs
        self.token_ids, self.logprobs = [], []
        return piece


def join_chunks(last: pb.TokenChunk, chunk: pb.TokenChunk) -> bool:
    """Appends `chunk` to one of its sample's that waits to be read, where that stays small enough."""
    limit = MAX_EVENT_LOGPROBS if chunk.logprobs else MAX_EVENT_TOKENS
    if chunk.prompt_logprobs or len(last.token_ids) + len(chunk.token_ids) > limit:
        return False
    last.token_ids.extend(chunk.token_ids)
    last.text += chunk.text
    last.logprobs.extend(chunk.logprobs)
    return True


def _event(
    request_id: str,
    index: int,
    token_ids: Sequence[int],
    text: str,
    logprobs: Sequence[TokenLogprobs],
    prompt_logprobs: Sequence[TokenLogprobs],
    spell: Callable[[int], bytes],
) -> pb.Event:
    # Filled in place: made whole and copied in, it would cost twice as much, for every token.
    event = pb.Event(request_id=request_id)
    chunk = event.tokens
    if index:
        chunk.sample_index = index
    chunk.token_ids.extend(token_ids)
    chunk.text = text
    if logprobs:
        chunk.logprobs.extend([_logprob(row, spell) for row in logprobs])
    if prompt_logprobs:
        chunk.prompt_logprobs.extend([_logprob(row, spell) for row in prompt_logprobs])
    return event


def _logprob(row: TokenLogprobs, spell: Callable[[int], bytes]) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=row.token_id,
        logprob=row.logprob,
        rank=row.rank,
        top=[
            pb.TopLogprob(token_id=token_id, logprob=value, token=spell(token_id))
            for token_id, value in row.top
        ],
        token=spell(row.token_id),
    )
