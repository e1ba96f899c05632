"""When an engine process counts as one that hangs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_service.engine_client import without_standstill

_TIMEOUT_S, _PAUSE_S = 60.0, 1.0
_seconds = st.floats(0.0, 1e5, allow_nan=False)


def _silence_s(latenesses: list[float]) -> float:
    """What a watch takes for silence that looks once a second, each time so much too late, and hears nothing."""
    now_s = last_sign_s = 1000.0
    for late_s in latenesses:
        due_s = now_s + _PAUSE_S
        now_s = due_s + late_s
        last_sign_s = without_standstill(last_sign_s, due_s, now_s)
    return now_s - last_sign_s


@given(st.lists(_seconds, min_size=1, max_size=200))
def test_time_in_which_the_daemon_stood_still_is_no_silence(latenesses: list[float]) -> None:
    """A paused machine is paused as a whole: its engine would be given up, with all streams, when it goes on."""
    assert _silence_s(latenesses) == pytest.approx(len(latenesses) * _PAUSE_S, rel=1e-3)


def test_process_that_is_silent_is_given_up_in_time_by_a_daemon_that_listens() -> None:
    assert _silence_s([0.0] * 59) <= _TIMEOUT_S < _silence_s([0.01] * 61)


def test_sign_that_comes_with_the_wake_up_is_not_taken_for_a_later_one() -> None:
    assert without_standstill(last_sign_s=500.0, due_s=100.0, now_s=500.0) == 500.0
