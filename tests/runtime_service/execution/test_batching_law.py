"""Law 5: batching never changes an answer, on a real fp32 engine under the real scheduler."""

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import pytest

from runtime_service.engine_messages import SampleOutput
from runtime_service.execution.limits import RunnerOptions
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.scheduling.output import ModelRunnerOutput
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.scheduler import Scheduler
from tests.runtime_service.execution.engines import build_tiny

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


def serve(
    loaded: LoadedEngine, requests: list[Request], max_unread: int
) -> tuple[dict[tuple[int, int], list[SampleOutput]], Scheduler]:
    """All requests, arriving over the first steps; what each sample gained."""
    scheduler = Scheduler(loaded.limits)
    waiting, unread = deque(requests), deque[Future[ModelRunnerOutput]]()
    gained: dict[tuple[int, int], list[SampleOutput]] = {}
    while True:
        if waiting:
            scheduler.add(waiting.popleft())
        step = scheduler.schedule()
        if step is not None:
            unread.append(loaded.runner.execute(step))
        while len(unread) > (max_unread if step is not None else 0):
            for output in scheduler.update_from(unread.popleft().result()):
                gained.setdefault((output.request_id, output.sample_index), []).append(output)
        if step is None and not unread and not waiting:
            return gained, scheduler


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


def fresh(request: Request) -> Request:
    return replace(request, prompt_token_ids=list(request.prompt_token_ids))


def tokens_of(outputs: list[SampleOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_unread", [0, 1], ids=["no overlap", "overlap"])
def test_batching_never_changes_an_answer(loaded: LoadedEngine, seed: int, max_unread: int) -> None:
    requests = random_requests(seed)
    together, scheduler = serve(loaded, [fresh(r) for r in requests], max_unread)
    stats = scheduler.stats()
    assert stats.preemptions > 0, "the load preempts nobody"
    assert stats.prefix_hit_tokens > 0, "the load finds no prefix"
    for request in requests:
        alone, _ = serve(loaded, [fresh(request)], 0)
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
