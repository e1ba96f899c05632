"""Weights from a store to the GPU: mapped tensors copied one by one, against threads with pinned buffers, and hashing.

    python -m bench.gpu_load STORE [--lanes 1,2,4,8]

STORE holds one engine for a GPU (`bench.gpu_served --keeps` leaves one), and its files are in the page cache. One JSON
line a way; every way's weights are compared with the mapped ones.
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.gpu_timing import require_gpu
from runtime_service.execution.device_stream import CudaLane
from runtime_service.execution.weight_copy import LANE_BYTES, WeightCopy
from shared.ir import Graph
from shared.store.local import LocalStore
from shared.store.weights import WeightReader

Weights = Mapping[str, Mapping[str, torch.Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--lanes", default="1,2,4,8")
    options = parser.parse_args()
    require_gpu()
    store = LocalStore(options.store)
    engines = store.list()
    if len(engines) != 1:
        raise SystemExit(f"{options.store} holds {len(engines)} engines; one for a GPU is wanted")
    (engine,) = engines
    names = list(
        Graph.from_json(store.read_all(engine.layer("graph.json").digest).decode()).weights
    )
    torch.cuda.synchronize()
    began = time.perf_counter()
    with WeightReader(store, engine) as reader:
        reader.verify()
        _tell("hash alone", reader.num_bytes, time.perf_counter() - began)
    with WeightReader(store, engine) as reader:
        began = time.perf_counter()
        reference: Weights = {
            name: {role: tensor.cuda() for role, tensor in reader.roles(name).items()}
            for name in names
        }
        torch.cuda.synchronize()
        _tell("mapped, one by one", reader.num_bytes, time.perf_counter() - began)
    for count in map(int, options.lanes.split(",")):
        # A store of its own remembers nothing of what was hashed.
        for hashes in (False, True):
            with WeightReader(LocalStore(options.store) if hashes else store, engine) as reader:
                began = time.perf_counter()
                reader.start_verify()
                lanes = [CudaLane(LANE_BYTES) for _ in range(count)]
                with WeightCopy(reader, names, torch.device("cuda"), lanes) as copy:
                    copy.join()
                    copied = time.perf_counter() - began
                    reader.verify()
                    whole = time.perf_counter() - began
                way = f"{count} lanes" + (" and hashing" if hashes else "")
                _tell(way, reader.num_bytes, whole, copy_s=round(copied, 3))
                _compare(reference, copy.weights)
                del copy


def _compare(reference: Weights, found: Weights) -> None:
    for name, roles in reference.items():
        for role, tensor in roles.items():
            assert torch.equal(tensor, found[name][role]), f"{name} {role} differs"


def _tell(way: str, num_bytes: int, seconds: float, **more: float) -> None:
    line = {"way": way, "s": round(seconds, 3), "gb_s": round(num_bytes / seconds / 1e9, 2)}
    print(json.dumps({**line, "gpu": torch.cuda.get_device_name(), **more}), flush=True)


if __name__ == "__main__":
    main()
