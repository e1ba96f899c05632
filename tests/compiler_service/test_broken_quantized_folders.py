"""One clear line for everything that can be wrong with a quantized checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.errors import InvalidModel, MillraceError, UnsupportedModel
from tests.checkpoints import edit_config, edit_tensors
from tests.compiler_service.quantized_cases import FP8, UP, build_folder, write_case
from tests.compiler_service.quantized_folders import (
    awq,
    compressed_packed,
    edit_settings,
    to_floats,
)

# What is done to a good checkpoint of a case, the error, and what its line says.
Break = Callable[[Path], object]
BROKEN: dict[str, tuple[str, Break, type[MillraceError], str]] = {
    "method": (
        "AWQ", lambda f: edit_settings(f, quant_method="bitsandbytes"), UnsupportedModel,
        "quantized by bitsandbytes",
    ),
    "AWQ packing": (
        "AWQ", lambda f: edit_settings(f, version="gemv"), UnsupportedModel, "AWQ version gemv",
    ),
    "AWQ bits": ("AWQ", lambda f: edit_settings(f, bits=3), UnsupportedModel, "AWQ with 3 bits"),
    "GPTQ bits": ("GPTQ", lambda f: edit_settings(f, bits=3), UnsupportedModel, "with 3 bits"),
    "GPTQ packing": (
        "GPTQ", lambda f: edit_settings(f, checkpoint_format="marlin"), UnsupportedModel, "marlin",
    ),
    "GPTQ group size": (
        "GPTQ", lambda f: edit_settings(f, group_size=64), InvalidModel,
        "scales has groups of 32 columns and the configuration says 64",
    ),
    "GPTQ that is not symmetric": (
        "GPTQ 8-bit", lambda f: edit_tensors(f, lambda t: t[f"{UP}.qzeros"].add_(1)), InvalidModel,
        f"{UP}.qzeros is not symmetric",
    ),
    "GPTQ groups beyond the last": (
        "GPTQ", lambda f: edit_tensors(f, lambda t: t[f"{UP}.g_idx"].fill_(9)), InvalidModel,
        f"{UP}.g_idx names groups other than 0 to 1",
    ),
    "scales missing": (
        "GPTQ", lambda f: edit_tensors(f, lambda t: t.pop(f"{UP}.scales")), InvalidModel,
        f"{UP}.scales is missing",
    ),
    "zero points missing": (
        "AWQ", lambda f: edit_tensors(f, lambda t: t.pop(f"{UP}.qzeros")), InvalidModel,
        f"{UP}.qzeros is missing",
    ),
    "scales of another shape": (
        "AWQ", lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :8]})),
        InvalidModel, f"{UP}.scales has shape [2, 8], its weight implies [2, 128]",
    ),
    "scales of integers": (
        "AWQ", lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].int()})),
        InvalidModel, f"{UP}.scales has dtype I32",
    ),
    "scale that is not finite": (
        "AWQ", lambda f: edit_tensors(f, lambda t: t[f"{UP}.scales"].fill_(float("nan"))), InvalidModel,
        f"{UP}.weight holds NaN",
    ),
    "quantized twice": (
        "AWQ", lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.weight": torch.ones(128, 64)})),
        InvalidModel, f"{UP}.weight is there both quantized and as floats",
    ),
    "nothing quantized": (
        "AWQ", lambda f: edit_tensors(f, lambda t: [to_floats(t, s, awq()[1]) for s in _stems(t)]),
        InvalidModel, "awq quantized it and no tensor is",
    ),
    "config of another size": (
        "AWQ", lambda f: edit_config(f, intermediate_size=192), InvalidModel,
        "has shape [128, 64] and config.json implies [192, 64]",
    ),
    "settings no object": (
        "AWQ", lambda f: edit_config(f, quantization_config="awq"), InvalidModel, "is no object",
    ),
    "compression": (
        "compressed 4-bit", lambda f: edit_settings(f, format="nvfp4-pack-quantized"),
        UnsupportedModel, "format nvfp4-pack-quantized",
    ),
    "sparsity": (
        "compressed 4-bit",
        lambda f: edit_settings(f, sparsity_config={"format": "sparse-24-bitmask"}),
        UnsupportedModel, "sparsity sparse-24-bitmask",
    ),
    "no groups of layers": (
        "compressed 4-bit", lambda f: edit_settings(f, config_groups={}), InvalidModel,
        "no config_groups",
    ),
    "asymmetric without zero points": (
        "compressed 4-bit with zero points",
        lambda f: edit_tensors(f, lambda t: t.pop(f"{UP}.weight_zero_point")), InvalidModel,
        f"{UP}.weight_zero_point is missing",
    ),
    "compressed group size": (
        "compressed 4-bit",
        lambda f: edit_settings(f, **compressed_packed(group_size=64)[0]), InvalidModel,
        "weight_scale has groups of 32 columns and the configuration says 64",
    ),
    "packed shape": (
        "compressed 4-bit", lambda f: edit_tensors(f, lambda t: t[f"{UP}.weight_shape"].fill_(96)),
        InvalidModel, f"{UP}.weight_packed has shape [128, 8]",
    ),
    "packed bits": (
        "compressed 4-bit",
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.weight_shape": torch.tensor([128, 128])})),
        UnsupportedModel, f"packed in 2 bits, {UP}.weight",
    ),
    "FP8 without a scale": (
        "compressed FP8, channels", lambda f: edit_tensors(f, lambda t: t.pop(f"{UP}.weight_scale")),
        InvalidModel, f"{UP}.weight has dtype F8_E4M3",
    ),
    "FP8 with a scale per block": (
        "compressed FP8, channels",
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.weight_scale": torch.ones(2, 2)})),
        UnsupportedModel, f"[2, 2] scale, {UP}.weight",
    ),
    "FP8 that is NaN": (
        "compressed FP8, channels", lambda f: edit_tensors(f, lambda t: t.update(
            {f"{UP}.weight": torch.full((128, 64), 127, dtype=torch.uint8).view(FP8)})),
        InvalidModel, f"{UP}.weight holds NaN",
    ),
    "scale of a float weight": (
        "compressed FP8, channels",
        lambda f: edit_tensors(f, lambda t: t.update({f"{UP}.weight": torch.ones(128, 64)})),
        InvalidModel, f"{UP}.weight has a weight_scale and dtype F32",
    ),
    "scale of nothing": (
        "compressed FP8, channels", lambda f: edit_tensors(f, lambda t: t.pop(f"{UP}.weight")),
        InvalidModel, f"{UP}.weight_scale has no matrix",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint_is_refused_with_one_clear_line(case: str, tmp_path: Path) -> None:
    kind, break_it, error, what = BROKEN[case]
    write_case(kind, tmp_path / "m")
    build_folder(tmp_path / "m", tmp_path)
    break_it(tmp_path / "m")
    with pytest.raises(error) as refused:
        build_folder(tmp_path / "m", tmp_path)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)


def _stems(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
