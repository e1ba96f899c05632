"""Law 5: batching never changes an answer, on a real fp32 engine under the real scheduler."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from runtime_service.engine_messages import SampleOutput
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from tests.runtime_service.execution.engines import build_tiny
from tests.runtime_service.execution.serving import serve, tokens_of

# A difference is allowed only at a first token whose two best scores lie closer than this.
TIE = 1e-4


@pytest.fixture(scope="module", params=["mistral", "qwen3"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadedEngine]:
    family = request.param
    store, engine = build_tiny(tmp_path_factory.mktemp(family), family)
    # Few blocks, small steps: prompts are cut, sequences are preempted.
    options = RunnerOptions(
        max_sequence_tokens=96, max_sequences=6, max_step_tokens=20, num_threads=1, block_tokens=8
    )
    whole = load_runner(store, engine, options)
    few = replace(whole.limits, num_blocks=22)
    yield LoadedEngine(whole.runner, few, whole.phases)
    whole.runner.close()


def random_requests(seed: int) -> list[Request]:
    pick = random.Random(seed)
    stem = [pick.randrange(300) for _ in range(40)]
    requests = []
    for number in range(14):
        prompt = stem[: pick.randrange(1, 40)] + [
            pick.randrange(300) for _ in range(pick.randrange(1, 9))
        ]
        is_greedy = pick.random() < 0.5
        sampling = SamplingParams(
            temperature=0.0 if is_greedy else 0.9,
            top_k=pick.choice([0, 20]),
            top_p=pick.choice([1.0, 0.9]),
            repetition_penalty=pick.choice([1.0, 1.2]),
            seed=pick.getrandbits(64),
            num_logprobs=2,
        )
        stop = StopParams(pick.randrange(1, 40), pick.choice([0, 5]), (7, 8, 9))
        samples = 1 if is_greedy else pick.choice([1, 3])
        requests.append(Request(number, prompt, sampling, stop, num_samples=samples))
    return requests


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_unread", [0, 1], ids=["no overlap", "overlap"])
def test_batching_never_changes_an_answer(loaded: LoadedEngine, seed: int, max_unread: int) -> None:
    requests = random_requests(seed)
    together, scheduler = serve(loaded.runner, loaded.limits, requests, max_unread)
    stats = scheduler.stats()
    assert stats.preemptions > 0, "the load preempts nobody"
    assert stats.prefix_hit_tokens > 0, "the load finds no prefix"
    for request in requests:
        alone, _ = serve(loaded.runner, loaded.limits, [request], 0)
        for (_, index), expected in alone.items():
            found = together[request.request_id, index]
            _require_same(found, expected)


def _require_same(found: list[SampleOutput], expected: list[SampleOutput]) -> None:
    if tokens_of(found) == tokens_of(expected):
        assert found[-1].finish == expected[-1].finish
        return
    # Logits differ by 1e-6 between batch shapes: allowed where two candidates are that close.
    position = next(
        i
        for i, (a, b) in enumerate(zip(tokens_of(found), tokens_of(expected), strict=False))
        if a != b
    )
    logprobs = [entry for output in expected for entry in output.logprobs]
    (_, best), (_, second) = logprobs[position].top
    assert best - second < TIE, f"token {position} differs and is no tie"
