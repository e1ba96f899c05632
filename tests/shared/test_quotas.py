"""Quotas: what a tenant gets in any stretch of time, and when it is told to come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidField, QuotaExceeded, from_status, to_status
from shared.quotas import Limits, Quotas, TenantQuota, TokenBucket


class Clock:
    """Time as a test lets it pass."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


STEPS = st.lists(
    st.tuples(st.floats(0, 100, allow_nan=False), st.floats(0.01, 500)), min_size=1, max_size=60
)


@given(capacity=st.floats(1, 100), rate=st.floats(0.1, 50), steps=STEPS)
def test_bucket_lets_through_no_more_than_capacity_and_rate(
    capacity: float, rate: float, steps: list[tuple[float, float]]
) -> None:
    """In any stretch: capacity + rate * time, and what the last one of it took beyond that."""
    bucket, now_s = TokenBucket(capacity, rate, 0.0), 0.0
    taken: list[tuple[float, float]] = []
    for wait_s, cost in steps:
        now_s += wait_s
        if bucket.take(cost, now_s) == 0.0:
            taken.append((now_s, cost))
    slack = rate * 1e-3 + 1e-6
    for first in range(len(taken)):
        total = 0.0
        for at_s, cost in taken[first:]:
            allowed = capacity + rate * (at_s - taken[first][0])
            assert total + min(cost, capacity) <= allowed + slack * (len(taken) + 1)
            total += cost


@given(capacity=st.floats(1, 100), rate=st.floats(0.1, 50), steps=STEPS)
def test_who_waits_as_long_as_told_gets_through(
    capacity: float, rate: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now_s = TokenBucket(capacity, rate, 0.0), 0.0
    for wait_s, cost in steps:
        now_s += wait_s
        told_s = bucket.take(cost, now_s)
        if told_s:
            now_s += told_s
            assert bucket.take(cost, now_s) == 0.0


@given(steps=st.lists(st.floats(0, 50), max_size=30), capacity=st.floats(1, 100))
def test_what_was_not_used_is_free_again_and_no_more(steps: list[float], capacity: float) -> None:
    bucket = TokenBucket(capacity, 1.0, 0.0)
    for cost in steps:
        if bucket.take(cost, 0.0) == 0.0:
            bucket.correct(cost, 0.0)
    assert bucket.take(capacity, 0.0) == 0.0
    assert bucket.take(1.0, 0.0) > 0.0


def test_tokens_are_reserved_and_corrected_when_a_generation_ends() -> None:
    clock = Clock()
    quota = TenantQuota(Limits(tokens_per_min=600), clock)
    first = quota.open_generation()
    first.reserve(600)
    with pytest.raises(QuotaExceeded) as refused:
        quota.open_generation().reserve(100)
    assert refused.value.fields == {"limit": "tokens_per_min", "allowed": "600"}
    assert refused.value.retry_after_s == pytest.approx(10.0)
    sentence = "The tenant's limit of 600 tokens_per_min is used up; try again in 10 s."
    assert str(refused.value) == sentence
    assert str(from_status(to_status(refused.value))) == sentence
    first.close(150)
    first.close(0)  # again: nothing
    quota.open_generation().reserve(450)
    with pytest.raises(QuotaExceeded):
        quota.open_generation().reserve(10)


def test_generation_larger_than_a_minute_runs_and_is_paid_off() -> None:
    clock = Clock()
    quota = TenantQuota(Limits(tokens_per_min=60), clock)
    quota.open_generation().reserve(180)
    with pytest.raises(QuotaExceeded) as refused:
        quota.open_generation().reserve(60)
    assert refused.value.retry_after_s == pytest.approx(180)
    clock.now_s += 180
    quota.open_generation().reserve(60)


def test_generations_at_once_are_bounded_and_free_their_place() -> None:
    quota = TenantQuota(Limits(concurrent=2))
    running = [quota.open_generation() for _ in range(2)]
    with pytest.raises(QuotaExceeded) as refused:
        quota.open_generation()
    assert refused.value.fields["limit"] == "concurrent"
    assert refused.value.retry_after_s
    running[0].close(0)
    running[0].close(0)
    quota.open_generation()
    with pytest.raises(QuotaExceeded):
        quota.open_generation()


def test_priority_above_the_tenants_own_is_refused_and_without_keys_none_is() -> None:
    TenantQuota().check_priority(100, "start.priority")
    TenantQuota(Limits(max_priority=7)).check_priority(7, "start.priority")
    for limits, priority in ((Limits(), 1), (Limits(max_priority=7), 8)):
        quota = TenantQuota(limits)
        quota.check_priority(-100, "start.priority")
        with pytest.raises(InvalidField, match=f"at most {limits.max_priority} .* {priority}"):
            quota.check_priority(priority, "start.priority")


def test_changed_limits_count_at_once_and_keep_what_runs() -> None:
    quotas = Quotas()
    running = quotas.of("acme", Limits()).open_generation()
    quota = quotas.of("acme", Limits(concurrent=1))
    with pytest.raises(QuotaExceeded):
        quota.open_generation()
    running.close(0)
    quota.open_generation()
    assert quotas.of("acme", Limits(concurrent=1)) is quota


@pytest.mark.parametrize(
    ("wait_s", "text"),
    [(0.001, "0.1"), (0.31, "0.4"), (1.0, "1"), (9.99, "10"), (12.2, "13"), (180.0, "180")],
)
def test_sentence_says_when_the_limit_is_free_again_and_never_too_early(
    wait_s: float, text: str
) -> None:
    error = QuotaExceeded(limit="requests_per_s", allowed="2", retry_after_s=wait_s)
    assert str(error).endswith(f"is used up; try again in {text} s.")
