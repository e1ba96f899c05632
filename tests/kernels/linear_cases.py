"""Linear launches with random operands, compared with their formula: on the CPU through the interpreter, on a GPU
from machine code. Shapes that divide by nothing are among them."""

from collections.abc import Callable
from dataclasses import replace

import torch

from kernels.launch import Sizes
from kernels.linear.candidates import candidates
from kernels.linear.gpu import INT4_PARTS, arranged
from kernels.linear.launch import (
    LinearShape,
    Tiles,
    few_tokens,
    num_programs,
    one_token,
    quantized_rows,
    tiled_scratch,
    uses_mma,
)  # fmt: skip
from kernels.linear.launch_int4 import (
    MOST_CHOSEN_INT4_ROWS,
    dense_int4,
    dense_int4_grid,
    many_int4,
    many_int4_grid,
    many_int4_tiles,
)
from kernels.linear.launch_int8 import dense_int8, dense_int8_grid
from kernels.linear.layouts import INT4_GROUPS, LAYOUTS
from kernels.linear.op import int8_tokens
from kernels.variant import KernelVariant
from shared.arch import Arch
from shared.ir import WeightSpec

_EPS = 1e-5

Operands = dict[str, torch.Tensor | int | float]
Run = Callable[[KernelVariant, tuple[int, int, int], Operands], None]
TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def _operands(shape: LinearShape, tokens: int, seed: int) -> Operands:
    torch.manual_seed(seed)
    dtype = TORCH_DTYPES[shape.dtype]
    weight = torch.randn(shape.n, shape.k) * shape.k**-0.5
    layout = LAYOUTS[shape.layout]
    packed = layout.pack(weight.to(dtype), shape.group_size)
    spec = WeightSpec(
        tuple(weight.shape), ("w",), (shape.n,), shape.dtype, shape.layout, shape.group_size
    )
    read = arranged(spec, packed)
    if shape.layout == "fp8_channel":
        read["weight"] = read["weight"].view(torch.uint8)
    slots = torch.randperm(4 * tokens)[:tokens].int()
    if tokens > 2:
        slots[1] = -1
    cache = (tokens, shape.num_kv_heads, 4, shape.head_dim)
    x = torch.randn(tokens + 3, shape.k).to(dtype)
    codes, x_scale = int8_tokens(x.float())
    return {
        "x": codes if shape.activations else x,
        "x_scale": x_scale.flatten(),
        **read,
        "dense": layout.unpack(packed),
        "bias": torch.randn(shape.n).to(dtype),
        "squares": torch.rand(tokens + 3, max(1, shape.num_squares)),
        "gain": (1 + torch.randn(shape.n) / 4).to(dtype),
        "normed": torch.full((tokens, shape.n), float("nan")).to(dtype),
        "squares_out": torch.full((tokens, 64), float("nan")),
        "rows": torch.randperm(tokens + 3)[:tokens].int(),
        "residual": torch.randn(tokens, shape.n).to(dtype),
        "out": torch.full((tokens, _width(shape)), float("nan")).to(dtype),
        "positions": torch.randint(0, 50, (tokens,)).int(),
        "rope": torch.rand(64, max(1, shape.head_dim)),
        "slots": slots,
        "k_cache": torch.full(cache, 7.0).to(dtype),
        "v_cache": torch.full(cache, 7.0).to(dtype),
        "num_tokens": tokens,
    }


def _width(shape: LinearShape) -> int:
    if shape.epilogue == "rope":
        return shape.num_heads * shape.head_dim
    return shape.n if shape.epilogue == "plain" else shape.n // 2


def _products(shape: LinearShape, at: dict[str, torch.Tensor], tokens: int) -> torch.Tensor:
    """x @ weight.T with all that comes before the epilogue, fp32."""
    rows = at["rows"].long() if shape.has_rows else slice(0, tokens)
    x = at["x"].float()[rows]
    if shape.activations:
        x = x * at["x_scale"][rows][:, None]
    if shape.num_squares:
        x = x * torch.rsqrt(at["squares"][rows].sum(-1, keepdim=True) / shape.k + _EPS)
    y = x @ at["dense"].t()
    return y + at["bias"].float() if shape.has_bias else y


def check_linear(
    run: Run, arch: Arch, shape: LinearShape, kernel: str, tokens: int, seed: int,
    split_k: int = 1, device: str = "cpu", tiles: Tiles | None = None,
) -> None:  # fmt: skip
    """Runs one launch, by tiles of its own or by `tiles`, and compares everything that it stores."""
    operands = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in _operands(shape, tokens, seed).items()
    }
    torch.set_default_device(device)
    try:
        cut = tiles or _tiles(shape, kernel, split_k)
        _launch_and_compare(run, arch, shape, kernel, tokens, cut, operands)
    finally:
        torch.set_default_device("cpu")


