"""Drawing follows its parameters exactly, and no batch changes it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_service.sampling.noise import NoiseKey, noise_of_all
from runtime_service.sampling.sampler import (
    Draw,
    NonFiniteLogits,
    RowSampler,
    sample,
    token_logprobs,
)
from runtime_service.sampling.truncation import least_score
from runtime_service.scheduling.request import SamplingParams, StopParams
from runtime_service.validation import REPETITION_PENALTIES

VOCAB_SIZE = 61


def draw_of(
    tokens: list[int],
    num_prompt_tokens: int = 1,
    stop: StopParams | None = None,
    sample_index: int = 0,
    vocab_size: int = VOCAB_SIZE,
    **params: Any,
) -> Draw:
    row = RowSampler(
        SamplingParams(**params), stop or StopParams(100), sample_index, num_prompt_tokens,
        vocab_size,
    )  # fmt: skip
    return Draw(row, np.array(tokens, dtype=np.int32))


def slow_scores(logits: list[float], draw: Draw) -> list[float]:
    """Scores after everything but noise, one token at a time; -inf is never drawn."""
    params, tokens = draw.row.params, draw.tokens.tolist()
    outputs = tokens[draw.row.num_prompt_tokens :]
    scores = list(logits)
    if len(outputs) < draw.row.stop.min_new_tokens:
        for token in draw.row.stop.end_token_ids:
            scores[token] = -math.inf
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in range(len(scores)):
        if token in tokens:
            penalty = params.repetition_penalty
            scores[token] = (
                scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            )
        if token in outputs:
            scores[token] -= params.presence_penalty
            scores[token] -= params.frequency_penalty * outputs.count(token)
    if params.temperature == 0:
        return scores
    scores = [(s - max(scores)) / params.temperature for s in scores]
    order = sorted(range(len(scores)), key=lambda t: -scores[t])
    kept = set(order)
    if params.top_k:
        kth = scores[order[min(params.top_k, len(order)) - 1]]
        kept = {t for t in kept if scores[t] >= kth}
    if params.top_p < 1:
        total = sum(math.exp(scores[t]) for t in kept)
        mass, last = 0.0, order[0]
        for token in [t for t in order if t in kept]:
            last = token
            mass += math.exp(scores[token]) / total
            if mass >= params.top_p:
                break
        kept = {t for t in kept if scores[t] >= scores[last]}
    if params.min_p > 0:
        kept = {t for t in kept if math.exp(scores[t] - scores[order[0]]) >= params.min_p}
    return [s if t in kept else -math.inf for t, s in enumerate(scores)]


def slow_token(logits: torch.Tensor, draw: Draw) -> tuple[int, float]:
    """The token, and by how much it wins."""
    scores = torch.tensor(slow_scores(logits.tolist(), draw), dtype=torch.float64)
    params = draw.row.params
    if params.temperature > 0:
        key = NoiseKey(params.seed, draw.row.sample_index, len(draw.tokens))
        scores = scores + noise_of_all([key], len(scores))[0].double()
    values, ids = scores.topk(2)
    return int(ids[0]), float(values[0] - values[1])


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 1e-6, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 0, 1, 3, 40, 10_000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.999, 0.6, 0.01]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.9, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.5, -0.7]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4, -0.3]),
        "logit_bias": st.sampled_from([(), (), ((3, 5.0),), ((0, -100.0), (60, 2.0), (0, 1.0))]),
        "seed": st.integers(0, 2**64 - 1),
        "num_logprobs": st.sampled_from([None, None, 0, 3]),
    }
)
ROWS = st.fixed_dictionaries(
    {
        "params": PARAMS,
        "prompt": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12),
        "output": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12),
        "min_new_tokens": st.sampled_from([0, 0, 5]),
        "end_token_ids": st.sampled_from([(), (7,), (7, 8, 9)]),
        "sample_index": st.integers(0, 3),
        "logits": st.integers(0, 2**31),
        "spread": st.sampled_from([0.1, 1.0, 8.0]),
    }
)


def build_row(row: dict[str, Any]) -> tuple[torch.Tensor, Draw]:
    generator = torch.Generator().manual_seed(row["logits"])
    logits = torch.randn(VOCAB_SIZE, generator=generator) * row["spread"]
    stop = StopParams(100, row["min_new_tokens"], row["end_token_ids"])
    tokens = row["prompt"] + row["output"]
    draw = draw_of(tokens, len(row["prompt"]), stop, row["sample_index"], **row["params"])
    return logits, draw


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=6))
def test_sample_equals_a_slow_reference_in_any_batch(rows: list[dict[str, Any]]) -> None:
    built = [build_row(row) for row in rows]
    logits = torch.stack([logits for logits, _ in built])
    token_ids, logprobs = sample(logits.clone(), [draw for _, draw in built])
    for index, (own, draw) in enumerate(built):
        expected, margin = slow_token(own, draw)
        if margin > 1e-4:
            assert token_ids[index] == expected
        alone, alone_logprobs = sample(own[None].clone(), [build_row(rows[index])[1]])
        assert alone == [token_ids[index]], "the batch changed a row's token"
        assert alone_logprobs == [logprobs[index]], "the batch changed a row's log probabilities"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
    ],
    ids=str,
)
def test_drawn_tokens_have_the_probabilities_of_softmax(params: dict[str, float]) -> None:
    """Chi-square over 20,000 positions; the bound is exceeded once in a thousand seeds."""
    count, vocab_size = 20_000, 12
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    row = draw_of([0], vocab_size=vocab_size, seed=17, **params).row
    tokens = np.zeros(count, dtype=np.int32)
    drawn: list[int] = []
    for first in range(0, count, 500):
        draws = [Draw(row, tokens[:n]) for n in range(first + 1, first + 501)]
        drawn += sample(logits.repeat(500, 1), draws)[0]
    scores = slow_scores(logits.tolist(), Draw(row, tokens[:1]))
    expected = torch.tensor(scores, dtype=torch.float64).softmax(0) * count
    found = torch.bincount(torch.tensor(drawn), minlength=vocab_size).double()
    assert not bool(found[expected == 0].any()), "a token was drawn that is excluded"
    kept = expected > 0
    statistic = float(((found - expected)[kept] ** 2 / expected[kept]).sum())
    degrees = int(kept.sum()) - 1
    # Wilson-Hilferty: the 99.9 % point of chi-square.
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < bound


def test_counting_again_after_a_discarded_step_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, VOCAB_SIZE, generator=generator)
    params = {"repetition_penalty": 1.4, "frequency_penalty": 0.9}
    history = [5, 6, 7, 7, 8, 8]
    row = draw_of(history, 2, **params).row
    tokens = np.array([*history, 9, 9], dtype=np.int32)

    def adjusted(row: RowSampler, count: int) -> torch.Tensor:
        changed = logits.clone()
        sample(changed, [Draw(row, tokens[:count])])
        return changed

    fresh = adjusted(draw_of(history, 2, **params).row, 6)
    adjusted(row, 8)
    assert torch.equal(adjusted(row, 6), fresh)
    assert torch.equal(adjusted(row, 6), fresh)


def test_many_candidates_give_the_token_that_few_would() -> None:
    """Noise made for a whole row and noise made token by token choose alike."""
    vocab_size = 20_000
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1))
    for seed in range(10):
        wide = draw_of([1], vocab_size=vocab_size, temperature=1.0, top_k=vocab_size - 1, seed=seed)
        plain = draw_of([1], vocab_size=vocab_size, temperature=1.0, seed=seed)
        assert sample(logits.clone(), [wide])[0] == sample(logits.clone(), [plain])[0]


@pytest.mark.parametrize("deviation", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (3000, 0.9), (3000, 1.0), (40_000, 0.3)])
def test_least_score_of_a_long_row_is_the_last_that_is_kept(
    deviation: float, top_k: int, top_p: float
) -> None:
    """Hundreds to all of 50,000 tokens are kept, some as likely as others; counted one by one."""
    generator = torch.Generator().manual_seed(3)
    scores = (torch.randn(1, 50_000, generator=generator) * 100 * deviation).round() / 100
    kept = sorted(scores[0].tolist(), reverse=True)
    if top_k:
        kept = [score for score in kept if score >= kept[top_k - 1]]
    total, reached = math.fsum(map(math.exp, kept)), 0.0
    for least in kept:
        reached += math.exp(least) / total
        if reached >= top_p:
            break
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, seed=0)
    assert least_score(scores[0].numpy(), params) == least


def test_equal_scores_are_all_kept() -> None:
    """Which of two equal tokens is drawn follows the noise, never an order of the vocabulary."""
    logits = torch.zeros(1, VOCAB_SIZE)
    drawn = {
        sample(logits.clone(), [draw_of([1], temperature=1.0, top_k=2, seed=seed)])[0][0]
        for seed in range(400)
    }
    assert len(drawn) > VOCAB_SIZE * 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise(bad: float) -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1, 40] = bad
    with pytest.raises(NonFiniteLogits):
        sample(logits, [draw_of([1])] * 3)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    expected = logits.double().log_softmax(-1)
    draw = draw_of([1], temperature=0.5, top_k=3, num_logprobs=4, logit_bias=((5, 50.0),))
    (first, _), (entry, nothing) = sample(logits.clone(), [draw, draw_of([1])])
    assert first == 5
    assert nothing is None
    assert entry is not None
    assert entry.token_id == 5
    assert entry.logprob == pytest.approx(float(expected[0, 5]), abs=1e-5)
    assert entry.rank == int((expected[0] > expected[0, 5]).sum()) + 1
    values, ids = expected[0].topk(4)
    assert [token for token, _ in entry.top] == ids.tolist()
    assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_token_logprobs_gives_each_row_as_many_as_it_asks_for() -> None:
    entries = token_logprobs(torch.randn(3, 5), torch.tensor([0, 1, 2]), [0, 9, 2])
    assert [len(entry.top) for entry in entries] == [0, 5, 2]


@pytest.mark.parametrize("penalty", REPETITION_PENALTIES)
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_greatest_penalties_leave_a_token_to_draw(
    penalty: float, truncation: dict[str, Any]
) -> None:
    """One request's parameters never end the engine of all: its own scores stay finite."""
    params = SamplingParams(temperature=1.0, repetition_penalty=penalty, seed=3, **truncation)
    row = RowSampler(params, StopParams(5), 0, 3, 300)
    logits_RV = 1e4 * torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    seen = np.arange(10, dtype=np.int32)
    ((token_id,), _) = sample(logits_RV, [Draw(row, seen)])
    assert 0 <= token_id < 300
    # What is not drawn may be -infinity by now; of a best score that was not finite NaN would be left.
    assert not logits_RV.isnan().any()
