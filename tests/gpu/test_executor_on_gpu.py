"""A whole graph on a GPU: captured decode steps and ragged steps give what the graph means."""

from collections.abc import Iterator

import pytest
import torch

from bench.gpu_models import MODELS, llama_graph, random_weights
from kernels import reference
from kernels.batch import StepBatch
from kernels.lowering import BLOCK_TOKENS, variants
from runtime_service.execution.cuda_graphs import CudaGraphExecutor
from runtime_service.limits import RuntimeLimits
from shared.ir import Graph
from tests.gpu.device import device_arch, library_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

_LIMITS = RuntimeLimits(256, 12, 128, BLOCK_TOKENS, 12 * 16, "bfloat16", 0, "")


def _batch(steps: list[tuple[int, int, int]], logits_of_all: bool) -> StepBatch:
    """A step of (row, start, num_tokens); a row's blocks are its own, in reverse order."""
    table = torch.arange(_LIMITS.num_blocks, dtype=torch.int32).view(12, 16).flip(1)
    positions, slots, query_start = [], [], [0]
    for row, start, count in steps:
        for position in range(start, start + count):
            positions.append(position)
            block = int(table[row, position // BLOCK_TOKENS])
            slots.append(block * BLOCK_TOKENS + position % BLOCK_TOKENS)
        query_start.append(len(positions))
    rows = range(len(positions)) if logits_of_all else [end - 1 for end in query_start[1:]]

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return StepBatch(
        positions_T=int32(positions),
        slot_mapping_T=int32(slots),
        block_tables_SB=table[[row for row, _, _ in steps]],
        seq_lens_S=int32([start + count for _, start, count in steps]),
        query_start_S1=int32(query_start),
        logit_rows_R=int32(list(rows)),
        kv_caches=(),
    )


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
    ("layout", "like_qwen", "most_tokens", "tolerance"),
    [
        ("plain", False, 128, 0.03),
        ("plain", True, 128, 0.03),
        ("int8_channel", True, 128, 0.03),
        ("fp8_channel", False, 16, 0.03),
        # At more than 16 tokens fp8 engines quantize activations too, a scale a token.
        ("fp8_channel", False, 128, 0.25),
    ],
)
def test_steps_of_all_kinds_give_the_logits_of_whole_prompts(
    layout: str, like_qwen: bool, most_tokens: int, tolerance: float
) -> None:
    """Prompts in chunks of awkward sizes, then decode in buckets with padding; teacher-forced, bf16 activations."""
    graph = llama_graph(MODELS["tiny"], layout, like_qwen=like_qwen)
    packed = random_weights(graph, seed=5)
    library = library_of(variants(graph, device_arch()), device_arch())
    executor = CudaGraphExecutor(graph, library, packed, _LIMITS)
    executor.capture()
    cpu = {name: {role: t.cpu() for role, t in roles.items()} for name, roles in packed.items()}
    weights = reference.dense(graph, cpu)
    torch.manual_seed(1)
    lengths = [97, 41, 5, 130, 64]
    prompts = [torch.randint(0, 1000, (n,), dtype=torch.int32) for n in lengths]
    truth = [_truth(graph, weights, p) for p in prompts]
    plan: list[list[tuple[int, int, int]]] = [
        [(0, 0, 70), (1, 0, 13)],
        [(0, 70, 1), (1, 13, 20), (2, 0, 2)],
        [(3, 0, 90), (0, 71, 1)],
        [(1, 33, 1), (2, 2, 1), (0, 72, 1)],
        [(4, 0, 7)],
        [(4, 7, 1)],
        [(1, 34, 1), (2, 3, 1), (0, 73, 1), (3, 90, 1), (4, 8, 1)],
    ]
    worst = 0.0
    for number, steps in enumerate(_bounded(plan, most_tokens)):
        tokens = torch.cat([prompts[row][start : start + n] for row, start, n in steps])
        everything = number % 2 == 0
        got = executor.forward(tokens, _batch(steps, everything))
        want = torch.cat(
            [
                truth[row][start if everything else start + n - 1 : start + n]
                for row, start, n in steps
            ]
        )
        assert got.shape == want.shape
        worst = max(worst, float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max()))
    assert worst < tolerance


def test_copied_block_holds_the_same_keys() -> None:
    graph = llama_graph(MODELS["tiny"], "plain")
    library = library_of(variants(graph, device_arch()), device_arch())
    executor = CudaGraphExecutor(graph, library, random_weights(graph), _LIMITS)
    tokens = torch.arange(16, dtype=torch.int32)
    executor.forward(tokens, _batch([(0, 0, 16)], False))
    executor.copy_blocks(((15, 31),))  # the first block of row 0 to that of row 1
    next_token = torch.tensor([7], dtype=torch.int32)
    first = executor.forward(next_token, _batch([(0, 16, 1)], False))
    second = executor.forward(next_token, _batch([(1, 16, 1)], False))
    assert torch.equal(first, second)
