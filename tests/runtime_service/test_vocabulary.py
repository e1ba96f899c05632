"""No token reaches an engine that its model does not know: neither to be read nor to be masked."""

from typing import Any

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from compiler_service.checkpoints.byte_tokenizer import byte_tokenizer_files
from runtime_service.served_engine import EngineText, ServedEngine
from runtime_service.text import ModelText
from runtime_service.validation import parse_start
from shared.errors import InvalidField

TEMPLATE = {"chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}"}


def test_text_of_a_token_beyond_the_vocabulary_is_refused() -> None:
    """A tokenizer may know more tokens than the model has embeddings for: reading there ends an engine process."""
    text = ModelText(byte_tokenizer_files() | TEMPLATE)
    known, unknown = (max(text.encode(said)) for said in ("a", "z"))
    nothing: Any = None
    served = ServedEngine(nothing, EngineText(text, known + 1), nothing)

    def chat(said: str) -> pb.StartGeneration:
        return pb.StartGeneration(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=said)])
        )

    for start, field in ((pb.StartGeneration(text="az"), "text"), (chat("az"), "chat")):
        with pytest.raises(InvalidField, match=f"below the vocabulary's .*found {unknown}") as bad:
            served.encode(start)
        assert bad.value.fields["field"] == f"start.{field}"
    assert served.encode(pb.StartGeneration(text="a")) == text.encode("a")
    assert max(served.encode(chat("a"))) == known


def test_end_tokens_of_the_model_that_it_cannot_draw_are_left_out() -> None:
    """A mask is written at their places, which are those of another sequence's logits."""
    start = parse_start(pb.StartGeneration(text="a"), 100, (-1, 2, 99, 100, 151_645))
    assert start.end_token_ids == (2, 99)
