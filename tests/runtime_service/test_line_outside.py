"""Delays that a full queue tells: spread, as long as the lines, fair to tenants, and such that its room is used."""

import heapq
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_service.line_outside import LEAST_S, MOST_S, LineOutside


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _line_that_drains(tokens_per_s: float) -> tuple[LineOutside, _Clock]:
    """A line before a queue that was seen to drain so fast; nobody stands in it."""
    clock = _Clock()
    line = LineOutside(clock)
    line.join("a", 1, 1)
    clock.now_s += 1.0
    line.left_queue(round(tokens_per_s))
    line.join("a", 1, 1)
    clock.now_s += MOST_S
    return line, clock


def test_delay_is_the_line_by_the_rate_at_which_the_queue_drains() -> None:
    line, _ = _line_that_drains(100)
    assert [line.join("a", 50, 1_000) for _ in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert line.delay_s("a", 0, 1_000) == pytest.approx(2.0)


def test_line_gets_shorter_as_time_passes() -> None:
    line, clock = _line_that_drains(100)
    line.join("a", 1_000, 1_000)
    clock.now_s += 9.0
    assert line.delay_s("a", 0, 1_000) == pytest.approx(1.0)
    assert line.join("a", 100, 1_000) == pytest.approx(2.0)
    clock.now_s += 60.0
    assert line.join("a", 100, 1_000) == pytest.approx(1.0)


def test_slower_queue_makes_delays_longer() -> None:
    line, clock = _line_that_drains(100)
    line.join("a", 10, 1_000)
    for _ in range(20):  # at 20 tokens/s now
        clock.now_s += 1.0
        line.left_queue(20)
        delay_s = line.join("a", 20, 1_000)
    assert 0.9 < delay_s < 3.0
    assert line.join("a", 200, 1_000) > 9.0


def test_prompt_longer_than_the_queue_sends_others_away_for_no_longer_than_that() -> None:
    line, _ = _line_that_drains(100)
    assert line.join("a", 10**9, 200) == pytest.approx(2.0)
    assert line.join("a", 50, 200) == pytest.approx(2.5)


def test_queue_that_was_seen_only_long_ago_says_nothing_of_its_rate_now() -> None:
    """It had room meanwhile: what left it then is what came, not what it can do."""
    line, clock = _line_that_drains(100)
    line.join("a", 10, 1_000)
    line.left_queue(1)
    clock.now_s += 3_600.0
    line.join("a", 10, 1_000)
    assert line.join("a", 90, 1_000) == pytest.approx(1.0)


def test_delays_beyond_the_longest_do_not_fall_together() -> None:
    line, _ = _line_that_drains(100)
    delays = [line.join("a", 100, 1_000) for _ in range(600)]
    assert max(delays) == MOST_S
    latest = delays[100:]
    most_at_once = max(latest.count(delay_s) for delay_s in set(latest))
    assert most_at_once <= len(latest) / 12
    assert min(latest) >= MOST_S / 2


def test_tenant_waits_for_none_of_anothers_flood_but_as_much_as_it_has_itself() -> None:
    line, clock = _line_that_drains(100)
    for _ in range(200):
        line.join("flood", 10, 1_000)
    assert [line.join("quiet", 10, 1_000) for _ in range(3)] == pytest.approx([0.2, 0.4, 0.6])
    clock.now_s += 0.6
    assert line.join("quiet", 10, 1_000) == pytest.approx(0.2)


def test_tenants_that_stand_outside_come_back_by_turns() -> None:
    line, _ = _line_that_drains(100)
    told = {tenant: [line.join(tenant, 10, 1_000)] for tenant in "ab"}
    for tenant in "abab":
        told[tenant].append(line.join(tenant, 10, 1_000))
    assert told == {"a": pytest.approx([0.1, 0.3, 0.5]), "b": pytest.approx([0.2, 0.4, 0.6])}


def test_those_that_have_come_back_are_in_nobodys_way() -> None:
    line, clock = _line_that_drains(100)
    line.join("a", 10, 1_000)
    line.join("b", 10, 1_000)
    clock.now_s += 0.2
    assert line.join("a", 10, 1_000) == pytest.approx(0.1)


def test_any_number_of_tenants_keep_a_few_lines() -> None:
    """Callers of whom no key is asked may name any; those that are too many stand in one."""
    line, _ = _line_that_drains(1_000)
    for number in range(10_000):
        line.join(f"tenant {number}", 1, 1_000)
    assert line.join("tenant 0", 1, 1_000) < 0.3


@given(
    joins=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 50)), min_size=1, max_size=60)
)
def test_nobody_waits_for_more_than_an_equal_share_of_the_room_takes(
    joins: list[tuple[str, int]],
) -> None:
    """However much others ask for, before and meanwhile; and of one tenant the later never come first."""
    line, _ = _line_that_drains(1_000)
    own_tokens: Counter[str] = Counter()
    last_s: dict[str, float] = {}
    for tenant, num_tokens in joins:
        own_tokens[tenant] += num_tokens
        delay_s = line.join(tenant, num_tokens, 1_000)
        own_s = own_tokens[tenant] / 1_000
        assert own_s - 1e-6 <= delay_s <= len(own_tokens) * own_s + LEAST_S
        assert delay_s >= last_s.get(tenant, 0.0)
        last_s[tenant] = delay_s


@given(
    num_tokens=st.lists(st.integers(1, 10**7), min_size=1, max_size=50),
    left=st.lists(st.integers(0, 10**7), min_size=1, max_size=50),
    pauses=st.lists(st.floats(0, 100), min_size=1, max_size=50),
)
def test_every_delay_lies_within_the_limits(
    num_tokens: list[int], left: list[int], pauses: list[float]
) -> None:
    clock = _Clock()
    line = LineOutside(clock)
    for joining, leaving, pause_s in zip(num_tokens, left, pauses, strict=False):
        assert LEAST_S <= line.join("a", joining, 1_000) <= MOST_S
        line.left_queue(leaving)
        clock.now_s += pause_s
        assert line.delay_s("a", 0, 1_000) <= MOST_S


@pytest.mark.parametrize("num_tenants", [1, 3])
@pytest.mark.parametrize("overload", [2, 5, 10])
def test_clients_that_do_as_they_are_told_keep_the_queue_full_and_seldom_ask(
    overload: int, num_tenants: int
) -> None:
    """All come at once, for `overload` times as much as the queue holds, and come back when told."""
    most_tokens, tokens_per_s, size = 1_000, 200.0, 10
    clock = _Clock()
    line = LineOutside(clock)
    began_s = clock.now_s
    num_clients = overload * most_tokens // size
    asking = [(began_s, number) for number in range(num_clients)]
    waiting: deque[int] = deque()
    num_asked, empty_s, free_s = 0, 0.0, began_s + size / tokens_per_s
    while asking or waiting:
        if asking and asking[0][0] <= free_s:
            clock.now_s, client = heapq.heappop(asking)
            num_asked += 1
            if len(waiting) * size < most_tokens:
                waiting.append(client)
            else:
                delay_s = line.join(str(client % num_tenants), size, len(waiting) * size)
                heapq.heappush(asking, (clock.now_s + delay_s, client))
            continue
        clock.now_s = free_s
        free_s += size / tokens_per_s
        if waiting:
            waiting.popleft()
            line.left_queue(size)
        elif asking:
            empty_s += size / tokens_per_s
    least_s = num_clients * size / tokens_per_s
    assert empty_s < 0.05 * least_s
    assert num_asked / num_clients < 3.5
