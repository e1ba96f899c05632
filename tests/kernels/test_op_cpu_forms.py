"""Law 2 on a CPU: an op's fast form equals its reference, at shapes that divide by nothing."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.batch import StepBatch
from kernels.cpu import CPU_FORMS, bind_node
from kernels.cpu_form import CpuTarget, PackedWeight
from kernels.cpu_jit import multiplies_bytes
from kernels.linear.cpu import pack_bytes, padded_rows
from kernels.linear.layouts import LAYOUTS
from kernels.ops import OPS
from shared.ir import Attr, Graph, Node, TensorSpec, WeightSpec

HAS_VNNI = multiplies_bytes()
FP32 = CpuTarget(torch.float32, torch.float32, False, False, "")
TARGETS = {
    "fp32": FP32,
    "fp32 oneDNN": replace(FP32, has_mkldnn=bool(torch._C._has_mkldnn)),
    "fp32, bf16 cache, FBGEMM": CpuTarget(
        torch.float32, torch.bfloat16, "fbgemm" in torch.backends.quantized.supported_engines,
        bool(torch._C._has_mkldnn), "",
    ),
    "bf16": CpuTarget(
        torch.bfloat16, torch.bfloat16, False,
        bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), "",
    ),
    "bf16, VNNI": CpuTarget(
        torch.bfloat16, torch.bfloat16, False,
        bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()), "", HAS_VNNI,
    ),
}  # fmt: skip
BY_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
INV_FREQ = (1.0, 0.31, 0.07, 0.009)
HEADS: dict[str, Attr] = {"layer": 1, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8}


def tolerance(target: CpuTarget) -> float:
    """Relative to values of about 1: half a dozen roundings of the narrowest dtype."""
    return 2e-5 if target.kv_dtype == torch.float32 else 0.04


def packed(weight: torch.Tensor, layout: str, dtype: str, group_size: int = 0) -> PackedWeight:
    name = ("w",)
    spec = WeightSpec(tuple(weight.shape), name, (len(weight),), dtype, layout, group_size)
    return PackedWeight(spec, LAYOUTS[layout].pack(weight.to(getattr(torch, dtype)), group_size))


def ragged_batch(
    sequences: list[tuple[int, int]], kv_dtype: torch.dtype, *, scattered: bool, seed: int = 0
) -> StepBatch:
    """A step of (tokens cached before, tokens computed), over caches full of noise."""
    generator = torch.Generator().manual_seed(seed)
    block_tokens, num_blocks = 4, 200
    ids = torch.randperm(num_blocks, generator=generator) if scattered else torch.arange(num_blocks)
    blocks = [-(-(start + count) // block_tokens) for start, count in sequences]
    tables = torch.full((len(sequences), max(blocks) + 1), 7, dtype=torch.int32)
    positions, slots = [], []
    for row, (start, count) in enumerate(sequences):
        own = ids[sum(blocks[:row]) :][: blocks[row]]
        tables[row, : blocks[row]] = own
        at = torch.arange(start, start + count)
        positions.append(at)
        slots.append(own[at // block_tokens] * block_tokens + at % block_tokens)
    counts = [count for _, count in sequences]
    shape = (num_blocks, 2, block_tokens, 8)
    return StepBatch(
        positions_T=torch.cat(positions).int(),
        slot_mapping_T=torch.cat(slots).int(),
        block_tables_SB=tables,
        seq_lens_S=torch.tensor([sum(s) for s in sequences]).int(),
        query_start_S1=torch.tensor([0, *counts]).cumsum(0).int(),
        logit_rows_R=torch.tensor([len(torch.cat(positions)) - 1, 0]).int(),
        kv_caches=[
            (
                torch.randn(shape, generator=generator).to(kv_dtype),
                torch.randn(shape, generator=generator).to(kv_dtype),
            )
            for _ in range(2)
        ],
    )


def run_both(
    node: Node,
    inputs: list[torch.Tensor],
    weights: dict[str, PackedWeight],
    target: CpuTarget,
    batch: StepBatch,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs of the reference, in fp64 from the same operands, and of the form."""
    dense = {role: weight.dense().double() for role, weight in weights.items()}
    twin = replace(
        batch,
        kv_caches=[(k.double(), v.double()) for k, v in batch.kv_caches],
        memo={},
    )
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = OPS[node.op].reference(node, wide, dense, twin)
    found = bind_node(node, weights, target)(*[x.clone() for x in inputs], batch)
    batch.memo["reference_caches"] = twin.kv_caches
    return list(expected), list(found if isinstance(found, tuple) else [found])


