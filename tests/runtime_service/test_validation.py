"""What a start may ask of an engine once its prompt is known: the checks that need no engine."""

import pytest
from millrace.runtime.v1 import runtime_pb2 as pb

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request
from runtime_service.validation import MAX_PROMPT_LOGPROBS, parse_start, to_request
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
