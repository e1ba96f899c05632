"""No token reaches an engine that its model does not know: neither to be read nor to be masked."""

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
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


VOCAB_SIZE = 300
# By the fields of a start that hold token ids: a start with this one there.
STARTS = {
    "token_ids.ids": lambda token: pb.StartGeneration(token_ids=pb.TokenIds(ids=[1, token, 2])),
    "resumed_token_ids": lambda token: pb.StartGeneration(text="a", resumed_token_ids=[token, 1]),
    "sampling.logit_bias.key": lambda token: pb.StartGeneration(
        text="a", sampling=pb.SamplingParams(logit_bias={1: 0.5, token: 0.5})
    ),
    "stop.token_ids": lambda token: pb.StartGeneration(
        text="a", stop=pb.StopConditions(token_ids=[token])
    ),
}


def _unsigned_fields(message: Descriptor, path: str = "") -> Iterator[str]:
    for field in message.fields:
        if field.type == FieldDescriptor.TYPE_UINT32:
            yield path + field.name
        elif field.message_type is not None and field.message_type.full_name.startswith("millrace"):
            yield from _unsigned_fields(field.message_type, f"{path}{field.name}.")


def test_every_field_of_a_start_that_names_tokens_is_known_here() -> None:
    """Token ids are the protocol's uint32: whoever adds one has it refused below."""
    assert set(_unsigned_fields(pb.StartGeneration.DESCRIPTOR)) == set(STARTS)


@pytest.mark.parametrize("token", [VOCAB_SIZE, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("field", STARTS)
def test_token_beyond_the_vocabulary_is_refused_wherever_it_is_named(
    field: str, token: int
) -> None:
    """Read, it is a fault of the device that ends every stream; masked, another sequence's logit."""
    parse_start(STARTS[field](VOCAB_SIZE - 1), VOCAB_SIZE, ())
    with pytest.raises(InvalidField, match=f"below the vocabulary's 300, found {token}") as bad:
        parse_start(STARTS[field](token), VOCAB_SIZE, ())
    assert bad.value.fields["field"] == "start." + field.removesuffix(".key")


def test_some_token_is_left_to_draw_at_first() -> None:
    """Were all masked, no logit would be finite, and the engine would end for everybody."""
    stop = pb.StopConditions(min_new_tokens=1, token_ids=range(8))
    start = pb.StartGeneration(text="a", stop=stop)
    assert len(parse_start(start, 9, ()).end_token_ids) == 8
    with pytest.raises(InvalidField, match="none is left to begin with") as bad:
        parse_start(start, 8, ())
    assert bad.value.fields["field"] == "start.stop.min_new_tokens"
    stop.min_new_tokens = 0
    assert parse_start(pb.StartGeneration(text="a", stop=stop), 8, ()).min_new_tokens == 0
