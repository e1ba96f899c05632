"""Tenants take turns by the tokens that they use; one alone is served in order of arrival."""

from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_service.scheduling.request import Request, SamplingParams, StopParams
from runtime_service.scheduling.turns import Turns
from tests.runtime_service.fake_runner import small_limits
from tests.runtime_service.scheduling.driving import Drive


@dataclass
class _Waiting:
    turn: int
    arrival: int
    tenant: str
    num_tokens: int


class _Server:
    """Serves one request at a time, the least turn first."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.waiting: list[_Waiting] = []
        self.running: _Waiting | None = None
        self.num_arrivals = 0

    def arrive(self, tenant: str, num_tokens: int) -> None:
        turn = self.turns.enter(0, tenant, num_tokens, 0)
        self.waiting.append(_Waiting(turn, self.num_arrivals, tenant, num_tokens))
        self.num_arrivals += 1

    def serve(self) -> _Waiting | None:
        """The next one, once the one before has ended."""
        self.end()
        if self.waiting:
            self.running = min(self.waiting, key=lambda one: (one.turn, one.arrival))
            self.waiting.remove(self.running)
            self.turns.came(0, self.running.turn)
        return self.running

    def end(self) -> None:
        """What runs has ended."""
        if self.running is not None:
            self.turns.leave(0, self.running.tenant, 0, 0)
            self.running = None


_MOST_TOKENS = 20
_arrivals = st.tuples(st.sampled_from("abc"), st.integers(1, _MOST_TOKENS))
# None: the next is served, if there is one.
_histories = st.lists(st.one_of(_arrivals, st.none()), max_size=80)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(_histories)
def test_who_waits_is_never_behind_another_tenant_by_more_than_a_request_of_each(
    history: list[tuple[str, int] | None],
) -> None:
    """However the other comes and goes. Source: Goyal et al. 1996, theorem 1."""
    server = _Server()
    # By how many tokens (one, other) was served more, since when it was least and `other` has waited all the time.
    leads: Counter[tuple[str, str]] = Counter()
    arrivals: dict[str, list[int]] = defaultdict(list)
    for arriving in [*history, *([None] * (len(history) + 1))]:
        if arriving is not None:
            server.arrive(*arriving)
            continue
        waited = {one.tenant for one in server.waiting}
        one = server.serve()
        if one is None:
            continue
        arrivals[one.tenant].append(one.arrival)
        for pair in permutations("abc", 2):
            if pair[1] not in waited:
                leads[pair] = 0
            elif pair[0] == one.tenant:
                leads[pair] += one.num_tokens
            elif pair[1] == one.tenant:
                leads[pair] = max(leads[pair] - one.num_tokens, 0)
            assert leads[pair] <= 2 * _MOST_TOKENS, f"{pair[0]} is served while {pair[1]} waits"
    assert all(found == sorted(found) for found in arrivals.values())
    assert not server.turns._clocks, "it remembers who has left"


def test_who_comes_again_and_again_does_not_come_next_each_time() -> None:
    server = _Server()
    for _ in range(5):
        server.arrive("crowd", 10)
    served = []
    for _ in range(10):
        if not any(one.tenant == "alone" for one in server.waiting):
            server.arrive("alone", 10)
        one = server.serve()
        assert one is not None
        served.append(one.tenant)
        server.end()
    assert served == ["crowd", "alone"] * 5


def test_nobody_saves_turns_up() -> None:
    server = _Server()
    server.arrive("rare", 10)
    for _ in range(40):
        server.arrive("crowd", 10)
    for _ in range(20):
        server.serve()
    for _ in range(10):
        server.arrive("rare", 10)
    served = [one.tenant for one in iter(server.serve, None)]
    assert served[:10] == ["rare", "crowd"] * 5


def test_tenants_that_left_are_forgotten_when_they_are_many() -> None:
    turns = Turns()
    turns.enter(0, "stays", 1, 0)
    for number in range(10_000):
        turns.enter(0, str(number), 1, 0)
        turns.leave(0, str(number), 0, 0)
    assert len(turns._clocks[0].tenants) <= 1024
    assert "stays" in turns._clocks[0].tenants


@given(st.lists(st.integers(1, _MOST_TOKENS), min_size=1, max_size=30))
def test_one_tenant_is_served_in_order_of_arrival(sizes: list[int]) -> None:
    server = _Server()
    for size in sizes:
        server.arrive("a", size)
    order = [one.arrival for one in iter(server.serve, None)]
    assert order == list(range(len(sizes)))


def request(
    number: int,
    tenant: str,
    num_tokens: int = 1,
    priority: int = 0,
    credit_tokens: int | None = None,
) -> Request:
    """A prompt of four tokens that no other begins like."""
    prompt = list(range(1000 * number, 1000 * number + 4))
    sampling, stop = SamplingParams(seed=number), StopParams(num_tokens)
    return Request(
        number,
        prompt,
        sampling,
        stop,
        priority=priority,
        cache_salt=tenant,
        credit_tokens=credit_tokens,
    )


def one_at_a_time() -> Drive:
    """An engine with one row."""
    return Drive(small_limits(max_sequences=1), max_unread_steps=0)


def order_of(drive: Drive) -> list[int]:
    """In which requests had their first tokens."""
    return [output.request_id for output in drive.outputs if output.num_cached_tokens is not None]


def test_newcomer_comes_next_however_many_of_another_tenant_wait() -> None:
    drive = one_at_a_time()
    drive.add(*(request(number, "flood") for number in range(100)))
    for _ in range(10):
        drive.step()
    begun = len(order_of(drive))
    drive.add(request(200, "quiet"), request(201, "quiet"))
    drive.run()
    places = [order_of(drive).index(number) - begun for number in (200, 201)]
    assert places[0] <= 1
    assert places[1] - places[0] <= 2
    assert [n for n in order_of(drive) if n < 100] == list(range(100))
    drive.check_empty()


def test_tenants_share_tokens_and_not_requests() -> None:
    """One draws 40 tokens a request, the other 4; both always have more that wait."""
    drive = Drive(small_limits(max_sequences=4))
    tenant_of: dict[int, str] = {}
    lengths = {"long": 40, "short": 4}

    def fill() -> None:
        live = Counter(tenant_of[number] for number in drive.scheduler._groups)
        for tenant, length in lengths.items():
            for _ in range(12 - live[tenant]):
                number = len(tenant_of)
                tenant_of[number] = tenant
                drive.add(request(number, tenant, length))

    used: dict[str, int] = {}
    for step in range(4000):
        fill()
        drive.step()
        if step in (400, 3999):
            now = Counter({t: 4 * sum(tenant_of[n] == t for n, _ in drive.tokens) for t in lengths})
            for (number, _), tokens in drive.tokens.items():
                now[tenant_of[number]] += len(tokens)
            used = {t: now[t] - used.get(t, 0) for t in lengths}
    assert 0.85 < used["long"] / used["short"] < 1.15


def test_who_drew_alone_does_not_wait_for_who_comes_later() -> None:
    drive = Drive(small_limits(max_sequences=2), max_unread_steps=0)
    drive.add(request(0, "alone", 100), request(1, "alone", 200))
    while (0, 0) not in drive.finishes:
        drive.step()
    drive.add(*(request(number, "flood") for number in range(2, 40)))
    drive.add(request(50, "alone"))
    drive.run()
    assert order_of(drive).index(50) <= 4


def test_priority_goes_before_turns() -> None:
    drive = one_at_a_time()
    drive.add(*(request(number, "flood", priority=1) for number in range(5)))
    drive.add(request(10, "quiet"))
    drive.run()
    assert order_of(drive) == [0, 1, 2, 3, 4, 10]


def test_changed_priority_takes_the_next_turn_there() -> None:
    """Turns of one priority say nothing in another: who comes from one that was long in use would wait for ever."""
    drive = one_at_a_time()
    for number in range(20):
        drive.add(request(number, "a"), request(100 + number, "b"))
        drive.run()
    drive.add(request(30, "a", 50))
    drive.step()
    drive.add(*(request(number, "a") for number in range(31, 51)))
    late = deque(range(51, 60))
    drive.scheduler.update(50, priority=1)
    while late:
        drive.add(request(late.popleft(), "b", priority=1))
    drive.run()
    after = order_of(drive)[order_of(drive).index(30) :]
    assert after[1] == 50
    drive.check_empty()


def test_flood_pays_for_what_it_draws_while_the_rest_of_it_waits() -> None:
    """Its requests all came at once, before anybody knew how long their answers are. Who asks one by one, for as
    long answers, must not be the only one whose answers count."""
    drive = one_at_a_time()
    drive.add(*(request(number, "flood", 40) for number in range(30)))
    drive.step()
    for number in range(100, 108):
        drive.add(request(number, "quiet", 40))
        while (number, 0) not in drive.finishes:
            drive.step()
    begun = order_of(drive)
    between = begun[begun.index(100) : begun.index(107)]
    assert Counter(n < 100 for n in between)[True] <= 8


def test_requests_without_credit_save_no_turns_up() -> None:
    drive = one_at_a_time()
    drive.add(*(request(number, "saver", credit_tokens=0) for number in range(100, 130)))
    drive.add(*(request(number, "other") for number in range(60)))
    while len(order_of(drive)) < 30:
        drive.step()
    for number in range(100, 130):
        drive.scheduler.credit(number, 1)
    drive.run()
    after = order_of(drive)[31:]
    assert 4 <= sum(number < 100 for number in after[:10]) <= 6


def test_what_was_drawn_alone_is_not_owed_to_who_comes_before_its_end() -> None:
    drive = Drive(small_limits(max_sequences=2), max_unread_steps=0)
    drive.add(request(0, "alone", 200), request(1, "alone", 200))
    for _ in range(195):
        drive.step()
    drive.add(*(request(number, "flood") for number in range(2, 60)))
    drive.add(request(60, "alone"), request(61, "alone"))
    drive.run()
    # Both drew a few tokens more, which are worth a few of the flood's requests.
    assert order_of(drive).index(61) <= 12


def test_what_is_drawn_while_another_waits_counts_though_that_one_gave_up() -> None:
    drive = one_at_a_time()
    drive.add(request(0, "long", 120))
    drive.step()
    drive.add(request(1, "other"))
    for _ in range(60):
        drive.step()
    drive.scheduler.abort(1)
    for _ in range(50):
        drive.step()
    drive.add(*(request(number, "other") for number in range(2, 60)))
    drive.add(request(60, "long"), request(61, "long"))
    drive.run()
    # 60 tokens and more, five of them for a request of the other's.
    assert 12 <= order_of(drive).index(61) <= 20
