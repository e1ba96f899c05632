"""Machine code is made without a GPU, fits each arch, and is the same bytes each time."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.gpu_models import MODELS, llama_graph
from kernels.aot import CompiledKernel, compile_variants, pack_kernels
from kernels.cubin import parameter_sizes
from kernels.linear.launch import LinearShape, Tiles, few_tokens, one_token
from kernels.linear.launch_int4 import dense_int4, many_int4, many_int4_ways, takes_wgmma
from kernels.linear.tiles import built_in_tiles
from kernels.lowering import variants
from kernels.regimes import Regime
from kernels.variant import CODE_TITLE, INDEX_TITLE, KernelVariant
from shared.arch import ARCHES, Arch

GPU_ARCHES = [arch for arch in ARCHES.values() if arch.is_gpu]
# A representative part of all that an engine holds. Where shared memory is scarce the widest tiles, where fp8 is new
# its kernels; arches with the same limits and features would compile the same code once more.
_PARTS = {
    "sm_80": ("plain", Regime(1, 1)),
    "sm_86": ("int4_group", Regime(64, 64)),
    "sm_89": ("fp8_channel", Regime(16, 16)),
    "sm_90": ("fp8_channel", Regime(0, 0)),
    "sm_100": ("fp8_channel", Regime(1, 1)),
    "sm_120": ("plain", Regime(64, 0)),
}
_SHAPE = LinearShape(64, 256, "bf16", "bf16", has_residual=True)
_INT4 = LinearShape(4096, 4096, "bf16", "bf16", layout="int4_group", group_size=64)
_TILES = Tiles(block_n=4, block_k=256, num_warps=4)


def _llama_variants(arch: Arch) -> set[KernelVariant]:
    """Variants of one layer of Llama-3.1-8B's shapes."""
    layout, regime = _PARTS[arch.name]
    graph = llama_graph(MODELS["llama-3.1-8b"], layout, num_layers=1)
    return variants(graph, arch, (regime,), with_candidates=True)


def _compile_one(variant: KernelVariant, arch: Arch) -> CompiledKernel:
    (kernel,) = compile_variants([variant], arch)
    return kernel


@pytest.mark.parametrize("arch", GPU_ARCHES, ids=lambda arch: arch.name)
def test_every_kernel_compiles_within_the_arch_limits(arch: Arch) -> None:
    """Law 2: with no GPU present. `compile_variants` asserts shared memory and parameter lists."""
    wanted = _llama_variants(arch)
    kernels = compile_variants(wanted, arch)
    assert {k.variant for k in kernels} == wanted
    assert all(k.shared_bytes <= arch.max_shared_bytes for k in kernels)


