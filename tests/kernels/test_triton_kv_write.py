"""Law 2 on the CPU: what `qkv_rope_write` leaves of keys and values beside the codes of an 8-bit cache."""

from dataclasses import replace

import pytest
import torch

from bench.gpu_models import LlamaSizes, llama_graph
from kernels.kv_cache import EIGHT_BIT_FORMATS
from kernels.launch import Launch, Sizes
from kernels.lowering import lower
from kernels.regimes import Regime
from runtime_service.execution.cuda_executor import rope_table
from tests.kernels.interpreted import INTERPRETER, run

_SIZES = LlamaSizes(hidden=64, layers=1, heads=6, kv_heads=2, head_dim=24, ffn=64, vocab=64)
_BLOCK_TOKENS, _TOKENS = 4, 7


def _launch(kv_cache: str) -> Launch:
    graph = llama_graph(_SIZES, "plain", kv_cache=kv_cache)
    graph = replace(graph, config={**graph.config, "dtype": "float16"})
    steps = lower(graph, INTERPRETER, Regime(0, 0, _BLOCK_TOKENS))
    return next(s for s in steps if isinstance(s, Launch) and s.variant.kernel == "qkv_rope_write")


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
def test_new_keys_and_values_are_what_their_codes_say(kv_cache: str) -> None:
    """To the last bit of their dtype: a prompt gives the same tokens in one step and in chunks. A head of zeros has no
    scale, and a token without a slot is padding, whose codes are nowhere."""
    torch.manual_seed(5)
    heads, dim = _SIZES.kv_heads, _SIZES.head_dim
    qkv = torch.randn(_TOKENS, (_SIZES.heads + 2 * heads) * dim).half()
    qkv[3] = 0
    slots = torch.tensor([9, 3, 0, 1, -1, 14, 15]).int()
    cache = (4, heads, _BLOCK_TOKENS, dim)
    new = {name: torch.full((_TOKENS, heads * dim), 7.0).half() for name in ("k_new", "v_new")}
    codes = {name: torch.zeros(cache, dtype=torch.uint8) for name in ("k_cache", "v_cache")}
    scales = {name: torch.zeros(4, heads, _BLOCK_TOKENS) for name in ("k_scale", "v_scale")}
    launch = _launch(kv_cache)
    operands = {
        "qkv": qkv, "positions": torch.arange(_TOKENS).int(), "slots": slots,
        "rope": rope_table([0.9**i for i in range(dim // 2)], 1.0, 16, "cpu"),
        "q_out": torch.zeros(_TOKENS, _SIZES.heads * dim).half(), **codes, **scales, **new,
    }  # fmt: skip
    run(launch.variant, launch.grid(Sizes(_TOKENS, 1, 1)), operands)
    dtype = getattr(torch, EIGHT_BIT_FORMATS[kv_cache].dtype)
    written = slots >= 0
    blocks, offsets = slots[written] // _BLOCK_TOKENS, slots[written] % _BLOCK_TOKENS
    for part in "kv":
        code = codes[f"{part}_cache"].view(dtype)[blocks, :, offsets].float()
        value = code * scales[f"{part}_scale"][blocks, :, offsets][..., None]
        assert value.count_nonzero() > value.numel() // 2
        assert torch.equal(new[f"{part}_new"][written], value.flatten(1).half())