@BY_TARGET
@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm_equals_its_reference(
    target: CpuTarget, num_tokens: int, has_residual: bool
) -> None:
    torch.manual_seed(0)
    dtype = target.activation_dtype
    attrs: dict[str, Attr] = {"eps": 1e-5, "residual": has_residual, "head_dim": 0}
    node = Node("rms_norm", (), (), attrs=attrs)
    inputs = [torch.randn(num_tokens, 37).to(dtype) for _ in range(1 + has_residual)]
    weights = {"weight": packed(torch.randn(37), "plain", target.name)}
    node = replace(node, outputs=("y", "s")[: 1 + has_residual])
    expected, found = run_both(
        node, inputs, weights, target, ragged_batch([(0, 1)], dtype, scattered=False)
    )
    for e, f in zip(expected, found, strict=True):
        assert f.dtype == dtype
        torch.testing.assert_close(f.double(), e, rtol=tolerance(target), atol=tolerance(target))


@BY_TARGET
def test_rms_norm_of_heads_equals_its_reference(target: CpuTarget) -> None:
    torch.manual_seed(0)
    attrs: dict[str, Attr] = {"eps": 1e-5, "residual": False, "head_dim": 8}
    node = Node("rms_norm", (), ("y",), attrs=attrs)
    x = torch.randn(5, 24).to(target.activation_dtype)
    weights = {"weight": packed(torch.randn(8), "plain", target.name)}
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(node, [x], weights, target, batch)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


LINEARS = [
    ("plain", 37, 51, 0),
    ("int8_channel", 48, 64, 0),
    ("int8_channel", 48, 192, 0),
    ("int8_channel", 37, 51, 0),
    ("int8_group", 48, 128, 32),
    ("int8_group", 37, 128, 64),
    ("int8_group", 48, 64, 16),
    ("fp8_channel", 48, 64, 0),
    ("int4_group", 48, 128, 32),
    ("int4_group", 37, 128, 64),
    ("int4_group", 48, 192, 64),
    ("int4_group", 48, 256, 128),
]


@BY_TARGET
@pytest.mark.parametrize(("layout", "rows", "columns", "group"), LINEARS)
@pytest.mark.parametrize("num_tokens", [1, 5, 16, 33])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_equals_its_reference(
    target: CpuTarget,
    layout: str,
    rows: int,
    columns: int,
    group: int,
    num_tokens: int,
    has_bias: bool,
) -> None:
    torch.manual_seed(rows + num_tokens)
    # An engine's weights are fp32 only where all of it is.
    dtype = "float32" if target.kv_dtype == torch.float32 else "bfloat16"
    weight = torch.randn(rows, columns) / math.sqrt(columns)
    weights = {"weight": packed(weight, layout, dtype, group)}
    if has_bias:
        weights["bias"] = packed(torch.randn(rows), "plain", dtype)
    x = torch.randn(num_tokens, columns).to(target.activation_dtype)
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(Node("linear", (), ("y",)), [x], weights, target, batch)
    assert found.dtype == target.activation_dtype
    # Weights keep at least fp16's bits where activations are fp32, but for int4 at few rows.
    is_bf16 = target.activation_dtype == torch.bfloat16 or layout == "int4_group"
    limit = tolerance(target) if is_bf16 else 2e-3
    limit = 2e-5 if dtype == "float32" else limit
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)


