"""GPTQ beside llm-compressor's, on the same weights, inputs, scales and zeros.

    pip install llmcompressor==0.14.0.1      # beside the project, in an environment of its own
    python -m bench.gptq_peer [--model sample:smollm2-135m] [--weights 6]

Both round every linear of the first layers with static groups of 64 and act-order. A line of JSON for each:
how many levels are the same, and each one's error of the output, relative. llm-compressor knows integer
zeros alone: it is given the weight less our zeros, which leaves the same errors. Inputs are random,
correlated, and have channels far larger than the rest.
"""

import argparse
import json

import torch

from bench.peer_libraries import peer_libraries
from compiler_service.checkpoints.sources import open_checkpoint
from compiler_service.quantization.int4_gptq import prepare_pack
from kernels.linear.layouts import LAYOUTS, pack_int4

with peer_libraries("llmcompressor==0.14.0.1"):
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

GROUP, NUM_TOKENS = 64, 2048


def random_inputs(num_columns: int) -> torch.Tensor:
    """fp32 [T, K]: mixtures of a quarter as many directions, and some noise."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(NUM_TOKENS, num_columns // 4, generator=generator)
    mixed = base @ torch.randn(num_columns // 4, num_columns, generator=generator)
    mixed += 0.3 * torch.randn(NUM_TOKENS, num_columns, generator=generator)
    mixed[:, ::17] *= 10
    return mixed


def peer(
    weight_NK: torch.Tensor, x_TK: torch.Tensor, packed: dict[str, torch.Tensor]
) -> torch.Tensor:
    """llm-compressor's rounded weight, on the grid of `packed`."""
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP,
        actorder="weight",
    )  # fmt: skip
    zero_NK = packed["zero"].repeat_interleave(GROUP, 1)
    hessian_KK = x_TK.T @ x_TK * (2.0 / len(x_TK))
    scale_NJ = packed["scale"]
    rounded, _, fell_back = quantize_weight(
        (weight_NK - zero_NK)[None], hessian_KK[None], scale_NJ[None],
        torch.zeros_like(scale_NJ)[None], None, args,
    )  # fmt: skip
    assert not bool(fell_back.any()), "llm-compressor found no factor of the Hessian"
    return rounded[0] + zero_NK


def main() -> None:
    """Compares, and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sample:smollm2-135m")
    parser.add_argument("--weights", type=int, default=6)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    names = [name for name in checkpoint.tensors if ".layers." in name and "_proj" in name]
    for name in names[: options.weights]:
        weight_NK = checkpoint.read(name).float()
        x_TK = random_inputs(weight_NK.shape[1])
        packed = prepare_pack(GROUP, x_TK, None)(weight_NK)
        ours_NK = LAYOUTS["int4_group"].unpack(packed)
        theirs_NK = peer(weight_NK, x_TK, packed)
        nearest_NK = LAYOUTS["int4_group"].unpack(pack_int4(weight_NK, GROUP))
        steps_NK = (ours_NK - theirs_NK).abs() / packed["scale"].repeat_interleave(GROUP, 1)
        result = {"weight": name, "same_levels": round(float((steps_NK < 0.5).double().mean()), 6)}
        for who, found_NK in (("ours", ours_NK), ("theirs", theirs_NK), ("nearest", nearest_NK)):
            error = torch.linalg.vector_norm(x_TK @ (found_NK - weight_NK).T)
            expected = torch.linalg.vector_norm(x_TK @ weight_NK.T)
            result[who] = round(float(error / expected), 6)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
