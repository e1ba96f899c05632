"""How a row draws, as the words of its place in the device's sampling table (`kernels/step_inputs/layout.py`)."""

import math

import numpy as np
import numpy.typing as npt

from kernels.step_inputs.layout import GREEDY, ON_HOST, RANDOM, SAMPLING_WORDS, TRUNCATED
from runtime_service.sampling.token_counts import has_penalties
from runtime_service.sampling.truncation import truncates
from runtime_service.scheduling.request import SamplingParams, StopParams

Words = npt.NDArray[np.int32]

_MASK = 0xFFFFFFFF
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)


def draws_on_host(params: SamplingParams, stop: StopParams) -> bool:
    """Claims that the device's sampler does not know all that such a row asks for."""
    return (
        params.num_logprobs is not None
        or params.prompt_logprobs
        or bool(params.logit_bias)
        or has_penalties(params)
        or bool(stop.min_new_tokens and stop.end_token_ids)
    )


def mode_of(params: SamplingParams, is_on_host: bool) -> int:
    """Which kernel draws the row's tokens."""
    if is_on_host:
        return ON_HOST
    if params.temperature == 0:
        return GREEDY
    return TRUNCATED if truncates(params) else RANDOM


def sampling_words(
    params: SamplingParams, sample_index: int, vocab_size: int, is_on_host: bool
) -> Words:
    """The row's words, int32."""
    words = np.zeros(SAMPLING_WORDS, dtype=np.uint32)
    min_score = math.log(params.min_p) if params.min_p > 0 else -math.inf
    words[:3] = np.array(
        [max(params.temperature, _LEAST_TEMPERATURE), params.top_p, min_score], dtype=np.float32
    ).view(np.uint32)
    words[3] = min(params.top_k, vocab_size)
    words[4], words[5] = params.seed & _MASK, params.seed >> 32 & _MASK
    words[6] = sample_index
    words[7] = mode_of(params, is_on_host)
    return words.view(np.int32)