@pytest.mark.parametrize("kv_cache", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_90"])
def test_attention_over_eight_bits_compiles_within_the_arch_limits(
    name: str, kv_cache: str
) -> None:
    """Also where there is no e4m3 hardware: codes are read and written by their bits."""
    arch, graph = ARCHES[name], llama_graph(MODELS["llama-3.1-8b"], "plain", num_layers=1)
    graph = replace(graph, config={**graph.config, "kv_cache": kv_cache})
    regimes = (Regime(1, 1), Regime(0, 512), Regime(0, 0))
    wanted = {v for v in variants(graph, arch, regimes) if v.op in ("attention", "qkv_rope_write")}
    kernels = compile_variants(wanted, arch)
    assert all(k.shared_bytes <= arch.max_shared_bytes for k in kernels)


@pytest.mark.parametrize("head_dim", [80, 256])
def test_decode_of_odd_and_of_wide_heads_compiles_where_shared_memory_is_scarce(
    head_dim: int,
) -> None:
    """A tile has a power of two of columns, and an engine holds the candidates, too."""
    sizes = replace(MODELS["tiny"], head_dim=head_dim)
    graph = llama_graph(sizes, "plain", num_layers=1)
    arch, regimes = ARCHES["sm_86"], (Regime(16, 2), Regime(0, 512))
    found = variants(graph, arch, regimes, with_candidates=True)
    compile_variants({variant for variant in found if variant.op == "attention"}, arch)


def test_ptx_is_of_the_version_that_drivers_are_asked_for() -> None:
    kernel = _compile_one(one_token(_SHAPE, ARCHES["sm_80"], _TILES), ARCHES["sm_80"])
    assert b".version 8.7" in kernel.ptx


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("arch", GPU_ARCHES, ids=lambda arch: arch.name)
def test_int4_by_tensor_cores_compiles_within_the_arch_limits(arch: Arch, group: int) -> None:
    """One token everywhere, many where there is `wgmma`: there programs have more warps than their variant asks for,
    those that copy."""
    shape = replace(_INT4, group_size=group)
    gate_up = replace(shape, n=28672, epilogue="silu_mul", num_squares=64)
    shapes = shape, replace(shape, k=14336, has_gain=True), gate_up
    one = {one_token(each, arch, built_in_tiles(each, arch, 1)[0]) for each in shapes}
    many = set[KernelVariant]()
    if takes_wgmma(shape, arch):
        many = {many_int4(shape, arch, *way) for way in many_int4_ways(shape)}
        assert many
    kernels = compile_variants(one | many, arch)
    assert all(k.shared_bytes <= arch.max_shared_bytes for k in kernels)
    for kernel in kernels:
        copying = 4 if kernel.variant in many else 0
        assert kernel.num_warps == kernel.variant.num_warps + copying


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_int4_compiles_in_either_dtype_of_a_model(dtype: str) -> None:
    arch, shape = ARCHES["sm_80"], replace(_INT4, dtype=dtype, out_dtype=dtype)
    tiles, few = (built_in_tiles(shape, arch, rows)[0] for rows in (1, 16))
    wanted = [
        one_token(shape, arch, tiles),
        few_tokens(shape, arch, few, 16),
        dense_int4(shape, arch),
    ]
    assert {kernel.variant for kernel in compile_variants(wanted, arch)} == set(wanted)


def test_same_variants_give_the_same_bytes() -> None:
    """Law 3: each run compiles in a folder of its own, and the order of asking does not matter."""
    arch = ARCHES["sm_90"]
    wanted = [one_token(_SHAPE, arch, _TILES), one_token(replace(_SHAPE, k=512), arch, _TILES)]
    first = pack_kernels(compile_variants(wanted, arch), arch)
    second = pack_kernels(compile_variants(reversed(wanted), arch, num_processes=1), arch)
    assert first == second


def test_index_finds_each_kernel_in_the_code() -> None:
    arch = ARCHES["sm_80"]
    variant = one_token(_SHAPE, arch, _TILES)
    kernel = _compile_one(variant, arch)
    layers = dict(pack_kernels([kernel], arch))
    entry = json.loads(layers[INDEX_TITLE])["kernels"][variant.key]
    offset, size = entry["code"]
    assert layers[CODE_TITLE][offset : offset + size] == kernel.cubin
    offset, size = entry["ptx"]
    assert layers[CODE_TITLE][offset : offset + size] == kernel.ptx
    assert parameter_sizes(kernel.cubin) == {entry["symbol"]: (8, 8, 8, 8, 8, 8)}


def test_only_portable_code_carries_ptx() -> None:
    arch = ARCHES["sm_90"]
    variant = one_token(_SHAPE, arch, _TILES)
    index = json.loads(dict(pack_kernels([_compile_one(variant, arch)], arch))[INDEX_TITLE])
    assert index["kernels"][variant.key]["ptx"] == [0, 0]
    assert index["arch"] == "sm_90"


def test_too_much_shared_memory_is_refused_by_name() -> None:
    """The compiler itself does not check it."""
    shape = replace(_SHAPE, k=4096)
    tiles = Tiles(block_n=64, block_k=256, num_warps=4, stages=4)
    variant = few_tokens(shape, ARCHES["sm_86"], tiles, 16)
    with pytest.raises(
        AssertionError, match=f"{variant.key} uses .* bytes of shared memory, sm_86"
    ):
        compile_variants([variant], ARCHES["sm_86"])
    compile_variants([few_tokens(shape, ARCHES["sm_90"], tiles, 16)], ARCHES["sm_90"])


def test_variant_that_disagrees_with_its_kernel_is_refused() -> None:
    variant = one_token(_SHAPE, ARCHES["sm_90"], _TILES)
    wrong = replace(variant, constants=variant.constants[:-1])
    with pytest.raises(AssertionError, match="the kernel takes"):
        compile_variants([wrong], ARCHES["sm_90"])
    swapped = replace(variant, arguments=variant.arguments[::-1])
    with pytest.raises(AssertionError, match="out of order"):
        compile_variants([swapped], ARCHES["sm_90"])


def test_declared_alignment_makes_wide_loads() -> None:
    """Undeclared, 16-byte loads fall apart into 2-byte ones."""
    arch = ARCHES["sm_90"]
    variant = one_token(_SHAPE, arch, _TILES)
    loose = tuple(replace(a, is_aligned=False) for a in variant.arguments)
    wide = _compile_one(variant, arch).ptx.decode()
    narrow = _compile_one(replace(variant, arguments=loose), arch).ptx.decode()
    assert "ld.global.v4.b32" in wide
    assert "ld.global.v4.b32" not in narrow


def test_compiling_writes_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    _compile_one(one_token(_SHAPE, ARCHES["sm_90"], _TILES), ARCHES["sm_90"])
    assert capfd.readouterr().out == ""


_KILLED = """
import os
from kernels.aot import compile_pool

with compile_pool(1) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""


def test_processes_that_compile_end_with_the_build_that_is_killed() -> None:
    """The system's out-of-memory killer, or a cancel that is not heard, leaves none of them waiting."""
    # What it writes ends once all that inherited its pipe have ended.
    done = subprocess.run(
        [sys.executable, "-c", _KILLED], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 1
