"""Cases of the kernels that make one row of another: norms, silu, quantization; for the interpreter and for a GPU.

The launches are those of the lowering of a model with awkward widths.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu_models import LlamaSizes, llama_graph
from kernels.launch import Launch, Sizes
from kernels.lowering import lower
from kernels.regimes import Regime
from kernels.variant import KernelVariant
from shared.arch import Arch

Run = Callable[[KernelVariant, tuple[int, int, int], dict[str, torch.Tensor | int]], None]

_SIZES = LlamaSizes(
    hidden=200, layers=1, heads=3, kv_heads=1, head_dim=24, ffn=1100, vocab=64
)  # fmt: skip
_TOKENS = 5
# What each layout's rows go through, in the order of a step.
KERNELS = {
    "plain": ("rms_norm", "silu_mul"),
    "int8_channel": ("rms_norm", "rms_norm", "silu_mul"),
    "fp8_channel": ("rms_norm", "quantize_rows", "rms_norm", "silu_mul", "rms_norm"),
}


def row_launches(layout: str, arch: Arch) -> list[Launch]:
    """The row kernels of a step of many tokens, each variant once."""
    graph = llama_graph(_SIZES, layout)
    graph = replace(graph, config={**graph.config, "dtype": "float16"})
    steps = lower(graph, arch, Regime(0, 0))
    launches = [s for s in steps if isinstance(s, Launch) and s.variant.kernel in _FORMULAS]
    return list({launch.variant: launch for launch in launches}.values())


def check_row(
    run: Run, launch: Launch, device: str = "cpu", *, has_exact_e4m3: bool = True
) -> None:
    """Launches one of them and compares with its formula in fp32.

    Triton's interpreter has no exact e4m3: it drops the carry of a mantissa that rounds up to 2, and below 2^-6 it
    truncates. There such numbers are left out.
    """
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half().to(device)

    formula, width = _FORMULAS[launch.variant.kernel]
    constants = dict(launch.variant.constants)
    size = int(str(constants[width]))
    names = {a.name: a.type for a in launch.variant.arguments}
    operands: dict[str, torch.Tensor | int] = {
        "x": random(_TOKENS, size), "residual": random(_TOKENS, size),
        "weight": random(size), "gate_up": random(_TOKENS, 2 * size),
        "residual_out": torch.zeros(_TOKENS, size, dtype=torch.float16, device=device),
        "scale_out": torch.zeros(_TOKENS, device=device),
        "out": torch.zeros(
            _TOKENS, size, device=device,
            dtype=torch.float8_e4m3fn if "fp8" in names["out"] else torch.float16,
        ),
    }  # fmt: skip
    run(launch.variant, launch.grid(Sizes(_TOKENS, 1, _TOKENS)), operands)
    given = {name: t.float() for name, t in operands.items() if isinstance(t, torch.Tensor)}
    if "residual" in names:
        given["x"] = given["x"] + given["residual"]
        torch.testing.assert_close(given["residual_out"], given["x"], rtol=2e-3, atol=2e-3)
    want = formula(given, constants)
    if "scale_out" in names:
        _compare_e4m3(want, given["out"], given["scale_out"][:, None], has_exact_e4m3)
    else:
        torch.testing.assert_close(given["out"], want, rtol=4e-3, atol=4e-3)


def _compare_e4m3(
    want: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, is_exact: bool
) -> None:
    torch.testing.assert_close(scale, want.abs().amax(1, True) / 448, rtol=4e-3, atol=1e-6)
    # Three bits of mantissa: half a step is 1/16 of the number; below 2^-6 steps are 2^-9.
    allowed = want.abs() * (1 / 16 + 4e-3) + scale * 2**-10
    is_near = (out * scale - want).abs() <= allowed
    number = want / scale
    if not is_exact:
        is_left_out = (number.frexp().mantissa.abs() > 0.96) | (number.abs() < 2**-5)
        assert float(is_left_out.float().mean()) < 0.2
        is_near |= is_left_out
    assert bool(is_near.all())


def _norm(at: dict[str, torch.Tensor], constants: dict[str, object]) -> torch.Tensor:
    x = at["x"]
    rstd = torch.rsqrt(x.square().mean(1, True) + float(str(constants["EPS"])))
    return x * rstd * at["weight"]


def _silu_mul(at: dict[str, torch.Tensor], _: dict[str, object]) -> torch.Tensor:
    gate, up = at["gate_up"].chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


# By kernel: what it computes, in fp32, and the constant that is its row's width.
_FORMULAS: dict[
    str, tuple[Callable[[dict[str, torch.Tensor], dict[str, object]], torch.Tensor], str]
] = {
    "rms_norm": (_norm, "M"),
    "silu_mul": (_silu_mul, "F"),
    "quantize_rows": (lambda at, _: at["x"], "K"),
}
