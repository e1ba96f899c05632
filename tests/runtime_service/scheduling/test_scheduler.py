"""The scheduler's policy: budget, order, credit, preemption, forks, ends."""

import gc

import pytest

from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.sequence import Sequence
from tests.runtime_service.fake_runner import small_limits, tokens_alone
from tests.runtime_service.scheduling.driving import Drive


def request(
    request_id: int,
    prompt: int = 4,
    num_tokens: int = 8,
    *,
    begin: int | None = None,
    end_token_ids: tuple[int, ...] = (),
    **more: object,
) -> Request:
    """A request whose prompt is its own unless `begin` is given."""
    first = 1000 * (request_id + 1) if begin is None else begin
    return Request(
        request_id,
        list(range(first, first + prompt)),
        SamplingParams(seed=request_id),
        StopParams(num_tokens, end_token_ids=end_token_ids),
        **more,  # type: ignore[arg-type]
    )


def expect_alone(drive: Drive, *requests: Request) -> None:
    for asked in requests:
        for index in range(asked.num_samples):
            sample = (asked.request_id, index)
            found = (tuple(drive.tokens[sample]), drive.finishes[sample])
            assert found == tokens_alone(asked, index)
    drive.check_empty()


def test_long_prompt_is_computed_in_chunks_beside_decoding() -> None:
    drive = Drive(small_limits(max_step_tokens=8))
    short, long = request(0, num_tokens=30), request(1, prompt=60)
    drive.add(short)
    for _ in range(3):
        drive.step()
    drive.add(long)
    drive.run()
    assert [sum(step.values()) for step in drive.steps[3:10]] == [8] * 7
    assert all(step[0] == 1 for step in drive.steps[1:30] if 0 in step)
    expect_alone(drive, short, long)


def test_step_holds_everyone_in_flight() -> None:
    """Decode steps are one per token, whoever else runs."""
    drive = Drive(small_limits())
    requests = [request(n) for n in range(16)]
    drive.add(*requests)
    drive.run()
    assert drive.steps[1] == dict.fromkeys(range(16), 1)
    assert len(drive.steps) == 8
    expect_alone(drive, *requests)


def test_higher_priority_goes_first_then_arrival() -> None:
    drive = Drive(small_limits(max_sequences=1))
    requests = [request(0), request(1), request(2, priority=5), request(3, priority=5)]
    drive.add(*requests)
    drive.run()
    assert list(dict.fromkeys(o.request_id for o in drive.outputs)) == [2, 3, 0, 1]


def test_higher_priority_takes_the_place_of_a_lower_one() -> None:
    drive = Drive(small_limits(max_sequences=1))
    low, high = request(0, num_tokens=40), request(1, priority=1)
    drive.add(low)
    for _ in range(5):
        drive.step()
    drive.add(high)
    drive.run()
    assert list(drive.finishes) == [(1, 0), (0, 0)]
    assert drive.scheduler.stats().preemptions == 1
    expect_alone(drive, low, high)


@pytest.mark.parametrize("max_unread_steps", [0, 1])
def test_higher_priority_does_not_wait_for_the_rest_of_a_long_prompt(max_unread_steps: int) -> None:
    """A prompt under way takes what those before it leave of a step, also where they come later."""
    limits = small_limits(max_sequence_tokens=400, num_blocks=256, max_step_tokens=8)
    drive = Drive(limits, max_unread_steps)
    low, high = request(0, prompt=300, num_tokens=2), request(1, prompt=5, priority=1)
    drive.add(low)
    drive.step()
    drive.add(high)
    drive.run()
    assert next(iter(drive.finishes)) == (1, 0)
    assert drive.scheduler.stats().preemptions == 0
    expect_alone(drive, low, high)


def test_equal_priority_does_not_preempt_on_arrival() -> None:
    drive = Drive(small_limits(max_sequences=1))
    drive.add(request(0, num_tokens=40))
    drive.step()
    drive.add(request(1))
    drive.run()
    assert drive.scheduler.stats().preemptions == 0
    assert list(drive.finishes) == [(0, 0), (1, 0)]


def test_update_of_priority_moves_a_waiting_request() -> None:
    drive = Drive(small_limits(max_sequences=1))
    drive.add(request(0), request(1), request(2))
    drive.step()
    drive.scheduler.update(2, priority=1)
    drive.scheduler.update(2, priority=0)
    drive.scheduler.update(2, priority=1)
    drive.run()
    assert next(iter(drive.finishes)) == (2, 0)


