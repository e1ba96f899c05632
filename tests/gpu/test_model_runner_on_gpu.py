"""Served steps on a GPU: drawn on the device, launched without waiting, the same with and without overlap."""

import threading
from dataclasses import replace

import pytest
import torch

from bench.gpu_models import random_weights
from kernels.launch import Grid
from kernels.launcher import KernelLibrary
from kernels.sampling import launch as sampling
from kernels.step_inputs import launch as step_inputs
from kernels.variant import KernelVariant
from runtime_service.execution.cuda_engine import CudaEngine
from runtime_service.execution.device_stream import CudaStream
from runtime_service.sampling.sampler import NonFiniteLogits
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.scheduler import Scheduler
from tests.gpu.device import device_arch, library_of
from tests.gpu.test_executor_on_gpu import OPTIONS, RelaunchedStream, engine_of, graph_and_library
from tests.kernels.sampling_cases import (
    Device,
    check_draws,
    check_equal_scores,
    check_inputs,
    check_neighbours,
    check_non_finite,
    check_ties,
)
from tests.runtime_service.execution.serving import serve, tokens_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

_WAYS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, seed=1 << 62),
    SamplingParams(temperature=0.8, top_k=9, top_p=0.9, seed=5),
    SamplingParams(temperature=0.9, top_p=0.95, num_logprobs=2, seed=6),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2, num_logprobs=0),
    SamplingParams(temperature=1.1, min_p=0.02, logit_bias=((5, 3.0), (900, -4.0)), seed=7),
)


@pytest.fixture(scope="module")
def engine() -> CudaEngine:
    return engine_of()


