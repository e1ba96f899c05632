"""A whole decode step of a Llama-shaped model from cubins, in one CUDA graph, with the token fed back on the device.

python -m bench.gpu_decode .gpu --model llama-3.1-8b --quant bf16 --batches 1,4,16
First the logits of a few positions are compared with an fp32 reference; then milliseconds per step are measured.
Prints one JSON line per case.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from bench.gpu_kernels import read
from bench.gpu_models import (
    MODELS,
    LlamaSizes,
    as_read,
    inv_freq,
    quantized_graph,
    random_weights,
    reference_logits,
    weight_bytes,
)  # fmt: skip
from bench.gpu_timing import captured, median_ms, read_limit_tb_s
from kernels.attention.launch import shares_of
from kernels.batch import StepBatch
from kernels.kv_cache import by_layer, kv_format
from kernels.launch import Sizes
from kernels.launcher import KernelLibrary
from kernels.regimes import DECODE_REGIMES, Regime
from kernels.sampling.launch import greedy_grid, greedy_variant
from runtime_service.execution.cuda_executor import CudaExecutor, DeviceBatch, rope_table
from shared.ir import Graph

_BLOCK_TOKENS = 16


class DecodeLoop:
    """Sequences that decode greedily on the device; `step` launches one token for each."""

    def __init__(
        self, library: KernelLibrary, executor: CudaExecutor, sizes: LlamaSizes, graph: Graph,
        num_sequences: int, max_tokens: int, regime: Regime,
    ) -> None:  # fmt: skip
        blocks = -(-max_tokens // _BLOCK_TOKENS)
        ints = {"dtype": torch.int32, "device": "cuda"}
        parts = kv_format(graph).allocate(
            graph,
            num_sequences * blocks,
            _BLOCK_TOKENS,
            lambda shape, dtype: torch.zeros(shape, dtype=dtype, device="cuda"),
        )
        tables = torch.randperm(num_sequences * blocks, device="cuda").int().view(num_sequences, -1)
        self.batch = DeviceBatch(
            token_ids_T=torch.zeros(num_sequences, **ints),
            step=StepBatch(
                positions_T=torch.zeros(num_sequences, **ints),
                slot_mapping_T=(tables[:, 0] * _BLOCK_TOKENS).contiguous(),
                block_tables_SB=tables.contiguous(),
                seq_lens_S=torch.ones(num_sequences, **ints),
                query_start_S1=torch.arange(num_sequences + 1, **ints),
                logit_rows_R=torch.arange(num_sequences, **ints),
                kv_caches=by_layer(parts),
            ),
            part_start_S1=torch.zeros(num_sequences + 1, **ints),
            rope=rope_table(inv_freq(sizes), 1.0, max_tokens),
        )
        self.history = torch.zeros(num_sequences, max_tokens, **ints)
        self.best = torch.zeros(num_sequences, dtype=torch.int64, device="cuda")
        self.counters = torch.zeros(num_sequences, **ints)
        self.regime = regime
        self._shares = shares_of(graph)
        self.executor = executor
        executor.prepare([self.regime])
        self._sample = library.kernel(greedy_variant(sizes.vocab, _BLOCK_TOKENS, library.arch))
        self._grid = greedy_grid(num_sequences, sizes.vocab)

    def start_at(self, token_ids: torch.Tensor, position: int) -> None:
        """The next step computes `token_ids` at `position`; what lies before is taken as cached."""
        step = self.batch.step
        # Those that begin with as many tokens; more keys make longer parts.
        count = len(self.history)
        ones, ends = np.ones(count, np.int32), np.full(count, position + 1, np.int32)
        parts = self._shares.further_parts(ones, ends).cumsum()
        self.batch.part_start_S1[1:].copy_(torch.from_numpy(parts))
        self.batch.token_ids_T.copy_(token_ids)
        self.history[:, position] = token_ids
        step.positions_T.fill_(position)
        step.seq_lens_S.fill_(position + 1)
        block, offset = divmod(position, _BLOCK_TOKENS)
        step.slot_mapping_T.copy_(step.block_tables_SB[:, block] * _BLOCK_TOKENS + offset)

    def step(self) -> torch.Tensor:
        """Launches a forward pass and the sampler."""
        logits = self.executor.run(self.regime, self.batch)
        step = self.batch.step
        self._sample(
            self._grid, logits.data_ptr(), self.best.data_ptr(), self.counters.data_ptr(),
            self.batch.token_ids_T.data_ptr(), step.positions_T.data_ptr(),
            step.seq_lens_S.data_ptr(), step.slot_mapping_T.data_ptr(),
            step.block_tables_SB.data_ptr(), self.history.data_ptr(),
            step.block_tables_SB.stride(0), self.history.stride(0),
        )  # fmt: skip
        return logits


def regime_for(num_sequences: int) -> Regime:
    """The smallest decode regime that holds so many sequences."""
    return next(r for r in DECODE_REGIMES if r.max_sequences >= num_sequences)


def check(loop: DecodeLoop, graph: object, packed: dict, sizes: LlamaSizes) -> dict[str, object]:  # type: ignore[type-arg]
    """Decodes from one token through a captured graph and compares with the fp32 reference."""
    num_sequences = loop.history.shape[0]
    first = torch.arange(7, 7 + num_sequences, device="cuda", dtype=torch.int32)
    loop.start_at(first, 0)
    logits_now = loop.step()
    graph_replay = captured(loop.step, warm=0)
    loop.start_at(first, 0)
    steps = 40
    logits = []
    for _ in range(steps):
        graph_replay.replay()
        logits.append(logits_now.clone())
    last = num_sequences - 1
    tokens = loop.history[last, :steps]
    worst, agree = 0.0, True
    for position in (0, 1, 17, steps - 1):
        want = reference_logits(graph, packed, tokens[: position + 1], sizes)  # type: ignore[arg-type]
        got = logits[position][last]
        worst = max(worst, float((got - want).norm() / want.norm()))
        agree = agree and int(got.argmax()) == int(loop.history[last, position + 1])
    return {"error_to_fp32": round(worst, 5), "argmax_matches": agree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--kv-cache", default="", help="fp8: keys and values in 8 bits")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--many", action="store_true", help="torch's matrix products at any batch")
    parser.add_argument("--arch", default="sm_90")
    options = parser.parse_args()
    sizes = MODELS[options.model]
    kv_cache = options.kv_cache
    graph = quantized_graph(sizes, options.quant, options.layers, kv_cache=kv_cache)
    library = read(options.folder, f"{options.arch}.models")
    limit = read_limit_tb_s()
    packed = random_weights(graph)
    layers = int(str(graph.config["num_layers"]))
    for num_sequences in map(int, options.batches.split(",")):
        most = Sizes(num_sequences, num_sequences, num_sequences)
        executor = CudaExecutor(graph, library, as_read(graph, packed), most)
        regime = DECODE_REGIMES[-1] if options.many else regime_for(num_sequences)
        loop = DecodeLoop(
            library, executor, sizes, graph, num_sequences, options.context + 256, regime
        )
        checked = check(loop, graph, packed, sizes)
        loop.start_at(loop.batch.token_ids_T.clone(), options.context)
        replay = captured(loop.step, warm=1)
        ms = median_ms(replay.replay, 100, 10)
        kv = num_sequences * options.context * kv_format(graph).bytes_per_token(graph)
        moved = weight_bytes(graph, packed) + kv
        print(json.dumps({
            "model": options.model, "quant": options.quant, "kv_cache": kv_cache,
            "layers": layers, "batch": num_sequences,
            "tokens_in_tile": regime.max_tokens,
            "context": options.context, "ms": round(ms, 4), "tb_s": round(moved / ms / 1e9, 3),
            "read_limit_tb_s": round(limit, 3), "of_limit": round(moved / ms / 1e9 / limit, 3),
            "tok_s": round(num_sequences / ms * 1e3), **checked,
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
