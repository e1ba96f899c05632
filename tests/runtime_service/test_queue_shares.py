"""Room in a runtime's queue: all of it for one tenant, an equal share for each of several."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_service.tenant_queue import TenantQueue
from shared.errors import QueueFull

MOST = 100


class Clients:
    """Tenants that ask for room in one queue."""

    def __init__(self) -> None:
        self.queue = TenantQueue(MOST)
        self.waiting: Counter[str] = Counter()
        self._tenants: list[str] = []

    def ask(self, tenant: str, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens waits now."""
        try:
            self.queue.check_room(num_tokens, tenant)
        except QueueFull:
            return False
        self.queue.add(len(self._tenants), tenant, num_tokens)
        self._tenants.append(tenant)
        self.waiting[tenant] += num_tokens
        return True

    def leave(self, number: int) -> None:
        """This one waits no more, if it did."""
        if (taken := self.queue.take(number)) is not None:
            self.waiting[taken[0]] -= taken[1]

    def fill(self, tenant: str) -> None:
        """Has a tenant ask until it is refused."""
        while self.ask(tenant, 10):
            pass


def test_one_tenant_fills_the_queue_and_no_more() -> None:
    clients = Clients()
    clients.fill("a")
    assert clients.waiting["a"] == MOST


def test_another_tenant_finds_its_share_in_a_full_queue() -> None:
    clients = Clients()
    clients.fill("a")
    clients.fill("b")
    clients.fill("a")
    assert clients.waiting == {"a": MOST, "b": MOST / 2}


def test_who_has_more_than_its_share_is_refused_until_there_is_room_for_all() -> None:
    clients = Clients()
    clients.fill("a")
    clients.fill("b")
    for number in range(5):
        assert not clients.ask("a", 10)
        clients.leave(number)
    assert not clients.ask("a", 10)
    clients.leave(5)
    assert clients.ask("a", 10)


def test_tenant_beyond_its_share_is_told_of_its_own_line_outside() -> None:
    clients = Clients()
    clients.fill("flood")
    clients.fill("quiet")
    delays = {}
    for tenant in ["flood"] * 100 + ["quiet"]:
        with pytest.raises(QueueFull) as refused:
            clients.queue.check_room(MOST // 10, tenant)
        delays[tenant] = refused.value.retry_after_s
    assert delays["flood"] >= 5.0
    assert delays["quiet"] < 1.0


_steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 40)),
        st.integers(0, 60),
    ),
    max_size=120,
)


@given(_steps)
def test_queue_refuses_nobody_under_its_share_before_it_is_twice_full(
    steps: list[tuple[str, int] | int],
) -> None:
    clients = Clients()
    for step in steps:
        if isinstance(step, int):
            clients.leave(step)
            continue
        tenant, num_tokens = step
        others = {name for name, n in clients.waiting.items() if n and name != tenant}
        share, total = MOST / (len(others) + 1), clients.waiting.total()
        has_room = clients.ask(tenant, num_tokens)
        own = clients.waiting[tenant] - has_room * num_tokens
        assert has_room == (total < MOST or (own < share and total < 2 * MOST))
        assert clients.queue.num_tokens == clients.waiting.total() < 2 * MOST + 40
