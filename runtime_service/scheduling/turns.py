"""When whose sequences come: tenants share an engine's tokens equally, each priority by itself.

Every request has a turn, a time on a clock that counts tokens: once it is the first of its tenant's that wait, so that
what those before it drew counts. A tenant's next turn comes as many tokens after the one before as that has known, and
as many more as it has drawn by then beside others; but not before now. What it drew alone took nothing from anybody.
Whoever waits with the least turn is next. So a tenant's own requests stay in order, and where only one has requests
that is the order of arrival.
Source: Goyal et al. 1996, "Start-time fair queueing"; drawn tokens are counted as they become known, as in Sheng et
al. 2024, "Fairness in serving large language models".
"""

from dataclasses import dataclass, field

# Of each priority. Beyond so many, and twice those that have requests, those that have none are forgotten.
_MOST_TENANTS = 1024


@dataclass(slots=True)
class _Tenant:
    next_turn: int
    num_requests: int = 0


@dataclass(slots=True)
class _Clock:
    """Of one priority: the last turn that has come, whose next ones are known, and how long they have shared."""

    now: int = 0
    # Tenants that have requests. While there are several, steps count as shared.
    num_present: int = 0
    shared_since_step: int = 0
    num_shared_steps: int = 0
    tenants: dict[str, _Tenant] = field(default_factory=dict)
    most_tenants: int = _MOST_TENANTS


class Turns:
    """The clocks of the priorities that have requests."""

    def __init__(self) -> None:
        self._clocks: dict[int, _Clock] = {}

    @property
    def is_empty(self) -> bool:
        """Claims that no request has a turn."""
        return not self._clocks

    def enter(self, priority: int, tenant: str, num_tokens: int, step: int) -> int:
        """The turn of a request that is next of its tenant's, and knows so many tokens; it ends with `leave`.

        Args:
            step: number of the next one; so below.
        """
        clock = self._clocks.setdefault(priority, _Clock())
        found = clock.tenants.get(tenant)
        if found is None:
            if len(clock.tenants) >= clock.most_tenants:
                _forget(clock)
            found = clock.tenants[tenant] = _Tenant(clock.now)
        turn = max(clock.now, found.next_turn)
        found.next_turn = turn + num_tokens
        if not found.num_requests:
            clock.num_present += 1
            if clock.num_present == 2:
                clock.shared_since_step = step
        found.num_requests += 1
        return turn

    def came(self, priority: int, turn: int) -> None:
        """A request of this turn runs."""
        clock = self._clocks[priority]
        clock.now = max(clock.now, turn)

    def num_shared_steps(self, priority: int, step: int) -> int:
        """Steps until now in which several tenants had requests."""
        clock = self._clocks[priority]
        ongoing = step - clock.shared_since_step if clock.num_present > 1 else 0
        return clock.num_shared_steps + ongoing

    def leave(self, priority: int, tenant: str, num_tokens: int, step: int) -> None:
        """A request has ended, or has another priority now.

        Args:
            num_tokens: that it has drawn in shared steps.
        """
        clock = self._clocks[priority]
        found = clock.tenants[tenant]
        found.next_turn += num_tokens
        # It stays known: who comes with one request at a time would else come next each time.
        found.num_requests -= 1
        if found.num_requests:
            return
        clock.num_present -= 1
        if clock.num_present == 1:
            clock.num_shared_steps += step - clock.shared_since_step
        elif not clock.num_present:
            del self._clocks[priority]


def _forget(clock: _Clock) -> None:
    clock.tenants = {name: one for name, one in clock.tenants.items() if one.num_requests}
    clock.most_tenants = max(2 * len(clock.tenants), _MOST_TENANTS)
