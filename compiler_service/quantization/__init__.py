"""Quantization schemes, a row each."""

from dataclasses import replace

from compiler_service.quantization.as_is import AS_IS
from compiler_service.quantization.float_formats import BF16, FP32
from compiler_service.quantization.fp8 import FP8
from compiler_service.quantization.fp8_static import FP8_STATIC
from compiler_service.quantization.int4_awq import INT4_AWQ
from compiler_service.quantization.int4_gptq import INT4_GPTQ
from compiler_service.quantization.int4_rtn import INT4_RTN
from compiler_service.quantization.int8 import INT8
from compiler_service.quantization.scheme import QuantScheme
from compiler_service.quantization.w8a8_int8 import W8A8_INT8
from shared.engine import QuantConfig
from shared.errors import UnsupportedQuant

SCHEMES: dict[str, QuantScheme] = {
    row.name: row
    for row in (
        BF16,
        FP32,
        INT8,
        W8A8_INT8,
        INT4_RTN,
        INT4_AWQ,
        INT4_GPTQ,
        FP8,
        FP8_STATIC,
        # The layouts of what the checkpoint did not quantize; as_is.py chooses the others.
        QuantScheme(AS_IS, "bfloat16", "plain", "plain", "plain", lambda arch: True),
    )
}


def scheme_named(quant: QuantConfig) -> QuantScheme:
    """The scheme of `quant`, rounding in the order that `quant` says.

    Raises:
        UnsupportedQuant: there is none; names those that exist.
    """
    scheme = SCHEMES.get(quant.scheme)
    if scheme is None:
        raise UnsupportedQuant(quant=str(quant), problem=f"known schemes are {', '.join(SCHEMES)}")
    if quant.no_act_order and scheme.prepare_in_order is not None:
        return replace(scheme, prepare_pack=scheme.prepare_in_order)
    return scheme
