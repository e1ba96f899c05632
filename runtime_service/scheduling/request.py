"""One generation as the scheduler knows it: token ids, limits, and where it stands.

Text, stop strings, deadlines and streams belong to the front process.
"""

from dataclasses import dataclass, field

# Of one generation, checked at the edge: what a row of the device's tables holds.
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_END_TOKENS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick each token; ranges are checked at the edge (`runtime_service/validation.py`).

    Args:
        temperature: 0 is greedy.
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
        logit_bias: (token id, added to its logit).
        seed: always set: an unset one is drawn at the edge.
        num_logprobs: candidates to report beside each token; None reports nothing.
        prompt_logprobs: report them for the prompt's tokens too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    num_logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class StopParams:
    """When the engine process itself ends a sequence.

    Args:
        max_new_tokens: at least 1, already bounded by the engine's sequence limit.
        min_new_tokens: `end_token_ids` are masked before this many tokens.
        end_token_ids: sorted; empty where end tokens are ignored.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Request:
    """One generation, as it was asked for.

    Args:
        request_id: unique in the engine process; chosen by the front.
        prompt_token_ids: at least one.
        resumed_token_ids: generated elsewhere before; positions go on after them.
        num_samples: the `n` of the request; more than one needs no resumed tokens.
        first_sample_index: of its first sample in the randomness key: 0 unless it goes on with one
            sample of many.
        priority: higher first; of one priority tenants take turns (turns.py).
        cache_salt: the tenant's: tenants share no prefix cache, and take turns.
        credit_tokens: tokens that may still be drawn, over all samples; None = no limit.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: StopParams
    resumed_token_ids: list[int] = field(default_factory=list)
    num_samples: int = 1
    first_sample_index: int = 0
    priority: int = 0
    cache_salt: str = ""
    credit_tokens: int | None = None
