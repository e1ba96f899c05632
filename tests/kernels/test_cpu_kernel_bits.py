"""Law 5 between processes: who compiled the CPU kernels changes no bit of what they give."""

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.cpu_kernel_bits import CASES


def _printed(cases: list[str], cache: Path) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cpu_kernel_bits", *cases],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.split("\n")[:-1]


def test_kernels_give_the_same_bits_where_they_were_compiled_and_where_they_were_kept(
    tmp_path: Path,
) -> None:
    """Generations resume on other runtimes, whose kernels may be loaded in any order."""
    compiled = _printed(list(CASES), tmp_path)
    assert len(compiled) == len(CASES)
    assert next(tmp_path.rglob("*.nbc"), None), "nothing was kept, so nothing is compared"
    assert _printed(list(CASES), tmp_path) == compiled
    assert _printed([*CASES][::-1], tmp_path)[::-1] == compiled
