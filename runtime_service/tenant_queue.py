"""Room for prompts that wait, shared among tenants: before an engine, before threads that read text, at a gateway."""

from collections.abc import Hashable

from runtime_service.line_outside import LineOutside
from shared.errors import QueueFull


class TenantQueue:
    """Prompts that wait, each for what is its owner's, and the lines of those that found no room.

    One tenant may fill it. Others find room all the same, each up to an equal share, until twice as many tokens wait:
    nothing that was taken is thrown out for them, and what is too much drains, as whoever has more is refused.
    """

    def __init__(self, most_tokens: int) -> None:
        self.num_tokens = 0
        self._most_tokens = most_tokens
        self._waiting: dict[Hashable, tuple[str, int]] = {}
        # Of tenants that have any.
        self._num_tokens_of: dict[str, int] = {}
        self._line = LineOutside()

    def __contains__(self, owner: Hashable) -> bool:
        return owner in self._waiting

    def check_room(self, num_tokens: int, tenant: str) -> None:
        """Claims that a prompt of so many tokens may come to wait, whatever its length.

        Raises:
            QueueFull: as many tokens wait as may, and the tenant has its share of them.
        """
        if self.num_tokens >= self._most_tokens and not self._has_share_for(tenant):
            raise QueueFull(
                waiting_tokens=self.num_tokens,
                max_waiting_tokens=self._most_tokens,
                retry_after_s=self._line.join(tenant, num_tokens, self.num_tokens),
            )

    def add(self, owner: Hashable, tenant: str, num_tokens: int) -> None:
        """Has a prompt wait."""
        self._waiting[owner] = tenant, num_tokens
        self._num_tokens_of[tenant] = self._num_tokens_of.get(tenant, 0) + num_tokens
        self.num_tokens += num_tokens

    def take(self, owner: Hashable) -> tuple[str, int] | None:
        """Its tenant and its tokens, which wait no more; None where it does not wait."""
        taken = self._waiting.pop(owner, None)
        if taken is not None:
            tenant, num_tokens = taken
            self.num_tokens -= num_tokens
            self._num_tokens_of[tenant] -= num_tokens
            if not self._num_tokens_of[tenant]:
                del self._num_tokens_of[tenant]
            self._line.left_queue(num_tokens)
        return taken

    def _has_share_for(self, tenant: str) -> bool:
        own = self._num_tokens_of.get(tenant, 0)
        num_tenants = len(self._num_tokens_of) + (not own)
        return own * num_tenants < self._most_tokens and self.num_tokens < 2 * self._most_tokens
