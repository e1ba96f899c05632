"""Laws 4 and 5, and progress, over histories that are searched for and made small when they fail.

Few rows, few blocks and little credit: what a history of ten operations can get wrong.
"""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from tests.runtime_service.fake_runner import small_limits, tokens_alone
from tests.runtime_service.scheduling.driving import Drive

_MAX_SEQUENCE_TOKENS = 200

_limits = st.builds(
    small_limits,
    max_sequence_tokens=st.just(_MAX_SEQUENCE_TOKENS),
    max_sequences=st.integers(1, 3),
    max_step_tokens=st.sampled_from([3, 64]),
    block_tokens=st.just(1),
    # As many blocks as the longest sequence has, and a few more.
    num_blocks=st.integers(_MAX_SEQUENCE_TOKENS, _MAX_SEQUENCE_TOKENS + 4),
)
_adds = st.tuples(
    st.just("add"),
    st.sampled_from([1, 2, 5, _MAX_SEQUENCE_TOKENS - 9, _MAX_SEQUENCE_TOKENS - 1]),  # prompt
    st.integers(1, 8),  # new tokens
    st.integers(1, 3),  # samples
    st.sampled_from([None, 0, 1, 2, 4]),  # credit
    st.integers(0, 1),  # priority
)
_credits = st.tuples(st.just("credit"), st.integers(0, 5), st.integers(1, 3))
_aborts = st.tuples(st.just("abort"), st.integers(0, 5), st.integers(0, 2))
_steps = st.tuples(st.just("step"), st.integers(1, 4))
_runs = st.tuples(st.just("run"))
_others = st.lists(st.one_of(_runs, _steps, _credits, _aborts), max_size=3)
_rounds = st.lists(st.tuples(_adds, _others), min_size=2, max_size=4)


class _History:
    """Requests by number, and what was done to them."""

    def __init__(self, limits: RuntimeLimits, max_unread_steps: int) -> None:
        self.drive = Drive(limits, max_unread_steps)
        self.requests: list[Request] = []
        self.aborted: set[tuple[int, int]] = set()

    def add(
        self, prompt: int, new_tokens: int, num_samples: int, credit: int | None, priority: int
    ) -> None:
        number = len(self.requests)
        asked = Request(
            number,
            # Those of even number begin alike.
            [number % 2 + 1] * prompt,
            SamplingParams(seed=number),
            StopParams(min(new_tokens, _MAX_SEQUENCE_TOKENS - prompt), end_token_ids=(3, 50, 77)),
            num_samples=num_samples,
            priority=priority,
            credit_tokens=credit,
        )
        self.requests.append(asked)
        self.drive.add(asked)

    def credit(self, number: int, tokens: int) -> None:
        self.drive.scheduler.credit(number, tokens)

    def abort(self, number: int, sample_index: int) -> None:
        if number < len(self.requests) and sample_index < self.requests[number].num_samples:
            self.drive.scheduler.abort(number, [sample_index])
            if (number, sample_index) not in self.drive.finishes:
                self.aborted.add((number, sample_index))

    def step(self, times: int) -> None:
        for _ in range(times):
            self.drive.step()

    def run(self) -> None:
        self.drive.run()


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(_limits, st.integers(0, 2), _rounds)
def test_every_sample_gets_what_it_gets_alone_whenever_credit_comes(
    limits: RuntimeLimits,
    max_unread_steps: int,
    rounds: list[tuple[tuple[object, ...], list[tuple[object, ...]]]],
) -> None:
    """The engine sleeps only where nobody has credit (`Drive` sees to it), and nothing leaks."""
    history = _History(limits, max_unread_steps)
    drive = history.drive
    for name, *arguments in [one for add, others in rounds for one in (add, *others)]:
        getattr(history, str(name))(*arguments)
        drive.check_blocks()
    drive.run()
    for asked in history.requests:
        drive.scheduler.credit(asked.request_id, 1000)
        drive.run()
    drive.check_empty()
    for asked in history.requests:
        for index in range(asked.num_samples):
            sample = (asked.request_id, index)
            tokens, finish = tokens_alone(asked, index)
            found = tuple(drive.tokens.get(sample, ()))
            if sample in history.aborted:
                assert found == tokens[: len(found)]
                assert sample not in drive.finishes
            else:
                assert (found, drive.finishes[sample]) == (tokens, finish)
