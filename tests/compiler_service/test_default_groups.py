"""The group size that 0 stands for is the same on the wire and where weights are stored."""

import pytest

from compiler_service.quantization import SCHEMES
from compiler_service.quantization.scheme import QuantScheme
from shared.engine import DEFAULT_GROUP_SIZES, QuantConfig


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scheme_resolves_to_the_default_of_the_contract(scheme: QuantScheme) -> None:
    quant = QuantConfig(scheme.name)
    assert scheme.resolve(quant).group_size == quant.resolved.group_size


def test_defaults_are_of_schemes_that_exist() -> None:
    assert DEFAULT_GROUP_SIZES.keys() <= SCHEMES.keys()
