"""How rounds of a benchmark become one line."""

import pytest

from bench.gpu_offline import median_round


@pytest.mark.parametrize(
    ("speeds", "told"), [((7.0,), 7.0), ((9.0, 5.0, 6.0), 6.0), ((4.0, 8.0), 8.0)]
)
def test_median_round_is_told_whole(speeds: tuple[float, ...], told: float) -> None:
    rounds = iter({"out_tok_s": speed, "steps": int(speed)} for speed in speeds)
    line = median_round(lambda: dict(next(rounds)), len(speeds))
    assert line == {"out_tok_s": told, "steps": int(told), "rounds": len(speeds)}
