"""How a row draws, as the words of its places in the device's tables (`kernels/step_inputs/layout.py`)."""

import math

import numpy as np
import numpy.typing as npt

from kernels.step_inputs.layout import (
    EDIT_WORDS,
    GREEDY,
    MAX_BIASES,
    MAX_ENDS,
    RANDOM,
    SAMPLING_WORDS,
    TRUNCATED,
)
from runtime_service.sampling.token_counts import has_penalties
from runtime_service.sampling.truncation import truncates
from runtime_service.scheduling.output import NewSequence
from runtime_service.scheduling.request import SamplingParams, StopParams

Words = npt.NDArray[np.int32]

_MASK = 0xFFFFFFFF
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
_MAX_POSITION = (1 << 31) - 1

# What a row's draws need beside its best logit, as bits.
DRAWS_RANDOM, TRUNCATES, ADJUSTS, REPORTS = 1, 2, 4, 8


def mode_of(params: SamplingParams) -> int:
    """Which kernels draw the row's tokens."""
    if params.temperature == 0:
        return GREEDY
    return TRUNCATED if truncates(params) else RANDOM


def needs_of(new: NewSequence) -> int:
    """The row's bits."""
    params = new.sampling
    needs = {GREEDY: 0, RANDOM: DRAWS_RANDOM, TRUNCATED: TRUNCATES}[mode_of(params)]
    if _masked(new.stop) or params.logit_bias or has_penalties(params):
        needs |= ADJUSTS
    return needs | (REPORTS if params.num_logprobs is not None else 0)


def sampling_words(new: NewSequence, vocab_size: int) -> Words:
    """The row's words of the sampling table, int32."""
    params = new.sampling
    words = np.zeros(SAMPLING_WORDS, dtype=np.uint32)
    min_score = math.log(params.min_p) if params.min_p > 0 else -math.inf
    temperature = max(params.temperature, _LEAST_TEMPERATURE)
    words[:3] = _bits(temperature, params.top_p, min_score)
    words[3] = params.top_k if params.top_k < vocab_size else 0
    words[4], words[5] = params.seed & _MASK, params.seed >> 32 & _MASK
    words[6] = new.sample_index
    words[7] = mode_of(params)
    words[8:11] = _bits(
        params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    )
    words[11] = new.num_prompt_tokens
    words[12] = min(new.num_prompt_tokens + new.stop.min_new_tokens, _MAX_POSITION)
    words[13] = len(_masked(new.stop))
    words[14] = len(params.logit_bias)
    words[15] = 0 if params.num_logprobs is None else 1 + params.num_logprobs
    return words.view(np.int32)


def edit_words(new: NewSequence) -> Words:
    """The row's words of the edits table, int32; none beyond the last that is used."""
    ends = _masked(new.stop)
    bias = new.sampling.logit_bias
    assert len(ends) <= MAX_ENDS, f"{len(ends)} end tokens are masked"
    assert len(bias) <= MAX_BIASES, f"{len(bias)} tokens have a bias"
    words = np.zeros(EDIT_WORDS, dtype=np.int32)
    words[: len(ends)] = ends
    if not bias:
        return words[: len(ends)]
    tokens, values = zip(*bias, strict=True)
    words[MAX_ENDS : MAX_ENDS + len(bias)] = tokens
    words[MAX_ENDS + MAX_BIASES :][: len(bias)] = _bits(*values).view(np.int32)
    return words[: MAX_ENDS + MAX_BIASES + len(bias)]


def _masked(stop: StopParams) -> tuple[int, ...]:
    """End tokens that are not drawn at first."""
    return stop.end_token_ids if stop.min_new_tokens else ()


def _bits(*values: float) -> npt.NDArray[np.uint32]:
    return np.array(values, dtype=np.float32).view(np.uint32)
