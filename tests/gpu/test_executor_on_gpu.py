"""A whole graph on a GPU: captured steps and launched ones give what the graph means."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.gpu_models import MODELS, QUANTS, as_read, llama_graph, random_weights
from kernels import reference
from kernels.launcher import KernelLibrary
from kernels.lowering import sites, variants
from kernels.regimes import REGIMES
from kernels.tuning import BUILT_IN, LIBRARY, TuningTable
from runtime_service.execution.cuda_engine import CudaEngine, assemble
from runtime_service.execution.device_stream import CudaStream, DeviceStream
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.step_timer import CudaClock, StepTimer, TimedSteps
from runtime_service.execution.tuned import site_of
from runtime_service.execution.tuner import tune
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams
from shared.ir import Graph
from tests.gpu.device import device_arch, library_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

_ROWS, _ROW_TOKENS, _ROW_BLOCKS = 12, 1023, 64
OPTIONS = RunnerOptions(
    max_sequence_tokens=_ROW_TOKENS, max_sequences=_ROWS, max_step_tokens=128, kv_bytes=1 << 24
)


class RelaunchedStream(CudaStream):
    """A stream whose captured launches are launched again one by one: same kernels, same padding, no graph."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Runs it once; a replay runs it again."""
        launch()
        return launch


# Quantizations and caches whose candidates are compared, and how far logits may be off.
TUNED = {
    ("bf16", ""): 0.03, ("int8", ""): 0.03, ("int4", ""): 0.03, ("fp8", ""): 0.25,
    ("w8a8-int8", ""): 0.1, ("bf16", "fp8"): 0.06,
}  # fmt: skip


# Graphs whose steps are compared: quantization, Qwen's extras, KV cache; the most tokens of a step, and the tolerance.
GRAPHS = [
    ("bf16", False, "", 128, 0.03),
    ("bf16", True, "", 128, 0.03),
    ("int8", True, "", 128, 0.03),
    ("int4", False, "", 128, 0.03),
    ("int4", True, "", 128, 0.03),
    # But for decode steps of one token, 8-bit engines round activations too.
    ("fp8", False, "", 128, 0.25),
    ("fp8-static", False, "", 128, 0.25),
    ("w8a8-int8", False, "", 128, 0.1),
    # A bf16 activation that lies between two codes may become either.
    ("bf16", False, "int8", 128, 0.04),
    ("bf16", True, "fp8", 128, 0.06),
]


def tiny_graph(quant: str, like_qwen: bool = False, kv_cache: str = "") -> Graph:
    """A graph of two layers."""
    layout, rounding = QUANTS[quant]
    return llama_graph(
        MODELS["tiny"], layout, like_qwen=like_qwen, rounding=rounding, kv_cache=kv_cache
    )


@functools.cache
def graph_and_library(
    quant: str, like_qwen: bool = False, kv_cache: str = ""
) -> tuple[Graph, KernelLibrary]:
    """A tiny graph and its kernels, compiled once in a run."""
    graph = tiny_graph(quant, like_qwen, kv_cache)
    wanted = variants(graph, device_arch(), with_candidates=True)
    return graph, library_of(wanted, device_arch())


def engine_of(
    quant: str = "bf16",
    like_qwen: bool = False,
    stream: DeviceStream | None = None,
    options: RunnerOptions = OPTIONS,
    weights: dict[str, dict[str, torch.Tensor]] | None = None,
    kv_cache: str = "",
    table: TuningTable = BUILT_IN,
) -> CudaEngine:
    """The whole GPU path over a tiny random model."""
    graph, library = graph_and_library(quant, like_qwen, kv_cache)
    packed = weights or random_weights(graph, seed=5)
    read = as_read(graph, packed)
    free = lambda: 1 << 30  # noqa: E731
    engine = assemble(graph, library, read, options, stream or CudaStream(), free, table)
    engine.graphs.capture()
    return engine