def _tiles(shape: LinearShape, kernel: str, split_k: int) -> Tiles:
    """Small ones, so that shapes have several of them."""
    if kernel == "one" and uses_mma(shape):
        block_n = 16 if shape.epilogue == "plain" else 8
        steps = -(-shape.k // (INT4_PARTS * shape.group_size)) // 2
        return Tiles(
            block_n, INT4_PARTS * shape.group_size, 2, prefetch=0, stages=max(1, min(2, steps))
        )
    if kernel == "one":
        block_k = INT4_PARTS * shape.group_size or 64
        return Tiles(block_n=2, block_k=block_k, num_warps=4, prefetch=2)
    block_k = INT4_PARTS * shape.group_size or 32
    return Tiles(block_n=16, block_k=block_k, num_warps=4, stages=2, split_k=split_k)


def _launch_and_compare(
    run: Run,
    arch: Arch,
    shape: LinearShape,
    kernel: str,
    tokens: int,
    tiles: Tiles,
    operands: Operands,
) -> None:
    at = {name: value for name, value in operands.items() if isinstance(value, torch.Tensor)}
    before = at["residual"].clone()
    if kernel == "one":
        variant, grid = one_token(shape, arch, tiles), (num_programs(shape, tiles), 1, 1)
    else:
        variant = few_tokens(shape, arch, tiles, 16)
        grid = (num_programs(shape, tiles), -(-tokens // 16), tiles.split_k)
        operands |= _scratch(shape, tiles, 16, tokens)
    programs = grid[0]
    if shape.has_gain:
        operands["squares_out"] = at["squares_out"] = torch.full((tokens, programs), float("nan"))
    run(variant, grid, operands)
    if shape.group_size and (kernel == "few" or uses_mma(shape)):
        # Tensor cores multiply values rounded to x's dtype; the other kernel for one token widens to fp32.
        at["dense"] = at["dense"].to(TORCH_DTYPES[shape.dtype]).float()
    y = _products(shape, at, tokens)
    if shape.epilogue == "rope":
        _check_rope(shape, at, y)
        return
    if shape.epilogue == "silu_mul":
        gate, up = y.chunk(2, -1)
        y = torch.nn.functional.silu(gate) * up
    if shape.has_residual:
        y = y + before.float()
    torch.testing.assert_close(at["out"].float(), y, atol=3e-2, rtol=2e-2)
    if shape.has_gain:
        h = at["out"].float()
        torch.testing.assert_close(
            at["normed"].float(), h * at["gain"].float(), atol=1e-2, rtol=1e-2
        )
        torch.testing.assert_close(at["squares_out"].sum(1), h.pow(2).sum(1), atol=1e-3, rtol=1e-4)


def _check_rope(shape: LinearShape, at: dict[str, torch.Tensor], y: torch.Tensor) -> None:
    h, k, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
    heads = y.view(-1, h + 2 * k, d)
    cos, sin = at["rope"][at["positions"].long()][:, None].chunk(2, -1)
    low, high = heads.chunk(2, -1)
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
    torch.testing.assert_close(at["out"].float(), turned[:, :h].flatten(1), atol=3e-2, rtol=2e-2)
    for cache, want in ((at["k_cache"], turned[:, h : h + k]), (at["v_cache"], heads[:, h + k :])):
        expected = torch.full_like(cache, 7.0)
        kept = at["slots"] >= 0
        blocks, offsets = at["slots"][kept].long() // 4, at["slots"][kept].long() % 4
        expected[blocks, :, offsets] = want[kept].to(cache.dtype)
        torch.testing.assert_close(cache, expected, atol=3e-2, rtol=2e-2)


LINEAR_SHAPES = {
    "plain": LinearShape(37, 96, "fp16", "fp16"),
    "bias": LinearShape(32, 128, "fp16", "fp16", has_bias=True),
    "norm_rows": LinearShape(50, 80, "fp16", "fp16", num_squares=5, eps=_EPS, has_rows=True),
    "residual": LinearShape(40, 64, "fp16", "fp16", has_residual=True, has_gain=True),
    "int8": LinearShape(33, 96, "fp16", "fp16", layout="int8_channel", has_bias=True),
    "fp8_residual": LinearShape(33, 96, "fp16", "fp16", layout="fp8_channel", has_residual=True),
    "int4": LinearShape(33, 160, "fp16", "fp16", layout="int4_group", group_size=32, has_bias=True),
    "int4_residual": LinearShape(
        50, 320, "fp16", "fp16", layout="int4_group", group_size=64, has_rows=True,
        has_residual=True, has_gain=True,
    ),
    "int4_silu_mul": LinearShape(
        70, 640, "fp16", "fp16", layout="int4_group", group_size=128, num_squares=5, eps=_EPS,
        epilogue="silu_mul",
    ),
    "int8_int8": LinearShape(
        33, 96, "fp16", "fp16", layout="int8_channel", activations="i8", has_bias=True,
        has_rows=True, has_residual=True,
    ),
    "silu_mul": LinearShape(70, 96, "fp16", "fp16", num_squares=5, eps=_EPS, epilogue="silu_mul"),
    "rope": LinearShape(
        8 * 8, 48, "fp16", "fp16", num_squares=5, eps=_EPS, has_bias=True, epilogue="rope",
        num_heads=4, num_kv_heads=2, head_dim=8, kv_dtype="fp16", block_tokens=4,
    ),
}  # fmt: skip

# By tensor cores, with the tiles that engines have: rings that wrap, x that ends inside a chunk, outputs that no tile
# divides, and few warps.
INT4_RING_SHAPES = {
    name: replace(shape, layout="int4_group", group_size=64)
    for name, shape in {
        "long": LinearShape(50, 10240, "bf16", "bf16", has_residual=True, has_gain=True),
        "tail": LinearShape(50, 10240 - 64, "bf16", "bf16", has_bias=True, has_residual=True),
        "silu_mul": LinearShape(
            84, 4096, "bf16", "bf16", num_squares=5, eps=_EPS, epilogue="silu_mul"
        ),
        "rope": LinearShape(
            5 * 8, 1536, "bf16", "bf16", num_squares=5, eps=_EPS, has_bias=True, epilogue="rope",
            num_heads=3, num_kv_heads=1, head_dim=8, kv_dtype="bf16", block_tokens=4,
        ),
        "odd": LinearShape(33, 11 * 256, "bf16", "bf16", has_rows=True),
    }.items()
}  # fmt: skip

ONE_TOKEN_SHAPES = [name for name, shape in LINEAR_SHAPES.items() if not shape.activations]


def _tensors(shape: LinearShape, tokens: int, device: str) -> dict[str, torch.Tensor]:
    made = _operands(shape, tokens, tokens)
    return {n: value.to(device) for n, value in made.items() if isinstance(value, torch.Tensor)}


def _scratch(
    shape: LinearShape, tiles: Tiles, block_m: int, tokens: int, device: str | None = None
) -> Operands:
    """Memory of the splits of K, by argument name."""
    sizes, dtypes = Sizes(tokens, tokens, tokens), (torch.float32, torch.int32)
    requests = zip(tiled_scratch(shape, tiles, block_m), dtypes, strict=False)
    return {
        request.name.removeprefix("linear_"): torch.zeros(
            request.num_bytes(sizes) // 4, dtype=dtype, device=device
        )
        for request, dtype in requests
    }


def check_many_int4(
    run: Run,
    arch: Arch,
    shape: LinearShape,
    tokens: int,
    split_k: int,
    block_m: int,
    device: str = "cuda",
) -> None:
    """Twice in a row, on a GPU: counters are left as they were, and nothing beyond the tokens is written."""
    whole, tokens_of_tile = many_int4_tiles(shape, MOST_CHOSEN_INT4_ROWS + 1)
    stages = whole.stages * tokens_of_tile // block_m
    tiles = replace(whole, stages=stages, split_k=split_k)
    at = _tensors(shape, tokens, device)
    out = torch.full((tokens + 5, shape.n), 7.0, dtype=TORCH_DTYPES[shape.dtype], device=device)
    operands: Operands = {**at, "out": out, "num_tokens": tokens}
    operands |= _scratch(shape, tiles, block_m, tokens, device)
    grid = many_int4_grid(shape, tiles, block_m, "tokens")(Sizes(tokens, tokens, tokens))
    for _ in range(2):
        run(many_int4(shape, arch, tiles, block_m), grid, operands)
    at["dense"] = at["dense"].to(out.dtype).float()
    torch.testing.assert_close(
        out[:tokens].float(), _products(shape, at, tokens), atol=3e-2, rtol=2e-2
    )
    assert bool((out[tokens:] == 7).all()), "rows beyond the tokens were written"


MANY_INT4_SHAPES = {
    f"many_int4_{group}": LinearShape(
        300, 48 * group, "bf16", "bf16", layout="int4_group", group_size=group, has_bias=has_bias
    )
    for group, has_bias in zip(INT4_GROUPS, (True, False, True), strict=True)
} | {
    "many_int4_padded": LinearShape(70, 7 * 64, "bf16", "bf16", layout="int4_group", group_size=64)
}


def check_dense(run: Run, arch: Arch, shape: LinearShape, device: str = "cpu") -> None:
    """The weight widened as a whole: what the library multiplies."""
    at = _tensors(shape, 1, device)
    values = torch.full((shape.n, shape.k), float("nan"), dtype=at["x"].dtype, device=device)
    if shape.layout == "int4_group":
        variant, grid = dense_int4(shape, arch), dense_int4_grid(shape)
    else:
        variant, grid = dense_int8(shape, arch), dense_int8_grid(shape)
    run(variant, grid, {**at, "out": values})
    torch.testing.assert_close(values.float(), at["dense"], atol=1e-6, rtol=2**-8)


def check_quantized_rows(
    run: Run, arch: Arch, columns: int, static_scale: float | None = None, device: str = "cpu"
) -> None:
    """Int8 rows are the formula's, code for code; a row of zeros stays one, and what is not finite is not lost."""
    torch.manual_seed(columns)
    x = torch.randn(7, columns, device=device).half()
    x[3] = 0
    x[5, 7], x[6, 0] = torch.nan, -torch.inf
    codes = torch.empty(7, columns, dtype=torch.int8, device=device)
    scale = torch.empty(7, device=device)
    variant = quantized_rows(columns, "fp16", "i8", arch, is_static=static_scale is not None)
    operands: Operands = {"x": x, "out": codes, "scale_out": scale, "scale": static_scale or 0.0}
    run(variant, (7, 1, 1), operands)
    assert scale[5:].isnan().all()
    x, codes, scale = x[:5], codes[:5], scale[:5]
    want, want_scale = int8_tokens(x.float())
    if static_scale is not None:
        want_scale = torch.full_like(want_scale, static_scale)
        want = (x.float() / static_scale).round().clamp(-127, 127).to(torch.int8)
        assert int(want.abs().max()) == 127, "nothing is clipped"
    torch.testing.assert_close(scale, want_scale.flatten().clamp(min=1e-12))
    torch.testing.assert_close(codes, want, atol=1, rtol=0)
    assert (codes != want).float().mean() < 0.01


DENSE_SHAPES = {"dense_int8": LinearShape(35, 2500, "fp16", "fp16", layout="int8_channel")} | {
    f"dense_int4_{group}": LinearShape(
        35, 5 * group, "fp16", "fp16", layout="int4_group", group_size=group
    )
    for group in INT4_GROUPS
}


# Shapes as long as real ones, and few rows of them: what tuning chooses from for 1 and for up to 16 tokens.
CANDIDATE_SHAPES = {
    "fp8_silu_mul": LinearShape(
        24, 4096, "fp16", "fp16", layout="fp8_channel", num_squares=5, eps=_EPS, epilogue="silu_mul"
    ),
    "fp8_residual": LinearShape(
        20, 4096, "fp16", "fp16", layout="fp8_channel", has_residual=True, has_gain=True
    ),
    "plain_silu_mul": LinearShape(
        24, 2048, "fp16", "fp16", num_squares=5, eps=_EPS, epilogue="silu_mul"
    ),
    "plain_residual": LinearShape(20, 2048, "fp16", "fp16", has_residual=True, has_gain=True),
    "int4_silu_mul": LinearShape(
        24, 1024, "fp16", "fp16", layout="int4_group", group_size=64, num_squares=5, eps=_EPS,
        epilogue="silu_mul",
    ),
}  # fmt: skip


def check_candidates(
    run: Run, arch: Arch, shape: LinearShape, tokens: int, device: str = "cpu"
) -> int:
    """Every candidate for so many tokens, at most 16, against the formula; gives how many there are."""
    ways = candidates(shape, arch, 1 if tokens == 1 else 16)
    for tiles, block_m in ways.values():
        kernel = "one" if block_m == 1 else "few"
        check_linear(run, arch, shape, kernel, tokens, seed=tokens, device=device, tiles=tiles)
    return len(ways)


def in_dtype(shape: LinearShape, dtype: str) -> LinearShape:
    """The shape with activations and cache of another dtype."""
    return replace(shape, dtype=dtype, out_dtype=dtype, kv_dtype=dtype)
