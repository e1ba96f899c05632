"""Law 2 on a CPU for linears: products of any layout equal their reference, in any number of rows."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpu import bind_node
from kernels.cpu_form import CpuTarget, PackedWeight
from kernels.linear.cpu import pack_bytes, padded_rows
from shared.ir import Attr, Node
from tests.kernels.cpu_targets import (
    BY_TARGET,
    HAS_VNNI,
    TARGETS,
    packed,
    ragged_batch,
    run_both,
    tolerance,
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
