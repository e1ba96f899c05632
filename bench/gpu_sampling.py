"""What each way of drawing costs on the GPU, at batches of 1, 16 and 256 rows of a 128k vocabulary.

python -m bench.gpu_kernels build/gpu --only sampling     # on any machine
python -m bench.gpu_sampling build/gpu
One JSON line a case: microseconds on the device (a captured graph of the launches), and of the host's launches.
Logits are normal with a deviation of 1, as random weights give them, and of 3, nearer to a trained model's.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu_kernels import SAMPLING_VOCAB, read
from bench.gpu_timing import captured, median_ms
from kernels.attention.shares import Shares
from kernels.launcher import KernelLibrary
from runtime_service.execution.cuda_model_runner import Reading
from runtime_service.execution.device_rows import DeviceRows
from runtime_service.execution.device_sampler import DeviceSampler, sampler_scratch
from runtime_service.execution.device_stream import CudaStream
from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import NewSequence, ScheduledSequence, SchedulerOutput
from runtime_service.scheduling.request import SamplingParams, StopParams

_HISTORY = 1000

FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-k 50, top-p 0.95": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    "bias of 300": {"logit_bias": tuple((token, 1.0) for token in range(300))},
    "logprob": {"num_logprobs": 0},
    "logprob, 5 likeliest": {"num_logprobs": 5},
    "logprob, 20 likeliest": {"num_logprobs": 20},
    "all": {
        "temperature": 1.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1,
        "num_logprobs": 5, "logit_bias": ((1, 1.0),),
    },
}  # fmt: skip


def sampler_of(
    library: KernelLibrary, params: SamplingParams, num_rows: int, min_new_tokens: int = 0
) -> tuple[DeviceSampler, DeviceRows]:
    """A sampler whose rows all draw in one way, with histories of 1000 tokens."""
    stream = CudaStream()
    limits = RuntimeLimits(2 * _HISTORY, num_rows, 8192, 16, 64, "bfloat16", 0, "")
    rows = DeviceRows(library, limits, SAMPLING_VOCAB, Shares(1, 1), stream)
    torch.manual_seed(0)
    histories = torch.randint(0, SAMPLING_VOCAB, (num_rows, _HISTORY)).tolist()
    stop = StopParams(_HISTORY, min_new_tokens, (5, 6) if min_new_tokens else ())
    new = tuple(
        NewSequence(row, history, 500, params, stop, row, 0, [])
        for row, history in enumerate(histories)
    )
    rows.apply(SchedulerOutput(0, (), new, (), ()))
    scratch = sampler_scratch(num_rows, SAMPLING_VOCAB, stream.device)
    return DeviceSampler(library, rows, SAMPLING_VOCAB, scratch, torch.clone), rows


def time_feature(
    library: KernelLibrary, params: SamplingParams, num_rows: int, deviation: float
) -> dict[str, float]:
    """Microseconds of a step's draws."""
    sampler, rows = sampler_of(library, params, num_rows)
    sent = rows.send([ScheduledSequence(row, _HISTORY - 1, 1) for row in range(num_rows)])
    logits = torch.randn(num_rows, SAMPLING_VOCAB, device="cuda") * deviation
    reading = Reading(num_rows, SAMPLING_VOCAB, CudaStream())

    def draw() -> None:
        sampler.launch(logits, sent, reading.drawn_S, reading.reports_SW)

    graph = captured(draw)
    device_us = 1000 * median_ms(graph.replay, 20, 3)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        draw()
    host_us = (time.perf_counter() - started) * 1e5
    torch.cuda.synchronize()
    return {"device_us": round(device_us, 1), "host_us": round(host_us, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--rows", default="1,16,256")
    options = parser.parse_args()
    library = read(options.folder, f"{options.arch}.sampling")
    print(json.dumps({"device": torch.cuda.get_device_name()}), flush=True)
    for num_rows in map(int, options.rows.split(",")):
        for name, params in FEATURES.items():
            for deviation in (1.0, 3.0):
                seen = time_feature(library, SamplingParams(**params), num_rows, deviation)
                row = {"rows": num_rows, "draws": name, "deviation": deviation, **seen}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
