"""Row kernels in Triton's interpreter."""

import pytest

from tests.kernels.interpreted import INTERPRETER, run
from tests.kernels.row_cases import KERNELS, check_row, row_launches


@pytest.mark.parametrize("layout", KERNELS)
def test_row_kernels_equal_their_formulas(layout: str) -> None:
    launches = row_launches(layout, INTERPRETER)
    assert sorted(launch.variant.kernel for launch in launches) == sorted(KERNELS[layout])
    for launch in launches:
        check_row(run, launch, has_exact_e4m3=False)