def _enter(engine: CudaEngine, prompts: list[torch.Tensor]) -> None:
    """Prompts in rows 0, 1, ...; a row's blocks are its own, in reverse order."""
    new = tuple(
        NewSequence(
            row, prompt.tolist(), len(prompt), SamplingParams(), StopParams(1), 0, 0,
            [*reversed(range(row * _ROW_BLOCKS, (row + 1) * _ROW_BLOCKS))],
        )
        for row, prompt in enumerate(prompts)
    )  # fmt: skip
    engine.rows.apply(SchedulerOutput(0, (), new, (), ()))


def _forward(
    engine: CudaEngine, steps: list[tuple[int, int, int]], logits_of_all: bool = False
) -> torch.Tensor:
    """Logits of a step of (row, start, num_tokens): each sequence's last, or all."""
    sent = engine.rows.send([ScheduledSequence(*step) for step in steps])
    run = engine.graphs.run_for_all_logits if logits_of_all else engine.graphs.run
    return run(sent).cpu()


def _bounded(
    plan: list[list[tuple[int, int, int]]], most_tokens: int
) -> Iterator[list[tuple[int, int, int]]]:
    """The plan's steps; those of more tokens in pieces, a sequence after the other."""
    for steps in plan:
        if sum(n for _, _, n in steps) <= most_tokens:
            yield steps
            continue
        for row, start, count in steps:
            for first in range(start, start + count, most_tokens):
                yield [(row, first, min(most_tokens, start + count - first))]


