"""Every candidate computes what the built-in choice does, and the timer runs steps as they are served.

On a CPU, kernels interpreted: so all of tuning but the time itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.runtime_service.execution import interpreted_device  # first: it sets Triton's switch

# isort: split
import torch

from kernels.lowering import lower, sites
from kernels.regimes import REGIMES, Regime
from kernels.tuning import BUILT_IN, LIBRARY, Site, TuningTable
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.step_timer import StepTimer, TimedSteps, fitting_steps
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from shared.errors import InvalidField
from shared.ir import Graph
from shared.store.weights import WeightReader
from tests.kernels import interpreted
from tests.runtime_service.execution.engines import build_tiny, graph_of
from tests.runtime_service.execution.serving import serve, tokens_of

_OPTIONS = RunnerOptions(
    max_sequence_tokens=48, max_sequences=4, max_step_tokens=18, num_threads=1, block_tokens=8
)
Weights = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Tiny:
    """An engine on the CPU path, and what the GPU path needs of it."""

    cpu: LoadedEngine
    graph: Graph
    weights: Weights
    limits: RuntimeLimits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 64}
    store, engine = build_tiny(tmp_path_factory.mktemp("tiny"), "mistral", **sizes)
    cpu = load_runner(store, engine, _OPTIONS)
    graph = graph_of(store, engine)
    with WeightReader(store, engine) as reader:
        weights = {
            name: {role: tensor.clone() for role, tensor in reader.roles(name).items()}
            for name in graph.weights
        }
    yield Tiny(cpu, graph, weights, replace(cpu.limits, num_blocks=16))
    cpu.runner.close()


def _table(graph: Graph, choose: Callable[[tuple[str, ...]], str]) -> dict[Site, str]:
    arch = interpreted.INTERPRETER
    return {
        site: choose(names)
        for regime in REGIMES
        for site, names in sites(graph, arch, regime).items()
    }


# Our kernels' first, second, third ... candidates everywhere; and the library's products.
_TABLES: dict[str, Callable[[tuple[str, ...]], str]] = {
    "second candidates": lambda names: names[0] if LIBRARY in names else names[1],
    "last candidates": lambda names: names[0] if LIBRARY in names else names[-1],
}


@pytest.mark.parametrize("which", _TABLES)
def test_candidates_give_the_cpu_paths_tokens(tiny: Tiny, which: str) -> None:
    table = _table(tiny.graph, _TABLES[which])
    requests = [
        Request(n, [(i * i * 7 + n) % 300 for i in range(length)], SamplingParams(), StopParams(5))
        for n, length in enumerate((26, 9, 3, 1))
    ]
    gpu = interpreted_device.interpreted_engine(tiny.graph, tiny.weights, _OPTIONS, table=table)
    gpu.graphs.capture_few()
    found, _ = serve(gpu.runner, tiny.limits, requests, 1)
    wanted, _ = serve(tiny.cpu.runner, tiny.limits, requests, 1)
    assert {k: tokens_of(v) for k, v in found.items()} == {
        k: tokens_of(v) for k, v in wanted.items()
    }


class _Counting:
    """A clock that runs what it times, and reads what was launched of each kernel."""

    def __init__(self, library: interpreted_device.InterpretedLibrary) -> None:
        self._library = library
        self.launched: list[dict[str, int]] = []

    def __call__(self, run: Callable[[], None]) -> float:
        before = dict(self._library.num_launches)
        run()
        after = self._library.num_launches
        self.launched.append(
            {name: n - before.get(name, 0) for name, n in after.items() if n > before.get(name, 0)}
        )
        return 7.0


@pytest.mark.parametrize("regime", [Regime(1, 1), Regime(16, 4), Regime(16, 0)], ids=str)
def test_timer_launches_a_site_alone_and_whole_steps(tiny: Tiny, regime: Regime) -> None:
    library: Any = interpreted_device.InterpretedLibrary()
    clock = _Counting(library)
    steps = TimedSteps(sequences=4, prompt_tokens=16, context_tokens=32, readings=2)
    stream = interpreted_device.CpuStream()
    timer = StepTimer(tiny.graph, library, tiny.weights, stream, clock, steps)
    table: TuningTable = BUILT_IN
    whole = timer.time(regime, table, None)
    assert (whole.median_us, whole.spread_us) == (7.0, 0.0)
    plan = lower(tiny.graph, library.arch, regime)
    assert sum(clock.launched[-1].values()) == len(plan)
    assert len(clock.launched) == 2
    for site in sites(tiny.graph, library.arch, regime):
        if site.op == "linears":
            continue
        timer.time(regime, table, site)
        expected = sum(getattr(step, "site", None) == site for step in plan)
        assert sum(clock.launched[-1].values()) == expected > 0, site


def test_steps_shrink_to_what_memory_holds(tiny: Tiny) -> None:
    graph = tiny.graph
    roomy = fitting_steps(graph, 1 << 40)
    assert (roomy.sequences, roomy.context_tokens % 16) == (256, 0)
    tight = fitting_steps(graph, 1 << 20)
    assert 1 <= tight.sequences < 256
    assert 0 < tight.context_tokens <= roomy.context_tokens
    with pytest.raises(InvalidField, match="hold no KV cache"):
        fitting_steps(graph, 0)
