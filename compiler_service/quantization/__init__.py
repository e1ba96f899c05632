"""Quantization schemes, a row each."""

from compiler_service.quantization.as_is import AS_IS
from compiler_service.quantization.scheme import QuantScheme
from kernels.linear.layouts import DEFAULT_INT4_GROUP, INT4_GROUPS
from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant

SCHEMES: dict[str, QuantScheme] = {
    row.name: row
    for row in (
        QuantScheme("bf16", "bfloat16", "plain", "plain", "plain", lambda arch: True),
        QuantScheme("fp32", "float32", "plain", "plain", "plain", lambda arch: not arch.is_gpu),
        QuantScheme(
            "int8", "bfloat16", "int8_channel", "int8_channel", "int8_channel", lambda arch: True
        ),
        QuantScheme(
            "int4",
            "bfloat16",
            "int4_group",
            "int8_channel",
            "int8_channel",
            lambda arch: not arch.is_gpu,
            tuple(sorted(INT4_GROUPS, key=lambda size: size != DEFAULT_INT4_GROUP)),
        ),
        QuantScheme(
            "fp8", "bfloat16", "fp8_channel", "plain", "fp8_channel", lambda arch: arch.has_fp8
        ),
        # The layouts of what the checkpoint did not quantize; as_is.py chooses the others.
        QuantScheme(AS_IS, "bfloat16", "plain", "plain", "plain", lambda arch: True),
    )
}


def scheme_named(quant: QuantConfig) -> QuantScheme:
    """The scheme of `quant`.

    Raises:
        UnsupportedQuant: there is none; names those that exist.
    """
    scheme = SCHEMES.get(quant.scheme)
    if scheme is None:
        raise UnsupportedQuant(quant=str(quant), problem=f"known schemes are {', '.join(SCHEMES)}")
    return scheme