@BY_TARGET
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (37, 51), (1, 7), (70, 52)])
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 110])
def test_linear_of_int8_activations_equals_its_reference(
    target: CpuTarget, rows: int, columns: int, num_tokens: int
) -> None:
    """Products of integers are exact: nothing but the result's own rounding differs."""
    torch.manual_seed(rows + num_tokens)
    weights = {
        "weight": packed(torch.randn(rows, columns), "int8_channel", "bfloat16"),
        "bias": packed(torch.randn(rows), "plain", "bfloat16"),
    }
    x = torch.randn(num_tokens, columns).to(target.activation_dtype)
    x[0] = 0.0
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    node = Node("linear", (), ("y",), attrs={"activations": "int8"})
    (expected,), (found,) = run_both(node, [x], weights, target, batch)
    limit = 0.01 if target.activation_dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit * columns**0.5)


@pytest.mark.skipif(not HAS_VNNI, reason="this CPU does not multiply bytes")
@pytest.mark.parametrize(
    ("layout", "group"), [("int8_channel", 0), ("int4_group", 64), ("int4_group", 128)]
)
class TestProductsOfBytes:
    """Weights of 8 and 4 bits times activations of two bytes."""

    def _stored(self, weight_NK: torch.Tensor, layout: str, group: int) -> PackedWeight:
        """With scales as schemes choose them."""
        weight = packed(weight_NK, layout, "bfloat16", group)
        rounded = {
            role: part.bfloat16().float() if part.is_floating_point() else part
            for role, part in weight.tensors.items()
        }
        return PackedWeight(weight.spec, rounded)

    def _product(self, x_TK: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        batch = ragged_batch([(0, 1)], torch.bfloat16, scattered=False)
        form = bind_node(Node("linear", (), ("y",)), {"weight": weight}, TARGETS["bf16, VNNI"])
        found: torch.Tensor = form(x_TK, batch)
        return found

    @pytest.mark.parametrize("num_tokens", [1, 7])
    def test_lose_next_to_nothing_beside_an_outlier(
        self, layout: str, group: int, num_tokens: int
    ) -> None:
        """A unit of a value's last place, and 7 standard deviations of what rounding to 15 bits does to a sum."""
        torch.manual_seed(num_tokens)
        x = torch.randn(num_tokens, 640).bfloat16()
        x[:, 5] = 60.0
        weight = self._stored(torch.randn(48, 640) + 0.5, layout, group)
        dense = weight.dense().double()
        expected, found = x.double() @ dense.T, self._product(x, weight).double()
        allowed = 2**-8 * expected.abs() + 2**-14 * 60.0 * dense.norm(dim=1)
        assert bool(((found - expected).abs() <= allowed).all())

    def test_are_exact_at_the_ends_of_what_bytes_hold(self, layout: str, group: int) -> None:
        for columns in (128, 1 << 16) if layout == "int8_channel" else (128, 1 << 10):
            x = torch.full((2, columns), 3.0).bfloat16()
            x[1] = -3.0
            weight = torch.ones(4, columns)
            weight[1] = -1.0
            stored = self._stored(weight, layout, group)
            scale = stored.dense()[0, 0]
            row = torch.tensor([1.0, -1.0, 1.0, 1.0]) * (3.0 * columns * scale)
            assert torch.equal(self._product(x, stored), torch.stack((row, -row)).bfloat16())

    def test_of_zeros_are_zero_and_of_what_is_no_number_none(self, layout: str, group: int) -> None:
        x = torch.zeros(4, 256).bfloat16()
        x[1, 3], x[2, 4], x[3, 5] = torch.nan, torch.inf, 1.0
        found = self._product(x, self._stored(torch.randn(8, 256), layout, group))
        assert torch.equal(found[0], torch.zeros(8).bfloat16())
        assert bool(found[1:3].isnan().all())
        assert bool(found[3].isfinite().all())

    def test_of_a_row_do_not_depend_on_its_neighbours(self, layout: str, group: int) -> None:
        torch.manual_seed(0)
        x = torch.randn(5, 256).bfloat16()
        weight = self._stored(torch.randn(48, 256), layout, group)
        together = self._product(x, weight)
        for row in range(5):
            assert torch.equal(self._product(x[row : row + 1], weight)[0], together[row])


@pytest.mark.skipif(not HAS_VNNI, reason="this CPU does not multiply bytes")
@pytest.mark.parametrize("activations", ["", "int8"])
def test_rows_of_int8_weights_do_not_depend_on_how_many_there_are(activations: str) -> None:
    """Sums are exact: a token's values are the same bits in any step, decode or prompt."""
    torch.manual_seed(0)
    attrs: dict[str, Attr] = {"activations": activations} if activations else {}
    weights = {"weight": packed(torch.randn(70, 68), "int8_channel", "bfloat16")}
    form = bind_node(Node("linear", (), ("y",), attrs=attrs), weights, TARGETS["bf16, VNNI"])
    batch = ragged_batch([(0, 1)], torch.bfloat16, scattered=False)
    x = torch.randn(203, 68).bfloat16()
    together = form(x, batch)
    for first, count in ((0, 1), (1, 2), (94, 3), (95, 7), (0, 100), (101, 102)):
        assert torch.equal(form(x[first : first + count], batch), together[first : first + count])


def test_packed_bytes_stand_where_their_kernel_reads_them() -> None:
    torch.manual_seed(0)
    codes = torch.randint(-128, 128, (37, 12), dtype=torch.int8)
    panels = pack_bytes(codes)
    assert panels.shape == (2, 3, 32, 4)
    for n in range(37):
        found = panels[n // 32, :, n % 32].flatten()
        assert torch.equal(found.int() - 128, codes[n].int())


class _RowsSeen(TorchDispatchMode):
    """Notes for how many rows torch is asked to multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: dict[str, set[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2:
            self.by_operator.setdefault(func.name(), set()).add(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("target", "activations", "operator"),
    [
        ("fp32 oneDNN", "", "mkldnn::_linear_pointwise"),
        ("bf16", "", "mkldnn::_linear_pointwise"),
        ("bf16", "int8", "aten::_int_mm"),
    ],
)
def test_onednn_is_asked_for_few_numbers_of_rows(
    target: str, activations: str, operator: str
) -> None:
    """It keeps a compiled product, half a megabyte, for every number that it has seen."""
    of, layout = TARGETS[target], "int8_channel" if activations else "plain"
    if operator.startswith("mkldnn") and not of.has_mkldnn:
        pytest.skip("this CPU has no such product")
    dtype = "float32" if of.kv_dtype == torch.float32 else "bfloat16"
    attrs: dict[str, Attr] = {"activations": activations} if activations else {}
    run = bind_node(
        Node("linear", (), ("y",), attrs=attrs),
        {"weight": packed(torch.randn(48, 64), layout, dtype)},
        of,
    )
    batch = ragged_batch([(0, 1)], of.kv_dtype, scattered=False)
    with _RowsSeen() as seen:
        for num_tokens in range(1, 513):
            x = torch.zeros(num_tokens, 64, dtype=of.activation_dtype)
            assert run(x, batch).shape == (num_tokens, 48)
    found = seen.by_operator[operator]
    assert max(found) == 512
    assert len(found) <= 60


@pytest.mark.parametrize("num_rows", [*range(1, 70), 127, 128, 129, 500, 512, 513, 8191])
def test_padding_is_an_eighth_of_the_rows_or_three(num_rows: int) -> None:
    padded = padded_rows(num_rows)
    assert num_rows <= padded <= num_rows + max(3, num_rows // 8)
    assert padded_rows(padded) == padded


def test_int8_groups_lose_nothing_when_inputs_have_a_mean() -> None:
    """An int8 is multiplied as two nibbles, each product rounded to bf16: neither may be large where they cancel."""
    torch.manual_seed(0)
    target = TARGETS["bf16"]
    weights = {"weight": packed(torch.randn(64, 1024) / 32, "int8_group", "bfloat16", 32)}
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    x = (5 + torch.randn(1, 1024)).bfloat16()
    (expected,), (found,) = run_both(Node("linear", (), ("y",)), [x], weights, target, batch)
    error = (found.double() - expected).norm() / expected.norm()
    assert float(error) <= 0.004  # 0.0097 where they cancel


def test_linear_keeps_weights_that_fp16_cannot_hold() -> None:
    target = TARGETS["fp32, bf16 cache, FBGEMM"]
    weight = torch.tensor([[1e5, 1.0], [-3e7, 2.0]])
    weights = {"weight": packed(weight, "plain", "bfloat16")}
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    x = torch.tensor([[1.0, 1.0]])
    (expected,), (found,) = run_both(Node("linear", (), ("y",)), [x], weights, target, batch)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@BY_TARGET
@pytest.mark.parametrize("layout", ["plain", "int8_channel", "int8_group", "int4_group"])
def test_embedding_equals_its_reference(target: CpuTarget, layout: str) -> None:
    torch.manual_seed(0)
    weights = {"weight": packed(torch.randn(19, 64), layout, target.name, 32)}
    node = Node("embedding", (), ("x",), attrs={"dtype": target.name})
    token_ids = torch.tensor([18, 0, 3, 3], dtype=torch.int32)
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(node, [token_ids], weights, target, batch)
    assert found.dtype == target.activation_dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_silu_mul_equals_its_reference(target: CpuTarget, num_tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 2 * 13).to(target.activation_dtype)
    batch = ragged_batch([(0, 1)], target.kv_dtype, scattered=False)
    (expected,), (found,) = run_both(Node("silu_mul", (), ("y",)), [x], {}, target, batch)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


def test_select_rows_equals_its_reference() -> None:
    batch = ragged_batch([(0, 5)], torch.float32, scattered=False)
    x = torch.randn(5, 3)
    (expected,), (found,) = run_both(Node("select_rows", (), ("y",)), [x], {}, FP32, batch)
    assert torch.equal(found.double(), expected)


SEQUENCES = {
    "one decode": [(9, 1)],
    "one first token": [(0, 1)],
    "decodes of one length": [(9, 1)] * 3,
    "ragged decodes": [(0, 1), (300, 1), (9, 1), (30, 1)],
    "one whole prompt": [(0, 11)],
    "whole prompts": [(0, 5), (0, 11), (0, 5)],
    "chunks": [(7, 6), (32, 3), (7, 6)],
    "mixed": [(9, 1), (0, 6), (41, 1), (13, 5), (0, 6)],
    "more than a tile": [(150, 75), (0, 139), (61, 33)],
}


@BY_TARGET
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("scattered", [False, True], ids=["in a row", "scattered"])
@pytest.mark.parametrize(
    ("window", "soft_cap"), [(0, 0.0), (5, 0.0), (40, 0.0), (0, 1.5), (5, 1.5)]
)
def test_attention_equals_its_reference(
    target: CpuTarget,
    sequences: list[tuple[int, int]],
    scattered: bool,
    window: int,
    soft_cap: float,
) -> None:
    batch = ragged_batch(sequences, target.kv_dtype, scattered=scattered)
    attrs: dict[str, Attr] = {**HEADS, "scale": 0.4, "window": window, "soft_cap": soft_cap}
    node = Node("attention", (), ("y",), attrs=attrs)
    q = torch.randn(len(batch.positions_T), 48, generator=torch.Generator().manual_seed(1))
    q = q.to(target.activation_dtype)
    # Stale blocks hold anything finite; what is past a table's end is undefined.
    (expected,), (found,) = run_both(node, [q, torch.empty(0)], {}, target, batch)
    assert found.dtype == target.activation_dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (1, 40), (5, 96)])
def test_attention_of_wide_heads_equals_its_reference(
    target: CpuTarget, heads: int, head_dim: int
) -> None:
    """Of head dims that fill their vectors and that do not, and of groups that do not divide a block of rows."""
    generator = torch.Generator().manual_seed(heads)
    batch = ragged_batch([(70, 70), (0, 1), (0, 35), (129, 1)], target.kv_dtype, scattered=True)
    shape = (*batch.kv_caches[0][0].shape[:3], head_dim)
    batch.kv_caches = [
        (
            torch.randn(shape, generator=generator).to(target.kv_dtype),
            torch.randn(shape, generator=generator).to(target.kv_dtype),
        )
        for _ in range(2)
    ]
    how: dict[str, Attr] = {"scale": head_dim**-0.5, "window": 0, "soft_cap": 0.0, "layer": 1}
    sizes: dict[str, Attr] = {"num_heads": 2 * heads, "num_kv_heads": 2, "head_dim": head_dim}
    q = torch.randn(len(batch.positions_T), 2 * heads * head_dim, generator=generator)
    node = Node("attention", (), ("y",), attrs={**how, **sizes})
    inputs = [q.to(target.activation_dtype), torch.empty(0)]
    (expected,), (found,) = run_both(node, inputs, {}, target, batch)
    torch.testing.assert_close(
        found.double(), expected, rtol=tolerance(target), atol=tolerance(target)
    )


@BY_TARGET
@pytest.mark.parametrize("num_queries", [1, 70])
def test_attention_to_a_key_that_is_no_number_is_none(target: CpuTarget, num_queries: int) -> None:
    """It must reach the logits, where it ends its request, and no other sequence."""
    batch = ragged_batch([(5, num_queries), (3, num_queries)], target.kv_dtype, scattered=False)
    keys = batch.kv_caches[1][0]
    keys[batch.block_tables_SB[0, 0], :, 2] = torch.nan
    node = Node(
        "attention", (), ("y",), attrs={**HEADS, "scale": 0.4, "window": 0, "soft_cap": 0.0}
    )
    q = torch.randn(2 * num_queries, 48).to(target.activation_dtype)
    found = bind_node(node, {}, target)(q, torch.empty(0), batch)
    assert bool(found[:num_queries].isnan().all())
    assert bool(found[num_queries:].isfinite().all())


@BY_TARGET
@pytest.mark.parametrize("sequences", [[(9, 1)], [(3, 1), (0, 5), (13, 3)]], ids=str)
@pytest.mark.parametrize("has_norm", [False, True])
def test_qkv_rope_write_equals_its_reference(
    target: CpuTarget, sequences: list[tuple[int, int]], has_norm: bool
) -> None:
    torch.manual_seed(0)
    batch = ragged_batch(sequences, target.kv_dtype, scattered=True)
    attrs: dict[str, Attr] = {
        **HEADS, "inv_freq": INV_FREQ, "attention_scaling": 1.25, "eps": 1e-6,
    }  # fmt: skip
    weights = {}
    if has_norm:
        weights = {
            r: packed(torch.rand(8) + 0.5, "plain", target.name) for r in ("q_norm", "k_norm")
        }
    node = Node("qkv_rope_write", (), ("q", "kv"), attrs=attrs)
    qkv = torch.randn(len(batch.positions_T), 80).to(target.activation_dtype)
    before = [cache.clone() for cache in batch.kv_caches[0]]
    expected, found = run_both(node, [qkv], weights, target, batch)
    limit = tolerance(target)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=limit, atol=limit)
    slots = batch.slot_mapping_T.long()
    k, v = (c.transpose(1, 2).reshape(-1, 2, 8)[slots] for c in batch.memo["reference_caches"][1])
    own_k, own_v = (c.transpose(1, 2).reshape(-1, 2, 8)[slots].double() for c in batch.kv_caches[1])
    torch.testing.assert_close(own_k, k, rtol=limit, atol=limit)
    torch.testing.assert_close(own_v, v, rtol=limit, atol=limit)
    assert all(map(torch.equal, before, batch.kv_caches[0])), "another layer's cache was written"


def test_every_op_gives_the_specs_that_it_infers() -> None:
    """Every row of OPS is run on a graph that holds all of them."""
    f, w = "float32", WeightSpec
    heads: dict[str, Attr] = {**HEADS, "layer": 0}
    rope: dict[str, Attr] = {"head_dim": 8, "inv_freq": INV_FREQ, "attention_scaling": 1.0}
    attention: dict[str, Attr] = {**heads, "scale": 0.3, "window": 0, "soft_cap": 0.0}
    norm: dict[str, Attr] = {"eps": 1e-5, "residual": False, "head_dim": 0}
    nodes = (
        Node("embedding", ("token_ids",), ("x",), {"weight": "e"}, {"dtype": f}),
        Node("linear", ("x",), ("qkv",), {"weight": "wqkv", "bias": "bqkv"}),
        Node("split", ("qkv",), ("q", "k", "v"), {}, {"sizes": (48, 16, 16)}),
        Node("rope", ("q",), ("q2",), {}, rope),
        Node("rope", ("k",), ("k2",), {}, rope),
        Node("kv_write", ("k2", "v"), ("kv",), {}, heads),
        Node("attention", ("q2", "kv"), ("a",), {}, attention),
        Node("qkv_rope_write", ("qkv",), ("q3", "kv3"), {}, {**heads, **rope, "eps": 0.0}),
        Node("attention", ("q3", "kv3"), ("a3",), {}, attention),
        Node("add", ("a", "a3"), ("sum",)),
        Node("silu", ("sum",), ("act",)),
        Node("mul", ("act", "sum"), ("product",)),
        Node("rms_norm", ("product",), ("n",), {"weight": "g"}, norm),
        Node("silu_mul", ("n",), ("half",)),
        Node("select_rows", ("half",), ("last",)),
    )
    weights = {
        "e": w((11, 48), ("e",), (11,), f),
        "wqkv": w((80, 48), ("wqkv",), (80,), f),
        "bqkv": w((80,), ("bqkv",), (80,), f),
        "g": w((48,), ("g",), (48,), f),
    }
    inputs = {"token_ids": TensorSpec(("T",), "int32")}
    graph = Graph(inputs, nodes, ("last",), weights, {})
    assert {node.op for node in nodes} == set(OPS), "an op is missing here"
    assert set(CPU_FORMS) <= set(OPS)
    graph.verify(OPS)
    specs = graph.infer(OPS)
    batch = ragged_batch([(0, 3)], torch.float32, scattered=False)
    batch.kv_caches = [batch.kv_caches[0]]
    dims = {"T": 3, "R": 2}
    values = {"token_ids": torch.tensor([1, 2, 10], dtype=torch.int32)}
    dense = {name: torch.randn(spec.shape) for name, spec in weights.items()}
    for node in nodes:
        outputs = OPS[node.op].reference(
            node,
            [values[n] for n in node.inputs],
            {r: dense[n] for r, n in node.weights.items()},
            batch,
        )
        for name, value in zip(node.outputs, outputs, strict=True):
            values[name] = value
            spec = specs[name]
            if spec.dtype != "effect":
                assert list(value.shape) == [dims.get(str(d), d) for d in spec.dims], node
                assert str(value.dtype) == f"torch.{spec.dtype}", node
    assert torch.allclose(values["a"], values["a3"], atol=1e-6), "fused and unfused differ"


@pytest.mark.parametrize(
    ("node", "dims"),
    [
        (Node("linear", ("x",), ("y",), {"weight": "w"}), ("T", 7)),
        (Node("split", ("x",), ("a", "b"), {}, {"sizes": (3, 3)}), ("T", 7)),
        (Node("silu_mul", ("x",), ("y",)), ("T", 7)),
        (Node("select_rows", ("x",), ("y",)), ("R", 8)),
        (Node("silu", ("x", "x"), ("y",)), ("T", 8)),
        (
            Node(
                "rope",
                ("x",),
                ("y",),
                {},
                {"head_dim": 8, "inv_freq": (1.0,), "attention_scaling": 1.0},
            ),
            ("T", 8),
        ),
    ],
    ids=lambda value: value.op if isinstance(value, Node) else str(value),
)
def test_contradictory_node_is_refused(node: Node, dims: tuple[int | str, ...]) -> None:
    weights = {"weight": WeightSpec((5, 8), ("w",), (5,), "float32")} if node.weights else {}
    inputs = (TensorSpec(dims, "float32"),) * len(node.inputs)
    with pytest.raises(AssertionError):
        OPS[node.op].infer(node, inputs, weights)
