"""What a benchmark says when something that it needs is not there: a line, not a traceback."""

from pathlib import Path

import pytest
import torch
from millrace.runtime.v1 import runtime_pb2 as pb

from bench.gpu_kernels import read
from bench.gpu_timing import require_gpu
from bench.processes import timed_start


def test_kernels_that_were_not_compiled_are_named_with_what_compiles_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"sm_90\.models\..* python -m bench\.gpu_kernels"):
        read(tmp_path, "sm_90.models")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named() -> None:
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        require_gpu()


def test_daemon_that_ends_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the daemon ended with status"):
        timed_start(pb.StartGeneration(text="a"), "--store", str(tmp_path), "--no-such-flag", "1")
