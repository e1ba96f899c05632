"""Where the GPU path keeps what it computes, without a GPU: kernels that do nothing, memory of the host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.launch import Grid, MatMul, Sizes
from kernels.regimes import REGIMES, Regime
from kernels.variant import KernelVariant
from runtime_service.execution.cuda_engine import assemble
from runtime_service.execution.cuda_executor import CudaExecutor
from runtime_service.execution.device_stream import Mark
from runtime_service.execution.options import RunnerOptions
from shared.arch import arch_named
from shared.ir import Graph
from shared.store.weights import WeightReader
from tests.runtime_service.execution.engines import build_tiny, graph_of

_SIZES = Sizes(tokens=96, sequences=24, rows=24)


class _Library:
    """Kernels that compute nothing."""

    arch = arch_named("sm_90")

    def kernel(self, variant: KernelVariant) -> Any:
        def launch(grid: Grid, *arguments: int) -> None:
            pass

        return launch


@dataclass
class _Stream:
    """A device whose memory is torch's, while the host's is not; it has room for `max_graphs` graphs."""

    max_graphs: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def host_words(self, count: int) -> torch.Tensor:
        return torch.from_numpy(np.zeros(count, np.int32))

    def mark(self) -> Mark:
        return _Mark()

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        if not self.max_graphs:
            raise RuntimeError("CUDA error: out of memory")
        self.max_graphs -= 1
        launch()
        return launch


class _Mark:
    def synchronize(self) -> None:
        """What was launched is done."""


class _Allocations(TorchDispatchMode):
    """Counts the bytes of what is made from nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.zeros.", "aten.empty.")):
            self.num_bytes += made.nbytes
        return made


@dataclass(frozen=True)
class Model:
    """One whose logits are most of its memory."""

    graph: Graph
    weights: dict[str, dict[str, torch.Tensor]]

    def prepared(self) -> CudaExecutor:
        """An executor that runs every regime."""
        library: Any = _Library()
        executor = CudaExecutor(self.graph, library, self.weights, _SIZES)
        executor.prepare(REGIMES)
        return executor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("wide")
    store, engine = build_tiny(
        folder, quant="bf16", num_hidden_layers=1, vocab_size=1 << 15, max_position_embeddings=4096
    )
    graph = graph_of(store, engine)
    with WeightReader(store, engine) as reader:
        weights = {
            name: {role: tensor.clone() for role, tensor in reader.roles(name).items()}
            for name in graph.weights
        }
    return Model(graph, weights)


@pytest.fixture(scope="module")
def executor(model: Model) -> CudaExecutor:
    return model.prepared()


def test_what_is_allocated_beside_the_cache_fits_into_what_was_free(model: Model) -> None:
    """Draws need much memory where a vocabulary is large: taken after the cache, it may be gone."""
    library: Any = _Library()
    free_bytes = 12 << 20
    allocated = _Allocations()
    before = []

    def ask() -> int:
        before.append(allocated.num_bytes)
        return free_bytes

    options = RunnerOptions(max_sequences=_SIZES.sequences, max_step_tokens=_SIZES.tokens)
    with allocated:
        engine = assemble(model.graph, library, model.weights, options, _Stream(), ask)
    taken = allocated.num_bytes - before[0]
    assert "need no more" not in engine.limits.kv_reason
    assert engine.limits.kv_bytes < taken <= free_bytes


@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 24])
def test_logits_are_copied_beside_themselves_into_memory_that_is_there(
    model: Model, executor: CudaExecutor, regime: Regime, rows: int
) -> None:
    """A step whose draws need them twice must not ask a full device for a gigabyte."""
    logits_RV = executor._buffers[regime][model.graph.outputs[0]][:rows]
    logits_RV.copy_(torch.arange(logits_RV.numel()).view_as(logits_RV))
    before = logits_RV.clone()
    copy_RV = executor.copy_logits(logits_RV)
    assert copy_RV.untyped_storage().data_ptr() == executor._arena.data_ptr()
    logits_RV.fill_(-1.0)
    assert torch.equal(copy_RV, before)


def test_every_product_is_tried_in_each_size_that_fits_its_memory(model: Model) -> None:
    """One of a kind: that of the head, those of a layer for all tokens, and those for rows whose logits are wanted."""
    tried: dict[str, list[int]] = {}

    class Recording(CudaExecutor):
        def _matmul(self, step: MatMul, buffers: dict[str, torch.Tensor], sizes: Sizes) -> None:
            count = int(getattr(sizes, step.size))
            assert count <= len(buffers[step.x.name])
            assert count <= len(buffers[step.out.name])
            tried.setdefault(step.weight, []).append(count)

    library: Any = _Library()
    executor = Recording(model.graph, library, model.weights, _SIZES)
    executor.prepare(REGIMES)
    executor.load_products(REGIMES[-1], [16, 64, 96], [16, 24])
    of_tokens = {name for name, counts in tried.items() if counts == [16, 64, 96]}
    assert {name for name, counts in tried.items() if counts == [16, 24]} == set(tried) - of_tokens
    assert len(of_tokens) == 1
    assert set(tried) == {n.weights["weight"] for n in model.graph.nodes if n.op == "linear"}


def test_engine_goes_on_with_the_graphs_that_fit(model: Model) -> None:
    """Captured in idle time, they are no reason to end an engine, which would begin with the next one again."""
    library: Any = _Library()
    stream = _Stream(max_graphs=100)
    options = RunnerOptions(max_sequences=24, max_step_tokens=64)
    engine = assemble(model.graph, library, model.weights, options, stream, lambda: 64 << 20)
    engine.graphs.capture_few()
    few, stream.max_graphs = engine.graphs.num_graphs, 1
    assert [engine.runner.use_idle_time() for _ in range(3)] == [True, False, False]
    assert engine.graphs.num_graphs == few + 1


def test_what_fails_for_another_reason_ends_the_engine(model: Model) -> None:
    class Faulty(_Stream):
        def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    library: Any = _Library()
    options = RunnerOptions(max_sequences=12, max_step_tokens=16)
    engine = assemble(model.graph, library, model.weights, options, Faulty(), lambda: 64 << 20)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.runner.use_idle_time()
