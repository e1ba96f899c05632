"""The runner gives what the reference gives, however a sequence is cut, moved or entered again."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import reference
from kernels.batch import StepBatch
from runtime_service.execution.cpu_executor import MOST_PREPARED_FLOPS, CpuExecutor
from runtime_service.execution.executor import Executor
from runtime_service.execution.loading import LoadedEngine, load_runner, read_graph
from runtime_service.execution.model_runner import MANY_STEPS, ModelRunner
from runtime_service.execution.options import RunnerOptions
from runtime_service.sampling.sampler import NonFiniteLogits
from runtime_service.scheduling.output import (
    ModelRunnerOutput,
    NewSequence,
    ScheduledSequence,
    SchedulerOutput,
    TokenLogprobs,
)
from runtime_service.scheduling.request import SamplingParams, StopParams
from shared.store.weights import WeightReader
from tests.runtime_service.execution.engines import build_tiny, graph_of

OPTIONS = RunnerOptions(max_sequence_tokens=96, max_sequences=8, num_threads=1, block_tokens=8)
SCORED = SamplingParams(num_logprobs=3, prompt_logprobs=True)
STOP = StopParams(50)
PROMPT = [int(i * i * 7 + 3) % 300 for i in range(37)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedEngine]:
    """A tiny fp32 Mistral, whose window of 16 is shorter than the prompts."""
    store, engine = build_tiny(tmp_path_factory.mktemp("mistral"), "mistral")
    loaded = load_runner(store, engine, OPTIONS)
    loaded.runner.warm_up()
    yield loaded
    loaded.runner.close()


def run(
    loaded: LoadedEngine,
    scheduled: list[ScheduledSequence],
    new: list[NewSequence] | None = None,
    copies: tuple[tuple[int, int], ...] = (),
    freed: tuple[int, ...] = (),
) -> ModelRunnerOutput:
    step = SchedulerOutput(7, freed, tuple(new or ()), copies, tuple(scheduled))
    return loaded.runner.execute(step).result()


def enter(
    row: int,
    tokens: list[int],
    blocks: list[int],
    sampling: SamplingParams = SCORED,
    cached: int = 0,
) -> NewSequence:
    return NewSequence(row, tokens, len(PROMPT), sampling, STOP, 0, cached, blocks)


def whole(loaded: LoadedEngine, num_new: int) -> tuple[list[int], list[TokenLogprobs]]:
    """Tokens drawn after the prompt computed at once, and the log probabilities of all."""
    count = len(PROMPT)
    output = run(loaded, [ScheduledSequence(0, 0, count)], [enter(0, PROMPT, list(range(12)))])
    tokens = [output.sampled[0].token_ids[0]]
    logprobs = [*output.prompt_logprobs[0], *output.sampled[0].logprobs]
    for position in range(count, count + num_new - 1):
        output = run(loaded, [ScheduledSequence(0, position, 1)])
        tokens.append(output.sampled[0].token_ids[0])
        logprobs += output.sampled[0].logprobs
    return tokens, logprobs


def assert_same(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert [entry.token_id for entry in found] == [entry.token_id for entry in expected]
    assert [e.logprob for e in found] == pytest.approx([e.logprob for e in expected], abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "quant", ["fp32", "bf16", "int8", "int4", "int4-awq", "int4-gptq", "w8a8-int8"]
)
def test_runner_gives_the_references_log_probabilities(
    tmp_path: Path, family: str, quant: str
) -> None:
    store, engine = build_tiny(tmp_path, family, quant)
    own = load_runner(store, engine, OPTIONS)
    graph = graph_of(store, engine)
    with WeightReader(store, engine) as reader:
        dense = reference.dense(
            graph, {name: reader.roles(name) for name in graph.weights}, torch.float64
        )
    token_ids = torch.tensor(PROMPT, dtype=torch.int32)
    batch = reference.prompt_batch(graph, [len(PROMPT)], torch.float64)
    expected = reference.run(graph, dense, token_ids, batch)["logits"].log_softmax(-1)
    output = run(own, [ScheduledSequence(0, 0, len(PROMPT))], [enter(0, PROMPT, list(range(5)))])
    own.runner.close()
    found = [entry.logprob for entry in output.prompt_logprobs[0]]
    wanted = [float(expected[p, PROMPT[p + 1]]) for p in range(len(PROMPT) - 1)]
    # Random tiny models amplify bf16's roundings in the cache; real ones do not.
    error = (torch.tensor(found) - torch.tensor(wanted)).abs()
    if quant == "fp32":
        assert float(error.max()) < 1e-4
        assert output.sampled[0].token_ids[0] == int(expected[-1].argmax())
    else:
        # Inputs in 8 bits become the next code where bf16 has rounded them.
        assert float(error.mean()) < (0.15 if quant == "w8a8-int8" else 0.1)


@pytest.mark.parametrize("chunk", [1, 5, 8, 16, 36])
def test_chunks_of_a_prompt_give_what_the_whole_gives(loaded: LoadedEngine, chunk: int) -> None:
    expected = whole(loaded, 1)[1]
    new = [enter(1, PROMPT, [20, 31, 22, 33, 24])]
    found: list[TokenLogprobs] = []
    for start in range(0, len(PROMPT), chunk):
        count = min(chunk, len(PROMPT) - start)
        is_last = start + count == len(PROMPT)
        output = run(loaded, [ScheduledSequence(1, start, count, is_sampled=is_last)], new)
        new = []
        found += output.prompt_logprobs.get(1, ())
        for sampled in output.sampled:
            found += sampled.logprobs
    assert_same(found, expected)


class CountedExecutor:
    """Notes the logits that each forward pass is asked for."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.num_logit_rows: list[int] = []

    def forward(self, token_ids_T: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        self.num_logit_rows.append(len(batch.logit_rows_R))
        return self._executor.forward(token_ids_T, batch)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self._executor.copy_blocks(copies)


def test_scored_prompts_hold_the_logits_of_few_tokens_at_once(loaded: LoadedEngine) -> None:
    """A prompt may be longer than memory has room for its logits."""
    expected = whole(loaded, 1)[1]
    assert isinstance(loaded.runner, ModelRunner)
    counted = CountedExecutor(loaded.runner._executor)
    runner = ModelRunner(counted, loaded.limits, 300, max_logit_rows=8)
    new = [enter(r, PROMPT, [12 * (r + 1) + b for b in range(6)]) for r in range(2)]
    both = tuple(ScheduledSequence(row, 0, len(PROMPT)) for row in range(2))
    output = runner.execute(SchedulerOutput(0, (), tuple(new), (), both)).result()
    runner.close()
    assert counted.num_logit_rows == [8] * 9 + [2]
    for row, sampled in enumerate(output.sampled):
        assert sampled.row == row
        assert_same([*output.prompt_logprobs[row], *sampled.logprobs], expected)


def test_mixed_steps_give_each_row_what_it_has_alone(loaded: LoadedEngine) -> None:
    tokens, logprobs = whole(loaded, 6)
    count = len(PROMPT)
    new = [enter(r, PROMPT, [12 * (r + 1) + b for b in range(6)]) for r in range(3)]
    found: dict[int, list[TokenLogprobs]] = {0: [], 1: [], 2: []}
    # Row 0 decodes while row 1 is prefilled in chunks and row 2 waits, then decodes with both.
    steps = [
        ([ScheduledSequence(0, 0, count)], new[:1]),
        ([ScheduledSequence(0, count, 1), ScheduledSequence(1, 0, 10, is_sampled=False)], new[1:2]),
        ([ScheduledSequence(1, 10, 27), ScheduledSequence(0, count + 1, 1)], []),
        (
            [
                ScheduledSequence(2, 0, 11, is_sampled=False),
                ScheduledSequence(1, count, 1),
                ScheduledSequence(0, count + 2, 1),
            ],
            new[2:],
        ),
        ([ScheduledSequence(2, 11, 26), ScheduledSequence(1, count + 1, 1)], []),
        ([ScheduledSequence(r, p, 1) for r, p in ((2, count), (0, count + 3), (1, count + 2))], []),
    ]
    for scheduled, entering in steps:
        output = run(loaded, scheduled, entering)
        for row, entries in output.prompt_logprobs.items():
            found[row] += entries
        for sampled in output.sampled:
            found[sampled.row] += sampled.logprobs
    for row in found:
        assert_same(found[row], logprobs[: len(found[row])])
        assert len(found[row]) > count
    assert [e.token_id for e in found[0][count - 1 :]] == tokens[: len(found[0]) - count + 1]


def test_preempted_sequence_goes_on_where_it_was(loaded: LoadedEngine) -> None:
    tokens, logprobs = whole(loaded, 6)
    known = PROMPT + tokens[:3]
    new = enter(2, known, [40, 42, 44, 46, 48, 50])
    count = len(known)
    output = run(loaded, [ScheduledSequence(2, 0, count)], [new], freed=(0,))
    found = [*output.prompt_logprobs[2], *output.sampled[0].logprobs]
    output = run(loaded, [ScheduledSequence(2, count, 1)])
    found += output.sampled[0].logprobs
    # The prompt's tokens are scored again; tokens that were generated before are not.
    expected = logprobs[: len(PROMPT) - 1] + logprobs[len(PROMPT) + 2 : len(PROMPT) + 4]
    assert_same(found, expected)


def test_copied_block_serves_a_sibling(loaded: LoadedEngine) -> None:
    tokens, _ = whole(loaded, 3)
    sibling = enter(3, PROMPT, [0, 1, 2, 3, 70], SamplingParams(num_logprobs=0), cached=36)
    output = run(loaded, [ScheduledSequence(3, 36, 1)], [sibling], copies=((4, 70),))
    assert output.sampled[0].token_ids[0] == tokens[0]
    # Both write their next token's keys: each into its own block.
    run(loaded, [ScheduledSequence(3, 37, 1)])
    output = run(loaded, [ScheduledSequence(0, 37, 1)])
    assert output.sampled[0].token_ids[0] == tokens[1]


def test_step_that_is_run_again_gives_the_same(loaded: LoadedEngine) -> None:
    sampling = SamplingParams(temperature=1.0, seed=5, frequency_penalty=0.5, num_logprobs=0)
    count = len(PROMPT)
    run(loaded, [ScheduledSequence(0, 0, count)], [enter(0, PROMPT, list(range(12)), sampling)])
    first = run(loaded, [ScheduledSequence(0, count, 1)])
    run(loaded, [ScheduledSequence(0, count + 1, 1)])  # discarded
    again = run(loaded, [ScheduledSequence(0, count, 1)])
    assert again == first


def test_steps_are_launched_before_they_are_read(loaded: LoadedEngine) -> None:
    tokens, _ = whole(loaded, 8)
    count = len(PROMPT)
    new = (enter(1, PROMPT, list(range(30, 42))),)
    steps = [SchedulerOutput(0, (), new, (), (ScheduledSequence(1, 0, count),))]
    steps += [
        SchedulerOutput(i + 1, (), (), (), (ScheduledSequence(1, count + i, 1),)) for i in range(7)
    ]
    pending = [loaded.runner.execute(step) for step in steps]
    assert [p.result().sampled[0].token_ids[0] for p in pending] == tokens


def test_logits_that_are_not_finite_end_the_step(tmp_path: Path) -> None:
    store, engine = build_tiny(tmp_path)
    own = load_runner(store, engine, OPTIONS)
    own.runner.execute(
        SchedulerOutput(
            0, (), (enter(0, PROMPT, [0, 1, 2, 3, 4]),), (), (ScheduledSequence(0, 0, 37),)
        )
    ).result()
    # What a broken kernel or memory would leave behind: the cache holds a NaN.
    own.runner._executor._kv_caches[0][1][0, 0, 0, 0] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteLogits):
        run(own, [ScheduledSequence(0, 37, 1)])
    own.runner.close()


