"""Law 5 on the GPU path: the real scheduler over the whole of it, kernels interpreted, gives the CPU path's tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.runtime_service.execution import interpreted_device  # first: it sets Triton's switch

# isort: split
import torch

from runtime_service.execution.cuda_engine import CudaEngine
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from shared.engine import EngineManifest
from shared.ir import Graph
from shared.store import LocalStore
from shared.store.weights import WeightReader
from tests.runtime_service.execution.engines import build_tiny, graph_of
from tests.runtime_service.execution.serving import serve, tokens_of

# Few blocks, small steps: prompts are cut, sequences are preempted.
_OPTIONS = RunnerOptions(
    max_sequence_tokens=48, max_sequences=4, max_step_tokens=20, num_threads=1, block_tokens=8
)
_NUM_BLOCKS = 8


@dataclass(frozen=True)
class Pair:
    """One engine on both paths, and on the GPU path where every step is too large for a graph."""

    cpu: LoadedEngine
    gpu: CudaEngine
    few_graphs: int
    without_graphs: CudaEngine
    limits: RuntimeLimits


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    yield from _pair(tmp_path_factory.mktemp("mistral"))


def _pair(folder: Path, kv_cache: str = "") -> Iterator[Pair]:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 64}
    store, engine = build_tiny(folder, "mistral", kv_cache=kv_cache, **sizes)
    cpu = load_runner(store, engine, _OPTIONS)
    graph = graph_of(store, engine)
    weights = _weights(store, engine, graph)
    gpu = interpreted_device.interpreted_engine(graph, weights, _OPTIONS)
    gpu.graphs.capture_few()
    few = gpu.graphs.num_graphs
    while gpu.runner.use_idle_time():
        pass
    without_graphs = interpreted_device.interpreted_engine(graph, weights, _OPTIONS)
    yield Pair(cpu, gpu, few, without_graphs, replace(cpu.limits, num_blocks=_NUM_BLOCKS))
    cpu.runner.close()


def _weights(
    store: LocalStore, engine: EngineManifest, graph: Graph
) -> dict[str, dict[str, torch.Tensor]]:
    with WeightReader(store, engine) as reader:
        return {
            name: {role: tensor.clone() for role, tensor in reader.roles(name).items()}
            for name in graph.weights
        }


def _requests() -> list[Request]:
    """Every way of drawing, shared prefixes, two samples of one prompt."""
    stem = [(i * i * 7 + 3) % 300 for i in range(26)]
    ways: list[tuple[int, int, SamplingParams, StopParams, int]] = [
        (26, 9, SamplingParams(), StopParams(9), 1),
        (20, 5, SamplingParams(temperature=0.9, seed=1 << 60), StopParams(8), 2),
        (26, 2, SamplingParams(temperature=0.8, top_k=9, top_p=0.9, seed=5), StopParams(10), 1),
        (3, 1, SamplingParams(num_logprobs=2), StopParams(6), 1),
        (17, 3, SamplingParams(prompt_logprobs=True, num_logprobs=1), StopParams(4), 1),
        (9, 2, SamplingParams(repetition_penalty=1.3), StopParams(7, 3, (7, 8)), 1),
        (11, 2, SamplingParams(0.9, top_p=0.9, frequency_penalty=0.4, logit_bias=((9, 1.5),),
                               num_logprobs=3, seed=6), StopParams(8), 2),
    ]  # fmt: skip
    return [
        Request(n, [*stem[:shared], *range(40 + n, 40 + n + own)], params, stop, num_samples=count)
        for n, (shared, own, params, stop, count) in enumerate(ways)
    ]


@pytest.mark.parametrize("overlaps", [False, True], ids=["no overlap", "overlap and graphs"])
def test_gpu_path_gives_the_cpu_paths_tokens(pair: Pair, overlaps: bool) -> None:
    requests, max_unread = _requests(), int(overlaps)
    engine = pair.gpu if overlaps else pair.without_graphs
    found, scheduler = serve(engine.runner, pair.limits, requests, max_unread)
    wanted, _ = serve(pair.cpu.runner, pair.limits, requests, max_unread)
    stats = scheduler.stats()
    assert stats.preemptions > 0, "the load preempts nobody"
    assert stats.prefix_hit_tokens > 0, "the load finds no prefix"
    assert stats.num_free_blocks == _NUM_BLOCKS
    assert found.keys() == wanted.keys()
    for key, outputs in wanted.items():
        assert tokens_of(found[key]) == tokens_of(outputs), key
        assert found[key][-1].finish == outputs[-1].finish
        for of in ("logprobs", "prompt_logprobs"):
            ours = [entry for output in found[key] for entry in getattr(output, of)]
            theirs = [entry for output in outputs for entry in getattr(output, of)]
            assert [e.token_id for e in ours] == [e.token_id for e in theirs]
            assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)


def test_steps_of_fewer_tokens_than_sequences_give_the_same_tokens(
    pair: Pair, tmp_path: Path
) -> None:
    """Graphs of as many tokens as there may be sequences would pad beyond the memory of a step."""
    store, same = build_tiny(tmp_path, "mistral", num_hidden_layers=1, intermediate_size=64)
    graph = graph_of(store, same)
    options = replace(_OPTIONS, max_step_tokens=2)
    engine = interpreted_device.interpreted_engine(graph, _weights(store, same, graph), options)
    engine.graphs.capture()
    requests = [Request(n, [n, 7, 9], SamplingParams(), StopParams(5)) for n in range(4)]
    limits = replace(pair.limits, max_step_tokens=engine.limits.max_step_tokens)
    found, _ = serve(engine.runner, limits, requests, 1)
    wanted, _ = serve(pair.cpu.runner, pair.limits, requests, 1)
    assert {k: tokens_of(v) for k, v in found.items()} == {
        k: tokens_of(v) for k, v in wanted.items()
    }
    assert (
        engine.graphs.num_graphs == 3
    )  # decode steps of 1 and 2 sequences, mixed ones of 2 tokens


def test_long_sequences_are_attended_to_in_parts_beside_short_ones(tmp_path: Path) -> None:
    """Lone and with others, in steps that decode and with chunks, by graphs that were captured when none was long."""
    store, engine = build_tiny(tmp_path, "llama", num_hidden_layers=2, intermediate_size=64)
    graph = graph_of(store, engine)
    options = replace(_OPTIONS, max_sequence_tokens=320, max_step_tokens=60)
    gpu = interpreted_device.interpreted_engine(graph, _weights(store, engine, graph), options)
    gpu.graphs.capture_few()
    cpu = load_runner(store, engine, options)
    tokens = [(i * i * 7 + 3) % 300 for i in range(300)]
    requests = [
        Request(n, tokens[:count], SamplingParams(), StopParams(most))
        for n, (count, most) in enumerate(((290, 6), (7, 3), (130, 2)))
    ]
    limits = replace(cpu.limits, num_blocks=80)
    found, _ = serve(gpu.runner, limits, requests, 1)
    wanted, _ = serve(cpu.runner, limits, requests, 1)
    cpu.runner.close()
    assert {k: tokens_of(v) for k, v in found.items()} == {
        k: tokens_of(v) for k, v in wanted.items()
    }
    assert gpu.rows.message[2] == 4, "the last step of the long one had no further parts"


def test_idle_time_captures_what_was_put_off(pair: Pair) -> None:
    """Decode steps of 1, 2 and 4 sequences and mixed ones of 16 and 20 tokens at first; later the one of 18."""
    assert pair.few_graphs == 5
    assert pair.gpu.graphs.num_graphs == 6
    assert not pair.gpu.runner.use_idle_time()


def test_cache_of_little_memory_leaves_room_for_the_tables_of_rows(tmp_path: Path) -> None:
    store, engine = build_tiny(tmp_path, "mistral", num_hidden_layers=1, intermediate_size=64)
    graph = graph_of(store, engine)
    weights = _weights(store, engine, graph)
    options = replace(_OPTIONS, max_sequence_tokens=None, max_sequences=64, max_step_tokens=64)
    made = interpreted_device.interpreted_engine(graph, weights, options, free_bytes=40_000)
    tables = made.rows.layout.max_sequences * 4 * made.rows.layout.tokens_stride
    assert made.limits.kv_bytes + tables < 0.97 * 40_000
    assert made.limits.kv_reason.startswith("the tables of 64 sequences leave no more")


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_eight_bit_cache_gives_the_cpu_paths_tokens(kv_cache: str, tmp_path: Path) -> None:
    """Kept in the same codes on both paths, through whole prompts, chunks, decode and copied blocks."""
    stem = [(i * i * 7 + 3) % 300 for i in range(26)]
    requests = [
        Request(n, stem[: 8 + 6 * n], SamplingParams(), StopParams(8), num_samples=1 + n % 2)
        for n in range(4)
    ]
    for pair in _pair(tmp_path, kv_cache):
        limits = replace(pair.limits, num_blocks=12)
        found, _ = serve(pair.gpu.runner, limits, requests, 1)
        wanted, _ = serve(pair.cpu.runner, limits, requests, 1)
        assert {k: tokens_of(v) for k, v in found.items()} == {
            k: tokens_of(v) for k, v in wanted.items()
        }


def test_aborted_neighbours_change_nothing(pair: Pair) -> None:
    """What a discarded step drew leaves no trace, and no block stays held."""
    requests = _requests()[:4]
    alone, _ = serve(pair.cpu.runner, pair.limits, requests[:1], 0)
    runner = pair.without_graphs.runner
    among, scheduler = serve(runner, pair.limits, requests, 1, {5: 1, 6: 2, 8: 3})
    assert tokens_of(among[0, 0]) == tokens_of(alone[0, 0])
    assert scheduler.stats().num_free_blocks == _NUM_BLOCKS
    assert scheduler.stats().num_running == 0
