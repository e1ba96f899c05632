"""Timing on the GPU: captured graphs, device events, medians; and the memory's own limit."""

import statistics
from collections.abc import Callable

import torch

Run = Callable[[], object]


def require_gpu() -> None:
    """Checks that there is an NVIDIA GPU.

    Raises:
        SystemExit: there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs an NVIDIA GPU and its driver; there is none here")


def captured(run: Run, warm: int = 2) -> torch.cuda.CUDAGraph:
    """`run` as a CUDA graph, after a few runs outside it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def median_ms(run: Run, repeats: int = 20, warm: int = 3) -> float:
    """Median milliseconds of one `run`, by device events."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def read_limit_tb_s() -> float:
    """TB/s at which the device reads memory: the best of torch reductions over 8 GB and a copy counted both
    ways."""
    data = torch.empty(4 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    words = data.view(torch.int64)
    seen = []
    for width in (4096, 16384, 65536):
        rows = words.view(-1, width)
        out = torch.empty(rows.shape[0], dtype=torch.int64, device="cuda")
        ms = median_ms(lambda rows=rows, out=out: torch.amax(rows, 1, out=out), 7)  # type: ignore[misc]
        seen.append(data.nbytes / ms / 1e9)
    half = data.numel() // 2
    ms = median_ms(lambda: data[:half].copy_(data[half:]), 7)
    seen.append(data.nbytes / ms / 1e9)
    return max(seen)