def test_idle_runner_prepares_after_many_steps(tmp_path: Path) -> None:
    runner = load_runner(*build_tiny(tmp_path), OPTIONS).runner
    assert isinstance(runner, ModelRunner)
    done: list[int] = []
    runner._preparations = iter([lambda n=n: done.append(n) for n in range(3)])  # type: ignore[misc]
    new = enter(0, PROMPT, [0, 1, 2, 3, 4], SamplingParams())
    runner.execute(SchedulerOutput(0, (), (new,), (), (ScheduledSequence(0, 0, 4),))).result()
    assert not runner.use_idle_time(), "after a single step"
    again = SchedulerOutput(1, (), (), (), (ScheduledSequence(0, 4, 1),))
    for _ in range(MANY_STEPS):
        runner.execute(again).result()
    assert [runner.use_idle_time() for _ in range(4)] == [True, True, True, False]
    assert done == [0, 1, 2]
    runner.close()


def test_products_of_every_size_are_prepared_unless_they_take_long(tmp_path: Path) -> None:
    store, engine = build_tiny(tmp_path)
    runner = load_runner(store, engine, OPTIONS).runner
    assert isinstance(runner, ModelRunner)
    executor = runner._executor
    assert isinstance(executor, CpuExecutor)
    pieces = [piece for piece in executor.preparations(100) if isinstance(piece, partial)]
    sizes = Counter(len(piece.args[0]) for piece in pieces)
    runner.close()
    assert list(sizes) == [*range(1, 17), *range(20, 65, 4), *range(72, 105, 8)]
    graph = read_graph(store, engine)
    linears = [node for node in graph.nodes if node.op == "linear"]
    shapes = {graph.weights[node.weights["weight"]].shape for node in linears}
    assert set(sizes.values()) == {len(shapes)}
    rows_of_largest = MOST_PREPARED_FLOPS // (2 * max(rows * columns for rows, columns in shapes))
    beyond = [
        piece
        for piece in executor.preparations(2 * rows_of_largest)
        if isinstance(piece, partial) and len(piece.args[0]) > rows_of_largest
    ]
    num_sizes = len({len(piece.args[0]) for piece in beyond})
    assert num_sizes > 0
    assert len(beyond) < num_sizes * len(shapes)
