"""An engine is loaded whole, or refused with its reason."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from runtime_service.device_full import device_full
from runtime_service.execution.loader import load_engine
from runtime_service.execution.loading import load_runner
from runtime_service.execution.options import RunnerOptions
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams
from shared.errors import ArchMismatch, DeviceFull, DigestMismatch
from tests.runtime_service.execution.engines import build_tiny


def test_engine_is_loaded_by_names_alone(tmp_path: Path) -> None:
    store, engine = build_tiny(tmp_path)
    arguments = {"store": str(store.root), "engine": engine.name, "max_sequence_tokens": 64}
    loaded = load_engine(**pickle.loads(pickle.dumps(arguments)))
    assert [name for name, _ in loaded.phases] == [
        "import_torch",
        "read_graph",
        "pack_weights",
        "verify_weights",
    ]
    assert loaded.limits.max_sequence_tokens == 64
    loaded.runner.warm_up()
    new = NewSequence(0, [1, 2, 3], 3, SamplingParams(), StopParams(5), 0, 0, [0])
    step = SchedulerOutput(0, (), (new,), (), (ScheduledSequence(0, 0, 3),))
    assert len(loaded.runner.execute(step).result().sampled) == 1
    loaded.runner.close()


def test_corrupt_weights_are_refused(tmp_path: Path) -> None:
    store, engine = build_tiny(tmp_path)
    path = store.blob_path(engine.layer("weights/00000").digest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(DigestMismatch):
        load_runner(store, engine, RunnerOptions(max_sequence_tokens=64))


def test_no_collection_walks_what_was_imported() -> None:
    """With torch imported each takes 0.2 s, and a load makes objects enough for several."""
    steps = "import gc", "from runtime_service.execution import loader", "loader.import_ahead()"
    program = "; ".join((*steps, "print(gc.get_freeze_count())"))
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) > 100_000


def test_engine_for_a_gpu_is_refused_on_a_cpu(tmp_path: Path) -> None:
    store, engine = build_tiny(tmp_path)
    other = replace(engine, key=replace(engine.key, arch="sm_90"))
    with pytest.raises(ArchMismatch):
        load_runner(store, other, RunnerOptions())


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError, torch.AcceleratorError])
@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB of which "
            "1.2 GiB is free. Including non-PyTorch memory, this process has 22.3 GiB memory in use.",
            "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB of which 1.2 GiB is free",
        ),
        ("CUDA error: out of memory\nmore", "CUDA error: out of memory"),
    ],
)
def test_full_gpu_is_told_in_a_line(said: str, told: str, failure: type[RuntimeError]) -> None:
    with pytest.raises(DeviceFull) as refused, device_full("tiny-int8"):
        raise failure(said)
    assert refused.value.fields == {"engine": "tiny-int8", "problem": told}
    assert "\n" not in str(refused.value)
