"""Decode steps that are replayed give what they give node by node, bit for bit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.batch import StepBatch
from kernels.cpu_jit import multiplies_bytes
from runtime_service.execution.cpu_executor import CpuExecutor
from runtime_service.execution.loading import LoadedEngine, load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.execution.recorded_steps import MOST_SEQUENCES
from tests.runtime_service.execution.engines import build_tiny

BLOCK_TOKENS, BLOCKS_EACH, SEQUENCES = 4, 6, MOST_SEQUENCES + 1
OPTIONS = RunnerOptions(
    max_sequence_tokens=BLOCK_TOKENS * BLOCKS_EACH,
    max_sequences=SEQUENCES,
    num_threads=2,
    block_tokens=BLOCK_TOKENS,
)
# Without them torch multiplies, and steps are not recorded.
BYTES = pytest.mark.skipif(not multiplies_bytes(), reason="this CPU does not multiply bytes")
BF16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this CPU does not multiply bf16"
)


_NO_THREADS = """
import os
from runtime_service.execution.recorded_steps import RecordedSteps

before = len(os.listdir("/proc/self/task"))
RecordedSteps(None, (), max_blocks=100_000)
assert len(os.listdir("/proc/self/task")) == before
"""


def test_making_place_for_a_large_cache_starts_no_threads() -> None:
    """OpenMP's threads of whoever loads would make those sleep that run steps."""
    environ = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", _NO_THREADS], env=environ, check=True, timeout=60)


_WARM = """
import sys
from pathlib import Path
from kernels import cpu_program
from runtime_service.execution.loading import load_runner
from tests.runtime_service.execution.engines import build_tiny
from tests.runtime_service.execution.test_recorded_steps import OPTIONS

built = build_tiny(Path(sys.argv[1]), "llama", "int8", hidden_size=64, intermediate_size=128)
runner = load_runner(*built, OPTIONS).runner
assert not cpu_program._make_calls.signatures
runner.warm_up()
assert cpu_program._make_calls.signatures
runner.close()
"""


def test_warm_up_replays_a_step_so_that_no_client_waits_for_its_compiler(tmp_path: Path) -> None:
    """In a process of its own: what is compiled once stays compiled."""
    subprocess.run([sys.executable, "-c", _WARM, str(tmp_path)], check=True, timeout=300)


@pytest.fixture(
    params=[
        "int8",
        "int8-kv-int8",
        pytest.param("bf16", marks=BF16),
        pytest.param("bf16-kv-fp8", marks=BF16),
        pytest.param("int4-rtn", marks=[BF16, BYTES]),
        pytest.param("w8a8-int8", marks=BYTES),
    ]
)
def executor(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CpuExecutor]:
    """Of a tiny engine whose vectors are long enough to be multiplied as bytes."""
    scheme, _, kv_cache = request.param.partition("-kv-")
    store, engine = build_tiny(
        tmp_path, "llama", scheme, kv_cache, hidden_size=64, intermediate_size=128
    )
    loaded: LoadedEngine = load_runner(store, engine, OPTIONS)
    executor = loaded.runner._executor
    assert isinstance(executor, CpuExecutor)
    yield executor
    loaded.runner.close()


def decode(
    lengths: list[int], tokens: list[int], rows: list[int]
) -> tuple[torch.Tensor, StepBatch]:
    """A step of the token at the end of each sequence."""
    tables = torch.tensor(
        [[row + SEQUENCES * block for block in range(BLOCKS_EACH)] for row in rows]
    ).int()
    at = torch.tensor(lengths) - 1
    slots = tables[torch.arange(len(rows)), at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
    most = int(at.max()) // BLOCK_TOKENS + 1
    return torch.tensor(tokens).int(), StepBatch(
        positions_T=at.int(),
        slot_mapping_T=slots.int(),
        block_tables_SB=tables[:, :most].contiguous(),
        seq_lens_S=torch.tensor(lengths).int(),
        query_start_S1=torch.arange(len(rows) + 1).int(),
        logit_rows_R=torch.arange(len(rows)).int(),
        kv_caches=(),
    )


@torch.inference_mode()
def test_a_replayed_step_gives_the_bits_of_one_that_is_not(executor: CpuExecutor) -> None:
    """Sequences grow, come and go; every step goes to one cache both ways."""
    generator = torch.Generator().manual_seed(3)
    num_replayed = 0
    for step in range(BLOCK_TOKENS * BLOCKS_EACH):
        count = (1, 2, 3, 13)[int(torch.randint(4, (), generator=generator))]
        rows = torch.randperm(SEQUENCES, generator=generator)[:count].tolist()
        tokens = torch.randint(300, (count,), generator=generator).tolist()
        lengths = [max(1, step + 1 - row % 3) for row in rows]
        token_ids, batch = decode(lengths, tokens, rows)
        num_replayed += executor._recorded._programs.get(count) is not None
        logits = executor.forward(token_ids, batch).clone()
        token_ids, batch = decode(lengths, tokens, rows)
        batch.kv_caches = executor._kv_caches
        assert torch.equal(logits, executor._run(token_ids, batch).float())
    assert num_replayed > 10


@torch.inference_mode()
def test_what_is_no_decode_step_of_few_sequences_is_not_replayed(executor: CpuExecutor) -> None:
    token_ids, batch = decode([3, 2], [5, 6], [0, 1])
    executor.forward(token_ids, batch)
    (recorded,) = executor._recorded._programs
    assert recorded == 2
    batch.logit_rows_R = torch.tensor([0, 0]).int()  # sequence 0 is drawn, and scores its prompt
    assert torch.equal(*executor.forward(token_ids, batch))
    many = decode([3] * SEQUENCES, [5] * SEQUENCES, list(range(SEQUENCES)))
    executor.forward(*many)
    batch.logit_rows_R = torch.tensor([]).int()
    assert len(executor.forward(token_ids, batch)) == 0
    assert list(executor._recorded._programs) == [2]
