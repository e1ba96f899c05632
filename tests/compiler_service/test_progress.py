"""What is said of a build's end: what was done says it, and nothing does where work is repeated."""

import pytest

from compiler_service.progress import remaining_s


@pytest.mark.parametrize(
    ("elapsed_s", "fraction", "expected"),
    [(10, 0.5, 10.0), (30, 0.75, 10.0), (10, 0.0, None), (0.1, 0.5, None), (10, 1.0, 0.0)],
)
def test_the_rest_takes_as_long_as_what_was_done(
    elapsed_s: float, fraction: float, expected: float | None
) -> None:
    assert remaining_s(elapsed_s, "quantize", fraction) == expected


def test_a_search_has_no_known_end_and_the_next_stage_has() -> None:
    """It shows 90 % for as long as it takes, which is no sign of how long that is."""
    assert remaining_s(9.0, "quality", 0.9) is None
    assert remaining_s(95.0, "publish", 0.95) == 5.0
