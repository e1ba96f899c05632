"""Law 2 on a GPU: kernels from machine code equal their formulas, at shapes that divide by nothing.

Also from sm_80 PTX, so that the paths without PDL and fp8 hardware are run somewhere.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kernels.attention.launch import (
    AttentionTiles,
    apart_tiles,
    decode_tiles,
    prefill_tiles,
    variant,
)
from kernels.linear.candidates import candidates
from kernels.linear.launch import LinearShape
from kernels.linear.launch_int4 import takes_wgmma
from kernels.linear.tiles import built_in_tiles
from shared.arch import ARCHES, Arch
from tests.gpu.device import DEVICE, Collector, NotYetCompiled, device_arch, library_of
from tests.kernels.attention_cases import (
    DECODE_LENGTHS,
    RAGGED_LENGTHS,
    attention_shape,
    check_attention,
)
from tests.kernels.linear_cases import (
    CANDIDATE_SHAPES,
    DENSE_SHAPES,
    INT4_RING_SHAPES,
    LINEAR_SHAPES,
    MANY_INT4_SHAPES,
    ONE_TOKEN_SHAPES,
    check_dense,
    check_linear,
    check_many_int4,
    check_quantized_rows,
    in_dtype,
)
from tests.kernels.row_cases import KERNELS, check_row, row_launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

Case = Callable[[Collector, Arch], None]


def _is_there(shape: LinearShape, arch: Arch) -> bool:
    return shape.layout != "fp8_channel" or arch.has_fp8


def _linear(shape: LinearShape, kernel: str, tokens: int, split_k: int) -> Case:
    def check(run: Collector, arch: Arch) -> None:
        if _is_there(shape, arch):
            check_linear(
                run, arch, shape, kernel, tokens, seed=tokens, split_k=split_k, device=DEVICE
            )

    return check


def _candidate(shape: LinearShape, tokens: int, place: int) -> Case:
    def check(run: Collector, arch: Arch) -> None:
        if not _is_there(shape, arch):
            return
        ways = list(candidates(shape, arch, 1 if tokens == 1 else 16).values())
        tiles, block_m = ways[min(place, len(ways) - 1)]
        kernel = "one" if block_m == 1 else "few"
        check_linear(run, arch, shape, kernel, tokens, seed=tokens, device=DEVICE, tiles=tiles)

    return check


def _shipped(shape: LinearShape) -> Case:
    """One token, with the tiles that engines have."""

    def check(run: Collector, arch: Arch) -> None:
        tiles, block_m = built_in_tiles(shape, arch, 1)
        assert block_m == 1
        check_linear(run, arch, shape, "one", 1, seed=1, device=DEVICE, tiles=tiles)

    return check


def _dense(shape: LinearShape) -> Case:
    return lambda run, arch: check_dense(run, arch, shape, device=DEVICE)


def _many_int4(shape: LinearShape, tokens: int, split_k: int, block_m: int) -> Case:
    def check(run: Collector, arch: Arch) -> None:
        if takes_wgmma(shape, arch):
            check_many_int4(run, arch, shape, tokens, split_k, block_m, DEVICE)

    return check


def _quantized_rows(scale: float | None) -> Case:
    return lambda run, arch: check_quantized_rows(run, arch, 257, scale, device=DEVICE)


def _attention(
    tiles: AttentionTiles,
    lengths: list[tuple[int, int]],
    others: tuple[AttentionTiles, ...] = (),
    **shape: object,
) -> Case:
    def check(run: Collector, arch: Arch) -> None:
        wanted = attention_shape(**shape)  # type: ignore[arg-type]
        run.expect(variant(wanted, arch, each) for each in (tiles, *others))
        check_attention(run, arch, wanted, tiles, lengths, seed=1, device=DEVICE, others=others)

    return check


def _row(layout: str, number: int) -> Case:
    def check(run: Collector, arch: Arch) -> None:
        if layout == "plain" or arch.has_fp8:
            check_row(run, row_launches(layout, arch)[number], device=DEVICE)

    return check


def _cases() -> dict[str, Case]:
    cases = {
        f"row-{layout}-{number}-{kernel}": _row(layout, number)
        for layout, kernels in KERNELS.items()
        for number, kernel in enumerate(kernels)
    }
    for name, shape in MANY_INT4_SHAPES.items():
        for tokens, split_k, block_m in (
            (1, 1, 128), (129, 2, 128), (300, 1, 128), (200, 1, 256), (600, 2, 256), (2305, 1, 256),
        ):  # fmt: skip
            case = _many_int4(shape, tokens, split_k, block_m)
            cases[f"{name}-{tokens}-{split_k}-{block_m}"] = case
    for name, shape in INT4_RING_SHAPES.items():
        cases[f"one-int4-ring-{name}"] = _shipped(shape)
    for dtype in ("bf16", "fp16"):
        for name, shape in LINEAR_SHAPES.items():
            if name in ONE_TOKEN_SHAPES:
                cases[f"one-{name}-{dtype}"] = _linear(in_dtype(shape, dtype), "one", 1, 1)
            for tokens, split_k in ((1, 1), (5, 2), (19, 2)):
                case = _linear(in_dtype(shape, dtype), "few", tokens, split_k)
                cases[f"few-{name}-{dtype}-{tokens}-{split_k}"] = case
        for name, shape in CANDIDATE_SHAPES.items():
            for tokens, place in itertools.product((1, 5), range(3)):
                case = _candidate(in_dtype(shape, dtype), tokens, place)
                cases[f"candidate-{name}-{dtype}-{tokens}-{place}"] = case
        for name, shape in DENSE_SHAPES.items():
            cases[f"{name}-{dtype}"] = _dense(in_dtype(shape, dtype))
        if dtype == "fp16":
            for scale in (None, 0.015):
                cases[f"rows-{scale}"] = _quantized_rows(scale)
        for window, soft_cap in ((0, 0.0), (37, 0.0), (0, 2.5), (37, 2.5)):
            options: dict[str, object] = {"window": window, "soft_cap": soft_cap, "dtype": dtype}
            for extra in (0, 6, 40):
                tiles = AttentionTiles(
                    1, 16, extra, min_part=32, is_decode=True, is_early=extra > 6
                )
                case = _attention(tiles, DECODE_LENGTHS, **options)
                cases[f"decode-{dtype}-{window}-{soft_cap}-{extra}"] = case
                case = _attention(
                    AttentionTiles(4, 16, extra, min_part=32), RAGGED_LENGTHS, **options
                )
                cases[f"ragged-{dtype}-{window}-{soft_cap}-{extra}"] = case
        real = attention_shape(heads=8, head_dim=128, dtype=dtype)
        sizes: dict[str, object] = {"heads": 8, "head_dim": 128, "dtype": dtype}
        lengths = [(1, 1), (1, 4097), (1, 513)]
        long = [*lengths, (1, 40000), (1, 90)]
        lone, few, many = (decode_tiles(real, ARCHES["sm_80"], most) for most in (1, 3, 512))
        cases[f"decode-shipped-lone-{dtype}"] = _attention(lone, [(1, 4097)], **sizes)
        cases[f"decode-shipped-{dtype}"] = _attention(few, long, **sizes)
        cases[f"decode-shipped-many-{dtype}"] = _attention(many, long, **sizes)
        prefill = prefill_tiles(real, ARCHES["sm_80"])
        ragged = [(1, 700), (513, 513), (130, 1100), (1, 1), (1, 40000), (7, 9000)]
        cases[f"prefill-shipped-{dtype}"] = _attention(prefill, ragged, **sizes)
        for kv_dtype in ("fp8e4nv", "i8"):
            kept = {**sizes, "kv_dtype": kv_dtype}
            cases[f"decode-{kv_dtype}-{dtype}"] = _attention(few, [*lengths, (1, 32768)], **kept)
            cases[f"decode-many-{kv_dtype}-{dtype}"] = _attention(many, long, **kept)
            cases[f"decode-lone-{kv_dtype}-{dtype}"] = _attention(lone, [(1, 4097)], **kept)
            cases[f"prefill-{kv_dtype}-{dtype}"] = _attention(prefill, ragged, **kept)
            odd: dict[str, object] = {"window": 37, "soft_cap": 2.5, "dtype": dtype}
            odd["kv_dtype"] = kv_dtype
            tiles = AttentionTiles(4, 16)
            cases[f"ragged-{kv_dtype}-{dtype}"] = _attention(tiles, RAGGED_LENGTHS, **odd)
            alone = AttentionTiles(1, 16, 6, min_part=32, is_decode=True, takes="one")
            case = _attention(
                alone, RAGGED_LENGTHS, (replace(tiles, takes="several", reads_new=True),), **odd
            )
            cases[f"apart-{kv_dtype}-{dtype}"] = case
            case = _attention(
                replace(many, takes="one"), ragged, (apart_tiles(real, ARCHES["sm_80"]),), **kept
            )
            cases[f"apart-shipped-{kv_dtype}-{dtype}"] = case
    return cases


CASES = _cases()


def collected(arch: Arch) -> Collector:
    """What all cases launch on `arch`."""
    run = Collector()
    for case in CASES.values():
        with contextlib.suppress(NotYetCompiled):
            case(run, arch)
    return run


@pytest.fixture(scope="module", params=["own", "sm_80"])
def compiled(request: pytest.FixtureRequest) -> tuple[Collector, Arch]:
    """All cases' kernels, for the device's own arch or as sm_80 PTX."""
    arch = device_arch() if request.param == "own" else ARCHES["sm_80"]
    run = collected(arch)
    run.library = library_of(run.variants, arch)
    assert run.library.uses_ptx == (request.param != "own")
    return run, arch


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_formula(name: str, compiled: tuple[Collector, Arch]) -> None:
    run, arch = compiled
    CASES[name](run, arch)
