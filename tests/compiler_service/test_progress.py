"""What is said of a build's end: what was done says it, and nothing does where work is repeated."""

import pytest

from compiler_service.progress import Remaining


@pytest.mark.parametrize(
    ("elapsed_s", "fraction", "expected"),
    [(10, 0.5, 10.0), (30, 0.75, 10.0), (10, 0.0, None), (0.1, 0.5, None), (10, 1.0, 0.0)],
)
def test_the_rest_takes_as_long_as_what_was_done(
    elapsed_s: float, fraction: float, expected: float | None
) -> None:
    assert Remaining().seconds(elapsed_s, "quantize", fraction, 10) == expected


def test_a_stage_that_begins_again_has_no_known_end_and_the_next_one_has() -> None:
    """The search for layers to keep shows 90 % for as long as it takes."""
    remaining = Remaining()
    assert remaining.seconds(9.0, "quality", 0.9, 0) == 1.0
    assert remaining.seconds(18.0, "quality", 0.9, 100) == 2.0
    assert remaining.seconds(18.1, "quality", 0.9, 5) is None
    assert remaining.seconds(27.0, "quality", 0.9, 100) is None
    assert remaining.seconds(95.0, "publish", 0.95, 0) == 5.0