@pytest.mark.parametrize("max_unread_steps", [0, 1])
def test_last_in_order_is_preempted_when_blocks_run_out(max_unread_steps: int) -> None:
    """Preemption by recompute: everyone gets what they get alone."""
    drive = Drive(small_limits(max_sequence_tokens=40, num_blocks=12), max_unread_steps)
    requests = [request(n, num_tokens=30) for n in range(3)]
    drive.add(*requests)
    drive.run()
    assert drive.scheduler.stats().preemptions > 0
    assert list(drive.finishes) == [(0, 0), (1, 0), (2, 0)]
    expect_alone(drive, *requests)


def test_no_request_starves_behind_later_small_ones() -> None:
    """Whoever comes first is admitted first, also when only later ones would fit."""
    drive = Drive(small_limits(max_sequence_tokens=48, num_blocks=12))
    small = [request(n, num_tokens=12) for n in range(40)]
    large = request(99, prompt=44, num_tokens=2)
    drive.add(*small[:3], large)
    for asked in small[3:]:
        drive.step()
        drive.add(asked)
    drive.run()
    finishes = list(drive.finishes)
    assert finishes.index((99, 0)) <= 4
    expect_alone(drive, *small, large)


def test_no_credit_no_token_and_the_blocks_stay() -> None:
    drive = Drive(small_limits())
    asked = request(0, num_tokens=10, credit_tokens=3)
    drive.add(asked)
    drive.run()
    assert len(drive.tokens[0, 0]) == 3
    stats = drive.scheduler.stats()
    assert (stats.num_running, stats.num_blocks - stats.num_free_blocks) == (1, 2)
    drive.scheduler.credit(0, 2)
    drive.run()
    assert len(drive.tokens[0, 0]) == 5
    drive.scheduler.credit(0, 100)
    drive.run()
    assert drive.scheduler.stats().preemptions == 0
    expect_alone(drive, asked)


def test_request_without_credit_waits_without_blocking_others() -> None:
    drive = Drive(small_limits(max_sequences=1))
    waiting, other = request(0, credit_tokens=0), request(1)
    drive.add(waiting, other)
    drive.run()
    assert list(drive.finishes) == [(1, 0)]
    drive.scheduler.credit(0, 8)
    drive.run()
    expect_alone(drive, waiting, other)


def test_stalled_sequence_gives_way_to_one_that_can_run() -> None:
    """A client that never reads holds nobody up."""
    drive = Drive(small_limits(max_sequences=1))
    stalled, other = request(0, credit_tokens=2), request(1)
    drive.add(stalled)
    drive.run()
    drive.add(other)
    drive.run()
    assert list(drive.finishes) == [(1, 0)]
    drive.scheduler.credit(0, 100)
    drive.run()
    expect_alone(drive, stalled, other)


@pytest.mark.parametrize("max_unread_steps", [0, 1])
def test_sample_without_credit_holds_up_nobody_behind_it(max_unread_steps: int) -> None:
    """Its sibling spent the credit and stalls in the only row."""
    drive = Drive(small_limits(max_sequences=1), max_unread_steps)
    stalled, other = request(0, num_samples=2, credit_tokens=2), request(1)
    drive.add(stalled)
    drive.run()
    drive.add(other)
    drive.run()
    assert list(drive.finishes) == [(1, 0)]
    drive.scheduler.credit(0, 100)
    drive.run()
    expect_alone(drive, stalled, other)


@pytest.mark.parametrize("max_unread_steps", [0, 1])
def test_stalled_sequence_gives_way_to_one_that_needs_every_block(max_unread_steps: int) -> None:
    """What is kept free for growth never adds up to more blocks than there are."""
    drive = Drive(small_limits(max_sequence_tokens=800, num_blocks=200), max_unread_steps)
    stalled, other = request(0, prompt=2, credit_tokens=1), request(1, prompt=798, num_tokens=2)
    drive.add(stalled)
    drive.run()
    drive.add(other)
    drive.run()
    assert list(drive.finishes) == [(1, 0)]
    drive.scheduler.credit(0, 100)
    drive.run()
    expect_alone(drive, stalled, other)


