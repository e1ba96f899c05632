"""The gate's defaults: near what schemes were measured to cost, as a limit far above it stops nothing."""

import re
from pathlib import Path

import pytest

from compiler_service.quantization import SCHEMES, scheme_named
from compiler_service.quantization.scheme import EIGHT_BITS, QualityLimits
from shared.engine import QuantConfig

MANUAL = (Path(__file__).parents[2] / "docs/QUANTIZATION.md").read_text()
# KL and perplexity's increase, as a share, by quant.
MEASURED = {
    name: (float(kl), float(increase) / 100)
    for name, kl, increase in re.findall(
        r"^\| `([\w-]+)` \| ([\d.]+) \([\d.]+\) \| [\d.]+% \| [\d.]+ \(([+-][\d.]+)%\)",
        MANUAL,
        re.M,
    )
}
WITH_LIMITS = [name for name, row in SCHEMES.items() if row.limits is not None]


def limits_of(name: str) -> QualityLimits:
    """Of a build that names none."""
    scheme, _, kv_cache = name.partition("-kv-")
    quant = QuantConfig(scheme, kv_cache=kv_cache)
    resolved = scheme_named(quant).resolve(quant)
    return QualityLimits(resolved.max_kl, resolved.max_perplexity_increase)


@pytest.mark.parametrize("name", [*WITH_LIMITS, "bf16-kv-fp8"])
def test_default_limit_is_at_most_five_times_what_the_scheme_costs(name: str) -> None:
    kl, _ = MEASURED[name]
    assert limits_of(name).max_kl <= 5 * kl


@pytest.mark.parametrize("name", sorted(MEASURED.keys() - {"int4-rtn", "int4-rtn-kv-fp8"}))
def test_default_limits_leave_room_for_another_draw_of_what_the_scheme_costs(name: str) -> None:
    """Rounding to the nearest of 16 levels fails this model on purpose: better schemes have its size."""
    (kl, increase), limits = MEASURED[name], limits_of(name)
    assert 1.3 * kl < limits.max_kl
    assert increase + (2 * kl / 512) ** 0.5 < limits.max_perplexity_increase


def test_manual_lists_every_schemes_limits() -> None:
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| ([\d.]+) \| \+(\d+) % \|$", MANUAL, re.M)
    listed = {
        name: QualityLimits(float(kl), float(increase) / 100)
        for names, kl, increase in rows
        for name in re.findall(r"`([\w-]+)`", names)
    }
    assert listed == {name: limits_of(name) for name in listed}
    assert {*WITH_LIMITS, "bf16-kv-fp8", "bf16-kv-int8"} == listed.keys()


def test_cache_beside_quantized_weights_has_their_limits() -> None:
    assert limits_of("int4-gptq-kv-int8") == SCHEMES["int4-gptq"].limits
    assert limits_of("bf16-kv-int8") == EIGHT_BITS