def _truth(graph: Graph, weights: dict[str, torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position of one sequence, fp32."""
    batch = reference.prompt_batch(graph, [len(token_ids)], logit_rows=range(len(token_ids)))
    return reference.run(graph, weights, token_ids, batch)["logits"]


@pytest.mark.parametrize(
    ("quant", "like_qwen", "kv_cache", "most_tokens", "tolerance"),
    GRAPHS,
)
def test_steps_of_all_kinds_give_the_logits_of_whole_prompts(
    quant: str, like_qwen: bool, kv_cache: str, most_tokens: int, tolerance: float
) -> None:
    """Prompts in chunks of awkward sizes, then decode in buckets with padding; teacher-forced, bf16 activations."""
    assert _worst_error(quant, like_qwen, kv_cache, most_tokens) < tolerance


@pytest.mark.parametrize(
    ("quant", "kv_cache", "tolerance"),
    [(*of, tolerance) for of, tolerance in TUNED.items()],
)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_candidates_give_the_logits_that_built_in_choices_give(
    quant: str, kv_cache: str, tolerance: float, place: int
) -> None:
    """Each site's candidate of that place, or its last one; the library's products in the second."""
    graph, library = graph_and_library(quant, kv_cache=kv_cache)
    table = {
        site: names[min(place, len(names) - 1) if LIBRARY not in names else int(place == 2)]
        for regime in REGIMES
        for site, names in sites(graph, library.arch, regime).items()
    }
    assert _worst_error(quant, False, kv_cache, 128, table) < tolerance


def test_every_choice_is_timed_and_chosen_from() -> None:
    """The whole of tuning on a model that is tiny: what it chooses is another matter."""
    graph, library = graph_and_library("bf16")
    weights = as_read(graph, random_weights(graph, seed=5))
    steps = TimedSteps(sequences=16, prompt_tokens=128, context_tokens=128, readings=5)
    timer = StepTimer(graph, library, weights, CudaStream(), CudaClock(), steps)
    with torch.inference_mode():
        rows = tune(graph, library.arch, timer, lambda row: None)
    wanted = {s for regime in REGIMES for s in sites(graph, library.arch, regime)}
    assert {site_of(row) for row in rows} == wanted
    assert all(0.0 < row.choice_us <= row.built_in_us < 1e4 for row in rows)


def _worst_error(
    quant: str, like_qwen: bool, kv_cache: str, most_tokens: int, table: TuningTable = BUILT_IN
) -> float:
    """The largest relative error of a step's logits to those of whole prompts in fp32."""
    graph, _ = graph_and_library(quant, like_qwen, kv_cache)
    packed = random_weights(graph, seed=5)
    engine = engine_of(quant, like_qwen, weights=packed, kv_cache=kv_cache, table=table)
    cpu = {name: {role: t.cpu() for role, t in roles.items()} for name, roles in packed.items()}
    weights = reference.dense(graph, cpu)
    torch.manual_seed(1)
    prompts = [torch.randint(0, 1000, (n,), dtype=torch.int32) for n in (97, 41, 5, 130, 64, 700)]
    truth = [_truth(graph, weights, p) for p in prompts]
    _enter(engine, prompts)
    plan: list[list[tuple[int, int, int]]] = [
        [(0, 0, 70), (1, 0, 13)],
        [(0, 70, 1), (1, 13, 20), (2, 0, 2)],
        [(3, 0, 90), (0, 71, 1)],
        [(1, 33, 1), (2, 2, 1), (0, 72, 1)],
        [(4, 0, 7)],
        [(4, 7, 1)],
        [(1, 34, 1), (2, 3, 1), (0, 73, 1), (3, 90, 1), (4, 8, 1)],
        # A long one: attended to in parts, beside short ones, with and without a chunk, and alone.
        *([(5, start, 128)] for start in range(0, 640, 128)),
        [(5, 640, 40), (1, 35, 1)],
        [(4, 9, 40), (5, 680, 1)],
        [(3, 91, 35), (5, 681, 1), (0, 74, 20), (4, 49, 13)],
        [(2, 4, 1), (5, 682, 1)],
        [(5, 683, 1)],
    ]
    worst = 0.0
    for number, steps in enumerate(_bounded(plan, most_tokens)):
        total = sum(n for _, _, n in steps)
        everything = number % 2 == 0 and total <= engine.graphs.max_logit_rows
        got = _forward(engine, steps, everything)
        want = torch.cat(
            [
                truth[row][start if everything else start + n - 1 : start + n]
                for row, start, n in steps
            ]
        )
        assert got.shape == want.shape
        worst = max(worst, float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max()))
    return worst


def test_replayed_graph_gives_what_its_launches_give() -> None:
    """Bit by bit: nothing of a step is baked into a graph."""
    engines = [engine_of(), engine_of(stream=RelaunchedStream())]
    torch.manual_seed(2)
    prompts = [torch.randint(0, 1000, (n,), dtype=torch.int32) for n in (50, 33, 9, 300)]
    for engine in engines:
        _enter(engine, prompts)
    plan = [
        [(0, 0, 40), (1, 0, 5)], [(0, 40, 1), (1, 5, 20), (2, 0, 3)], [(2, 3, 1)],
        [(0, 41, 1), (1, 25, 1), (2, 4, 1)], [(1, 26, 1), (0, 42, 1)], [(0, 43, 7), (2, 5, 1)],
        [(3, 0, 120)], [(3, 120, 120)], [(1, 27, 1), (3, 240, 1)], [(3, 241, 20), (2, 6, 1)], [(3, 261, 1)],
    ]  # fmt: skip
    for steps in plan:
        captured, launched = (_forward(engine, steps) for engine in engines)
        assert torch.equal(captured, launched), steps


def test_stream_captures_again_when_no_graph_is_held_any_more() -> None:
    """As tuning does: torch forgets a pool of graphs with its last one."""
    stream, counted = CudaStream(), torch.zeros((), device="cuda")
    for number in range(3):
        replay = stream.capture(lambda: counted.add_(torch.ones((), device="cuda")))
        counted.zero_()
        replay()
        assert float(counted) == 1.0, number
        del replay


def test_copied_block_holds_the_same_keys() -> None:
    engine = engine_of()
    tokens = torch.arange(17, dtype=torch.int32)
    tokens[16] = 7
    _enter(engine, [tokens, tokens])
    _forward(engine, [(0, 0, 16)])
    last = _ROW_BLOCKS - 1
    engine.graphs.copy_blocks(
        ((last, last + _ROW_BLOCKS),)
    )  # the first block of row 0 to that of row 1
    first = _forward(engine, [(0, 16, 1)])
    second = _forward(engine, [(1, 16, 1)])
    assert torch.equal(first, second)