@pytest.mark.parametrize("max_unread_steps", [0, 1])
def test_waiting_sequence_runs_when_the_last_running_one_stalls(max_unread_steps: int) -> None:
    """Also where nothing is left to be read that would make the engine look again."""
    drive = Drive(small_limits(max_sequences=1), max_unread_steps)
    stalled, other = request(0, credit_tokens=2), request(1)
    drive.add(stalled, other)
    drive.run()
    assert list(drive.finishes) == [(1, 0)]
    drive.scheduler.credit(0, 100)
    drive.run()
    expect_alone(drive, stalled, other)


def test_credit_is_shared_by_samples_and_discarded_tokens_cost_none() -> None:
    drive = Drive(small_limits())
    end = tokens_alone(request(0))[0][2]
    asked = request(0, num_samples=2, num_tokens=6, end_token_ids=(end,), credit_tokens=0)
    expected = sum(len(tokens_alone(asked, index)[0]) for index in (0, 1))
    assert tokens_alone(asked)[1] == "stop_token"
    drive.add(asked)
    drive.scheduler.credit(0, expected)
    drive.run()
    expect_alone(drive, asked)


def test_end_token_ends_a_sample_and_the_step_after_is_discarded() -> None:
    drive = Drive(small_limits(), max_unread_steps=1)
    end = tokens_alone(request(0, num_tokens=20))[0][3]
    asked = request(0, num_tokens=20, end_token_ids=(end,))
    drive.add(asked)
    num_tokens = len(tokens_alone(asked)[0])
    while (0, 0) not in drive.finishes:
        drive.step()
    # One step further was launched: its blocks are held until it was read.
    assert len(drive.steps) == num_tokens + 1
    assert drive.scheduler.stats().num_running == 1
    drive.run()
    assert len(drive.steps) == num_tokens + 1
    expect_alone(drive, asked)


def test_length_is_known_ahead_and_wastes_no_step() -> None:
    drive = Drive(small_limits(), max_unread_steps=3)
    asked = request(0, num_tokens=5)
    drive.add(asked)
    drive.run()
    assert len(drive.steps) == 5
    expect_alone(drive, asked)


def test_samples_share_whole_prompt_blocks_and_copy_the_last() -> None:
    drive = Drive(small_limits(block_tokens=4))
    asked = request(0, prompt=10, num_tokens=2, num_samples=3)
    drive.add(asked)
    drive.step()
    drive.step()
    stats = drive.scheduler.stats()
    # 2 whole blocks once, the third block three times.
    assert stats.num_blocks - stats.num_free_blocks == 2 + 3
    assert list(drive.steps[1].values()) == [1, 1, 1]
    drive.run()
    expect_alone(drive, asked)


def test_siblings_go_on_when_the_first_sample_is_aborted_in_its_prompt() -> None:
    drive = Drive(small_limits(max_step_tokens=4))
    asked = request(0, prompt=20, num_samples=3)
    drive.add(asked)
    drive.step()
    drive.scheduler.abort(0, [0])
    drive.run()
    assert set(drive.finishes) == {(0, 1), (0, 2)}
    for index in (1, 2):
        assert tuple(drive.tokens[0, index]) == tokens_alone(asked, index)[0]
    drive.check_empty()


def test_prefix_of_an_earlier_request_is_not_computed_again() -> None:
    drive = Drive(small_limits(block_tokens=4))
    first, second = request(0, prompt=18, begin=1), request(1, prompt=22, begin=1)
    drive.add(first)
    drive.run()
    before = drive.runner.num_tokens
    drive.add(second)
    drive.run()
    assert drive.outputs[-8].num_cached_tokens == 16
    assert drive.runner.num_tokens - before == 22 - 16 + 7
    expect_alone(drive, first, second)


def test_prefix_enters_the_index_only_when_it_was_read_back() -> None:
    drive = Drive(small_limits(block_tokens=4), max_unread_steps=3)
    drive.add(request(0, prompt=18, begin=1))
    drive.step()
    drive.add(request(1, prompt=18, begin=1))
    drive.step()
    drive.run()
    assert [o.num_cached_tokens for o in drive.outputs if o.num_cached_tokens is not None] == [0, 0]


