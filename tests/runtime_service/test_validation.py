"""What a start may ask of an engine once its prompt is known: the checks that need no engine."""

import json

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request
from runtime_service.validation import (
    MAX_PROMPT_LOGPROBS,
    MAX_TEMPLATE_ARGUMENTS_BYTES,
    parse_start,
    template_arguments_of,
    to_request,
)
from shared.errors import InvalidField

LIMITS = RuntimeLimits(1 << 20, 8, 512, 16, 1 << 16, "bfloat16", 0, "")


def request_of(sampling: pb.SamplingParams, num_tokens: int) -> Request:
    start = pb.StartGeneration(text="a", sampling=sampling)
    return to_request(parse_start(start, 100, ()), 1, [0] * num_tokens, LIMITS, "")


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_prompts_are_scored_up_to_what_a_daemon_keeps(num_top: int) -> None:
    """All of it waits in memory for the first token: a prompt of a million tokens would fill it."""
    most = MAX_PROMPT_LOGPROBS // (1 + num_top)
    scored = pb.SamplingParams(prompt_logprobs=True, top_logprobs=num_top)
    assert request_of(scored, most).sampling.prompt_logprobs
    with pytest.raises(InvalidField) as refused:
        request_of(scored, most + 1)
    told = f"prompts have at most {most} tokens, found {most + 1} tokens"
    assert str(refused.value).startswith("start.sampling.prompt_logprobs: ")
    assert told in str(refused.value)
    assert request_of(pb.SamplingParams(top_logprobs=num_top), most + 1).sampling.seed >= 0


def test_template_arguments_are_what_their_json_says() -> None:
    """Members in their order, and numbers as they were written: a template may show them."""
    text = '{"b": 1, "a": {"d": 1.0, "c": [true, null, 123456789012345678901234567890]}}'
    arguments = template_arguments_of(pb.Chat(template_arguments=text))
    assert json.dumps(arguments) == text
    assert template_arguments_of(pb.Chat()) == {}


MOST = MAX_TEMPLATE_ARGUMENTS_BYTES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"a": NaN}', "is not JSON"),
        ('{"a": "\\ud800"}', "is not JSON"),
        ('{"a": ' + "[" * 30_000 + "]" * 30_000 + "}", "is not JSON"),
        (" " * MOST + "{}", f"must be at most {MOST} bytes of JSON, found {MOST + 2} bytes"),
    ],
    ids=["cut", "list", "nan", "surrogate", "deep", "long"],
)
def test_template_arguments_that_are_no_object_are_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidField, match=r"^start\.chat\.template_arguments") as refused:
        template_arguments_of(pb.Chat(template_arguments=text))
    assert says in str(refused.value)