class _Library:
    """Launches variants on named tensors, and waits."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library

    def __call__(
        self, variant: KernelVariant, grid: Grid, operands: dict[str, torch.Tensor | int]
    ) -> None:
        values = [operands[a.name] for a in variant.arguments]
        arguments = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        self._library.kernel(variant)(grid, *arguments)
        torch.cuda.synchronize()


def sampler_variants() -> set[KernelVariant]:
    """What the cases below launch."""
    wanted = step_inputs.variants(16)
    for vocab_size in (1, 9, 33, 300, 4100, 5000, 128256):
        wanted |= sampling.variants(vocab_size)
    return wanted


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return library_of(sampler_variants(), device_arch())


@pytest.fixture
def device(library: KernelLibrary) -> Device:
    return Device(library, CudaStream())


@pytest.fixture
def run(library: KernelLibrary) -> _Library:
    return _Library(library)


@pytest.mark.parametrize("vocab_size", [1, 300, 4100, 128256])
@pytest.mark.parametrize("flatness", [0.33, 1.0, 3.0])
def test_device_draws_the_host_samplers_tokens(
    device: Device, vocab_size: int, flatness: float
) -> None:
    for seed in range(3):
        check_draws(device, vocab_size, seed, flatness)


def test_ties_and_non_finite_logits_are_as_on_the_host(device: Device) -> None:
    check_ties(device)
    check_equal_scores(device, 5000)
    check_non_finite(device)


@pytest.mark.parametrize("vocab_size", [4100, 128256])
def test_a_draw_does_not_depend_on_its_batch(device: Device, vocab_size: int) -> None:
    check_neighbours(device, vocab_size)


@pytest.mark.parametrize("parts", [1, 3])
def test_inputs_are_made_from_entries_and_tables(run: _Library, parts: int) -> None:
    check_inputs(run, "cuda", parts)


def _requests(output_tokens: int, ways: tuple[SamplingParams, ...] = _WAYS) -> list[Request]:
    """None ends early: its end tokens are masked to the last."""
    return [
        Request(n, [(n * 31 + i * i) % 1000 for i in range(9 + 11 * n)], ways[n % len(ways)],
                StopParams(output_tokens, output_tokens, (2, 3)))
        for n in range(9)
    ]  # fmt: skip


def test_overlap_and_graphs_change_no_token(engine: CudaEngine) -> None:
    """All end by length, so that the same steps run in each way."""
    want, _ = serve(engine.runner, engine.limits, _requests(40), 0)
    overlapped, scheduler = serve(engine.runner, engine.limits, _requests(40), 1)
    relaunched = engine_of(stream=RelaunchedStream())
    launched, _ = serve(relaunched.runner, engine.limits, _requests(40), 1)
    assert {len(tokens_of(outputs)) for outputs in want.values()} == {40}
    for key, outputs in want.items():
        assert tokens_of(overlapped[key]) == tokens_of(outputs), key
        assert tokens_of(launched[key]) == tokens_of(outputs), key
    assert scheduler.stats().num_free_blocks == engine.limits.num_blocks


def test_steps_of_fewer_tokens_than_sequences_change_no_token(engine: CudaEngine) -> None:
    """No graph is larger than a step: its padding would be written over other tensors."""
    small = engine_of(options=replace(OPTIONS, max_step_tokens=4))
    requests = [Request(n, [n, 7, 9], SamplingParams(), StopParams(12)) for n in range(12)]
    found, _ = serve(small.runner, small.limits, requests, 1)
    wanted, _ = serve(engine.runner, engine.limits, requests, 1)
    assert {k: len(tokens_of(v)) for k, v in found.items()} == dict.fromkeys(wanted, 12)
    same = sum(tokens_of(found[k])[:4] == tokens_of(wanted[k])[:4] for k in wanted)
    assert same >= len(wanted) / 2, "bf16 rounds by the batch's size, and not so much"


def test_rows_that_score_their_prompts_join_in(engine: CudaEngine) -> None:
    ways = (*_WAYS[:3], SamplingParams(num_logprobs=2), SamplingParams(prompt_logprobs=True),
            SamplingParams(repetition_penalty=1.3))  # fmt: skip
    gained, scheduler = serve(engine.runner, engine.limits, _requests(12, ways), 1)
    assert {len(tokens_of(outputs)) for outputs in gained.values()} == {12}
    entries = [entry for output in gained[3, 0] for entry in output.logprobs]
    assert [entry.rank for entry in entries] == [1] * 12
    assert [entry.top[0][0] for entry in entries] == tokens_of(gained[3, 0])
    assert len(gained[4, 0][0].prompt_logprobs) == 9 + 11 * 4 - 1
    assert scheduler.stats().num_free_blocks == engine.limits.num_blocks


def test_cancel_storm_leaves_no_block(engine: CudaEngine) -> None:
    storm = {4 + 2 * n: n for n in range(9)}
    for _ in range(5):
        _, scheduler = serve(engine.runner, engine.limits, _requests(30), 1, storm)
        assert scheduler.stats().num_free_blocks == engine.limits.num_blocks
        assert scheduler.stats().num_running == 0


def test_steady_state_never_waits_for_the_device(engine: CudaEngine) -> None:
    scheduler = Scheduler(engine.limits)
    for request in _requests(40):
        scheduler.add(request)
    unread = []
    for number in range(20):
        step = scheduler.schedule()
        assert step is not None
        torch.cuda.set_sync_debug_mode("error" if number > 8 else "default")
        try:
            unread.append(engine.runner.execute(step))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if len(unread) > 1:
            scheduler.update_from(unread.pop(0).result())
    scheduler.update_from(unread.pop().result())


def test_non_finite_logits_end_the_step() -> None:
    graph, _ = graph_and_library("bf16")
    weights = random_weights(graph, seed=5)
    weights["head"]["weight"][17] = float("nan")
    broken = engine_of(weights=weights)
    with pytest.raises(NonFiniteLogits):
        serve(broken.runner, broken.limits, _requests(3), 1)


def test_graphs_are_captured_beside_copies_in_other_streams() -> None:
    source = torch.ones(1 << 22).pin_memory()
    target = torch.zeros(1 << 22, device="cuda")
    started, ended = threading.Event(), threading.Event()

    def copy() -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            while not ended.is_set():
                target.copy_(source, non_blocking=True)
                stream.synchronize()
                started.set()

    thread = threading.Thread(target=copy)
    thread.start()
    started.wait()
    try:
        beside = engine_of(options=OPTIONS)
    finally:
        ended.set()
        thread.join()
    gained, _ = serve(beside.runner, beside.limits, _requests(5), 1)
    assert {len(tokens_of(outputs)) for outputs in gained.values()} == {5}
    assert bool((target == 1).all())
