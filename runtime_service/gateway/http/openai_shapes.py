"""How OpenAI's two endpoints write a choice: all that they differ in.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion object".
"""

from collections.abc import Sequence
from typing import Any, Protocol

from millrace.runtime.v1 import runtime_pb2 as pb

Json = dict[str, Any]

# JSON has no infinity; OpenAI writes this for what cannot be.
LEAST_LOGPROB = -9999.0


class Shape(Protocol):
    """How one endpoint writes choices."""

    id_prefix: str
    object: str
    chunk_object: str

    def first(self) -> Json | None:
        """What a streamed choice begins with, if anything."""

    def delta(self, text: str) -> Json:
        """More of a streamed choice."""

    def whole(self, text: str) -> Json:
        """All of a choice."""

    def logprobs(self, rows: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> Json:
        """Log probabilities; `offsets` say where in the choice's text each token begins."""


class ChatShape:
    """/v1/chat/completions."""

    id_prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self) -> Json | None:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str) -> Json:
        """More of what is said."""
        return {"delta": {"content": text} if text else {}}

    def whole(self, text: str) -> Json:
        """The model's turn."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, rows: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> Json:
        """An object a token."""
        content = [
            {**_token(row), "top_logprobs": [_token(candidate) for candidate in row.top]}
            for row in rows
        ]
        return {"content": content, "refusal": None}


class CompletionShape:
    """/v1/completions."""

    id_prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def first(self) -> Json | None:
        """Nothing."""
        return None

    def delta(self, text: str) -> Json:
        """More of the text."""
        return {"text": text}

    def whole(self, text: str) -> Json:
        """The text."""
        return {"text": text}

    def logprobs(self, rows: Sequence[pb.TokenLogprob], offsets: Sequence[int]) -> Json:
        """A list each for what a token has."""
        return {
            "tokens": [_text(row.token) for row in rows],
            "token_logprobs": [_finite(row.logprob) for row in rows],
            # The token itself is among them, also where it is none of the likeliest.
            "top_logprobs": [
                {_text(top.token): _finite(top.logprob) for top in row.top}
                | {_text(row.token): _finite(row.logprob)}
                for row in rows
            ],
            "text_offset": list(offsets),
        }


def _token(row: pb.TokenLogprob | pb.TopLogprob) -> Json:
    return {
        "token": _text(row.token),
        "logprob": _finite(row.logprob),
        "bytes": list(row.token),
    }


def _text(token: bytes) -> str:
    """The token's text; of a part of a character its bytes, spelled as OpenAI spells them."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
