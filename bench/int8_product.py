"""Why `w8a8-int8` exists on CPUs: one linear as integers, in bf16, and as weight-only int8.

    OMP_NUM_THREADS=1 python -m bench.int8_product

Microseconds, the best of many, for a few shapes and numbers of rows; a line of JSON each. Each form
gets its input as it wants it: what rounding activations costs is not in here.
"""

import json
import time
from collections.abc import Callable
from functools import partial

import torch

SHAPES = ((3072, 576), (576, 1536))
ROWS = (1, 16, 256)
REPEATS = 30


def best_us(run: Callable[[], object]) -> float:
    """The fastest of some runs, after two that warm up."""
    times = []
    for _ in range(REPEATS + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(min(times[2:]) * 1e6, 1)


def main() -> None:
    """Measures every shape."""
    for num_rows, num_columns in SHAPES:
        codes = torch.randint(-127, 128, (num_rows, num_columns), dtype=torch.int8)
        transposed, scale = codes.t(), torch.rand(num_rows).bfloat16()
        packed = torch.ops.mkldnn._reorder_linear_weight(codes.bfloat16(), 16)
        for rows in ROWS:
            x = torch.randint(-127, 128, (rows, num_columns), dtype=torch.int8)
            x_bf16 = x.bfloat16()
            aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
            forms = {
                "int8 by int8": partial(torch._int_mm, x, transposed),
                "bf16": partial(mkldnn._linear_pointwise, x_bf16, packed, None, "none", [], ""),
                "bf16 by int8": partial(aten._weight_int8pack_mm, x_bf16, codes, scale),
            }
            times = {name: best_us(run) for name, run in forms.items()}
            print(json.dumps({"n": num_rows, "k": num_columns, "rows": rows, "us": times}))


if __name__ == "__main__":
    main()