def test_tenants_do_not_share_prefixes() -> None:
    drive = Drive(small_limits(block_tokens=4))
    drive.add(request(0, prompt=18, begin=1, cache_salt="a"))
    drive.run()
    drive.add(request(1, prompt=18, begin=1, cache_salt="b"))
    drive.run()
    assert drive.scheduler.stats().prefix_hit_tokens == 0


def test_resumed_tokens_are_computed_and_count_as_generated() -> None:
    drive = Drive(small_limits())
    whole = request(0, num_tokens=12)
    tokens, _ = tokens_alone(whole)
    resumed = request(0, num_tokens=12, resumed_token_ids=list(tokens[:5]))
    drive.add(resumed)
    drive.run()
    assert tuple(drive.tokens[0, 0]) == tokens[5:]
    assert drive.finishes[0, 0] == "length"


def test_resumed_stream_with_nothing_left_to_draw_ends_at_once() -> None:
    drive = Drive(small_limits())
    drive.add(request(0, num_tokens=3, resumed_token_ids=[1, 2, 3]))
    assert (drive.tokens, drive.finishes) == ({(0, 0): []}, {(0, 0): "length"})
    drive.check_empty()


def test_lower_limit_ends_what_has_reached_it() -> None:
    drive = Drive(small_limits())
    drive.add(request(0, num_tokens=100))
    for _ in range(6):
        drive.step()
    drive.take(drive.scheduler.update(0, max_new_tokens=2))
    assert drive.finishes == {(0, 0): "length"}
    drive.run()
    drive.check_empty()


def test_greater_limit_is_bounded_by_the_engine() -> None:
    drive = Drive(small_limits(max_sequence_tokens=20))
    drive.add(request(0, prompt=4, num_tokens=6))
    drive.step()
    drive.scheduler.update(0, max_new_tokens=1000)
    drive.run()
    assert len(drive.tokens[0, 0]) == 16


def test_abort_frees_everything_when_the_launched_step_was_read() -> None:
    drive = Drive(small_limits(), max_unread_steps=1)
    drive.add(request(0, num_tokens=100), request(1, num_tokens=100, num_samples=2))
    for _ in range(4):
        drive.step()
    drive.scheduler.abort(0)
    drive.scheduler.abort(1)
    drive.scheduler.abort(1)
    assert drive.scheduler.stats().num_running == 3
    drive.run()
    assert drive.finishes == {}
    drive.check_empty()


def test_aborted_storm_leaves_nothing() -> None:
    """Law 7: storm it with cancels."""
    drive = Drive(small_limits(num_blocks=64))
    for number in range(500):
        drive.add(request(number, num_samples=1 + number % 3))
        if number % 2:
            drive.step()
        drive.scheduler.abort(number // 2)
    drive.run()
    drive.check_empty()


def test_queue_keeps_nothing_of_what_left_behind_one_that_waits() -> None:
    """What a client cancels costs nothing, however long the one before it waits for its turn."""
    drive = Drive(small_limits(max_sequences=1))
    drive.add(request(0, num_tokens=40), request(1))
    drive.step()
    for number in range(2, 2000):
        drive.add(request(number))
        drive.scheduler.abort(number)
    gc.collect()
    assert sum(type(known) is Sequence for known in gc.get_objects()) < 500
    drive.run()
    expect_alone(drive, request(0, num_tokens=40), request(1))


def test_queue_does_not_grow_with_changes_of_priority() -> None:
    drive = Drive(small_limits(max_sequences=1))
    drive.add(request(0, num_tokens=40), request(7777))
    drive.step()
    gc.collect()
    (waiting,) = (s for s in gc.get_objects() if type(s) is Sequence and s.group.request_id == 7777)
    for number in range(2000):
        drive.scheduler.update(7777, priority=number % 2)
    assert len(gc.get_referrers(waiting)) < 500
    del waiting
    drive.run()
    expect_alone(drive, request(0, num_tokens=40), request(7777))


def test_queue_reports_what_waits() -> None:
    drive = Drive(small_limits(max_sequences=1))
    drive.add(request(0, prompt=10), request(1, prompt=7), request(2, prompt=5))
    assert drive.scheduler.stats().waiting_tokens == 22
    drive.step()
    stats = drive.scheduler.stats()
    assert (stats.num_waiting, stats.num_running, stats.waiting_tokens) == (2, 1, 12)
