"""Layouts say exactly what their stored values stand for, and pack the same bytes everywhere."""

import pytest
import torch

from kernels.linear.layouts import (
    INT4_GROUPS,
    INT8_GROUPS,
    LAYOUTS,
    int4_levels,
    pack_int4_levels,
)

CASES = [("plain", 0), ("int8_channel", 0), ("fp8_channel", 0)]
CASES += [("int8_group", group) for group in INT8_GROUPS]
CASES += [("int4_group", group) for group in INT4_GROUPS]


def _weight(num_rows: int = 37, num_columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_columns, generator=generator) * 0.05 + 0.01


@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_layout_stores_what_its_roles_say(name: str, group_size: int) -> None:
    weight = _weight()
    packed = LAYOUTS[name].pack(weight, group_size)
    found = {r: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for r, t in packed.items()}
    assert found == LAYOUTS[name].roles((37, 256), "float32", group_size)


@pytest.mark.parametrize(
    ("name", "group_size", "max_error"),
    [
        ("plain", 0, 0.0),
        ("int8_channel", 0, 0.012),
        ("fp8_channel", 0, 0.03),
        ("int8_group", 16, 0.008),
        ("int8_group", 32, 0.008),
        ("int4_group", 32, 0.08),
        ("int4_group", 64, 0.09),
        ("int4_group", 128, 0.1),
    ],
)
def test_unpacked_weight_is_near_the_packed_one(
    name: str, group_size: int, max_error: float
) -> None:
    weight = _weight()
    unpacked = LAYOUTS[name].unpack(LAYOUTS[name].pack(weight, group_size))
    assert float((unpacked - weight).norm() / weight.norm()) <= max_error


@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_rows_packed_in_pieces_are_the_same_bytes(name: str, group_size: int) -> None:
    """Parts of a fused weight are packed one by one."""
    weight = _weight()
    whole = LAYOUTS[name].pack(weight, group_size)
    pieces = [LAYOUTS[name].pack(part, group_size) for part in torch.split(weight, [5, 31, 1])]
    for role, tensor in whole.items():
        joined = torch.cat([piece[role] for piece in pieces])
        assert torch.equal(joined.view(torch.uint8), tensor.view(torch.uint8)), role


@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_zero_rows_come_back_as_zeros(name: str, group_size: int) -> None:
    weight = _weight()
    weight[3] = 0.0
    unpacked = LAYOUTS[name].unpack(LAYOUTS[name].pack(weight, group_size))
    assert torch.equal(unpacked[3], torch.zeros(256))


def test_int8_is_exact_when_values_are_multiples_of_a_bf16_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(-127, 128, (9, 50), generator=generator)
    levels[:, 0] = 127
    weight = levels * 2.0 ** torch.arange(-6, 3)[:, None]
    packed = LAYOUTS["int8_channel"].pack(weight, 0)
    assert torch.equal(packed["weight"], levels.to(torch.int8))
    assert torch.equal(LAYOUTS["int8_channel"].unpack(packed), weight)


@pytest.mark.parametrize("group_size", INT4_GROUPS)
def test_int4_is_exact_when_values_lie_on_sixteen_levels(group_size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    nibbles = torch.randint(0, 16, (6, 256 // group_size, group_size), generator=generator)
    nibbles[..., 0], nibbles[..., 1] = 0, 15
    scale = 2.0 ** torch.randint(-5, 3, (6, 256 // group_size, 1), generator=generator)
    zero = scale * torch.randint(-4, 5, scale.shape, generator=generator)
    weight = ((nibbles - 8) * scale + zero).flatten(1)
    packed = LAYOUTS["int4_group"].pack(weight, group_size)
    assert torch.equal(LAYOUTS["int4_group"].unpack(packed), weight)
    flat = nibbles.flatten(1)
    assert torch.equal(packed["weight"] & 15, flat[:, 0::2].to(torch.uint8))
    assert torch.equal(packed["weight"] >> 4, flat[:, 1::2].to(torch.uint8))


@pytest.mark.parametrize(
    ("name", "group_size"), [("int8_channel", 0), ("int8_group", 32), ("int4_group", 64)]
)
def test_scales_are_bf16_numbers_when_a_layout_is_of_integers(name: str, group_size: int) -> None:
    """A kernel that takes scales in bf16 must read the values that the nibbles were made for."""
    packed = LAYOUTS[name].pack(_weight(), group_size)
    roles = set(packed) - {"weight"}
    assert "scale" in roles
    for role in roles:
        assert torch.equal(packed[role].bfloat16().float(), packed[role]), role


@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_packed_bytes_do_not_depend_on_the_number_of_threads(name: str, group_size: int) -> None:
    weight = _weight(700, 4096)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = LAYOUTS[name].pack(weight, group_size)
        torch.set_num_threads(2)
        together = LAYOUTS[name].pack(weight, group_size)
    finally:
        torch.set_num_threads(threads)
    for role, tensor in alone.items():
        assert torch.equal(tensor.view(torch.uint8), together[role].view(torch.uint8)), role


@pytest.mark.parametrize("group_size", INT4_GROUPS)
@pytest.mark.parametrize("seed", range(3))
def test_int4_levels_come_back_bit_for_bit(group_size: int, seed: int) -> None:
    """Whoever chooses the levels: what is unpacked is their formula, and rounds to them again."""
    generator = torch.Generator().manual_seed(seed)
    shape = (19, 256 // group_size)
    levels = torch.randint(-8, 8, (19, 256), generator=generator, dtype=torch.int8)
    scale = (torch.rand(shape, generator=generator) + 0.01).bfloat16().float()
    zero = torch.randn(shape, generator=generator).bfloat16().float()
    unpacked = LAYOUTS["int4_group"].unpack(pack_int4_levels(levels, scale, zero))
    wide_scale, wide_zero = (t.repeat_interleave(group_size, 1) for t in (scale, zero))
    assert torch.equal(unpacked, levels.float() * wide_scale + wide_zero)
    assert torch.equal(int4_levels(unpacked, wide_scale, wide_zero).to(torch.int8), levels)


@pytest.mark.parametrize(
    ("name", "group_size"),
    [("int8_channel", 0), ("fp8_channel", 0), *(("int8_group", group) for group in INT8_GROUPS)],
)
@pytest.mark.parametrize("seed", range(3))
def test_codes_of_whole_bytes_come_back_bit_for_bit(name: str, group_size: int, seed: int) -> None:
    """Whoever chooses them, and every finite one: what is unpacked rounds to them again."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.arange(-128, 128).to(torch.int8).repeat(5, 1)
    if name == "fp8_channel":
        codes = codes[:, (codes[0].int() & 127) != 127].contiguous().view(torch.float8_e4m3fn)
    num_groups = codes.shape[1] // group_size if group_size else 1
    scale = torch.rand((5, num_groups), generator=generator) * 10.0 ** (seed - 3) + 1e-6
    packed = {"weight": codes, "scale": scale if group_size else scale[:, 0]}
    unpacked = LAYOUTS[name].unpack(packed)
    wide = scale.repeat_interleave(codes.shape[1] // num_groups, 1)
    assert torch.equal(unpacked, codes.float() * wide)
    again = unpacked / wide
    again = again if name == "fp8_channel" else again.round()
    assert torch.equal(again.to(codes.dtype).view(torch.uint8), codes.view(torch.uint8))
