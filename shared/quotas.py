"""What a tenant may use: requests a second, tokens a minute, generations at once, priorities.

Counted in this daemon's memory: with n runtimes a tenant has up to n times its limits, unless all
of its calls come through one gateway. Tokens are reserved when a generation is admitted (prompt and
all that it may generate) and corrected to what it used when it ends.
"""

import threading
import time
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from shared.errors import InvalidField, QuotaExceeded


class Limits(BaseModel):
    """A tenant's limits; 0 sets none, but for `max_priority`.

    Args:
        max_priority: the highest that its generations may have; None: any. By 0 it may let others go first, and goes
            before nobody.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_s: float = Field(default=0.0, ge=0)
    tokens_per_min: int = Field(default=0, ge=0)
    concurrent: int = Field(default=0, ge=0)
    max_priority: int | None = Field(default=0, ge=0)


NO_LIMITS = Limits(max_priority=None)


class TokenBucket:
    """A bucket that holds up to `capacity` and gains `rate_per_s`; full at first.

    What costs more than the capacity is let through by a full bucket, which is then in debt for as
    long as the rest takes: the mean rate holds, and nobody is refused for ever.
    Source: Turner 1986, "New directions in communications"; the leaky bucket as a meter.
    """

    def __init__(self, capacity: float, rate_per_s: float, now_s: float) -> None:
        assert capacity > 0, "a bucket that holds nothing lets nothing through"
        assert rate_per_s > 0, "a bucket without a rate is no limit"
        self.capacity, self.rate_per_s = capacity, rate_per_s
        self._level, self._now_s = capacity, now_s

    def take(self, cost: float, now_s: float) -> float:
        """0 if `cost` was taken; else nothing was, and it may be in that many seconds."""
        self._fill(now_s)
        lacking = min(cost, self.capacity) - self._level
        # Seconds as they are told are rounded: who waited so long is not sent away for an atom.
        if lacking > self.rate_per_s * 1e-3:
            return lacking / self.rate_per_s
        self._level -= cost
        return 0.0

    def correct(self, unused: float, now_s: float) -> None:
        """Returns what was taken and not used, or takes, if negative, what was used beyond it."""
        self._fill(now_s)
        self._level = min(self.capacity, self._level + unused)

    def _fill(self, now_s: float) -> None:
        gained = max(0.0, now_s - self._now_s) * self.rate_per_s
        self._now_s = max(now_s, self._now_s)
        self._level = min(self.capacity, self._level + gained)


class TenantQuota:
    """One tenant's limits and what is used of them; without limits it refuses nothing."""

    def __init__(
        self, limits: Limits = NO_LIMITS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_running = 0
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self.limits = NO_LIMITS
        self.set_limits(limits)

    def set_limits(self, limits: Limits) -> None:
        """Changes the limits; what runs goes on."""
        if limits == self.limits:
            return
        now_s, rate, tokens = self._clock(), limits.requests_per_s, limits.tokens_per_min
        with self._lock:
            self.limits = limits
            # One second's requests may come at once, and a minute's tokens.
            self._requests = TokenBucket(max(1.0, rate), rate, now_s) if rate else None
            self._tokens = TokenBucket(tokens, tokens / 60, now_s) if tokens else None

    def count_request(self) -> None:
        """Counts a call, or a start on a call that carries many.

        Raises:
            QuotaExceeded: too many in this second.
        """
        with self._lock:
            self._take(self._requests, 1, "requests_per_s", self.limits.requests_per_s)

    def check_concurrent(self) -> None:
        """Claims that one more generation may run now.

        Raises:
            QuotaExceeded: as many as may run do.
        """
        with self._lock:
            self._check_concurrent(self._num_running)

    def check_priority(self, priority: int, field: str) -> None:
        """Claims that a generation may have this priority, which `field` of a command says.

        Raises:
            InvalidField: it is higher than the tenant's may be.
        """
        allowed = self.limits.max_priority
        if allowed is not None and priority > allowed:
            problem = f"must be at most {allowed} for this tenant, found {priority}"
            raise InvalidField(field=field, problem=problem)

    def open_generation(self, in_place_of: "GenerationQuota | None" = None) -> "GenerationQuota":
        """The share of a generation that begins; give it back with `close`.

        Args:
            in_place_of: what it resumes, if that still holds a share: the two count as one.
        Raises:
            QuotaExceeded: as many as may run do.
        """
        with self._lock:
            num_others = self._num_running - (in_place_of is not None and in_place_of.is_open)
            self._check_concurrent(num_others)
            self._num_running += 1
        return GenerationQuota(self)

    def take_tokens(self, num_tokens: int) -> None:
        """Takes tokens from this minute's.

        Raises:
            QuotaExceeded: there are too few.
        """
        with self._lock:
            self._take(self._tokens, num_tokens, "tokens_per_min", self.limits.tokens_per_min)

    def close_generation(self, num_unused_tokens: int) -> None:
        """A generation has ended; negative where it used more tokens than it took."""
        with self._lock:
            self._num_running -= 1
            if self._tokens is not None:
                self._tokens.correct(num_unused_tokens, self._clock())

    def _check_concurrent(self, num_others: int) -> None:
        allowed = self.limits.concurrent
        if allowed and num_others >= allowed:
            # When one of them will end nobody knows: the error has a delay of its own.
            raise QuotaExceeded(limit="concurrent", allowed=allowed)

    def _take(self, bucket: TokenBucket | None, cost: float, limit: str, allowed: float) -> None:
        wait_s = 0.0 if bucket is None else bucket.take(cost, self._clock())
        if wait_s:
            raise QuotaExceeded(limit=limit, allowed=f"{allowed:g}", retry_after_s=wait_s)


class GenerationQuota:
    """What one running generation holds of its tenant's quota."""

    def __init__(self, tenant: TenantQuota) -> None:
        self._tenant = tenant
        self._num_reserved_tokens = 0
        self._is_closed = False

    @property
    def is_open(self) -> bool:
        """Claims that it counts as running."""
        return not self._is_closed

    def reserve(self, num_tokens: int) -> None:
        """Takes the most that it may use as it is asked now, prompt included.

        Raises:
            QuotaExceeded: the tenant has too few tokens left in this minute.
        """
        self._tenant.take_tokens(num_tokens)
        self._num_reserved_tokens += num_tokens

    def close(self, num_used_tokens: int) -> None:
        """It has ended; what it did not use is given back. Again: a no-op."""
        if not self._is_closed:
            self._is_closed = True
            self._tenant.close_generation(self._num_reserved_tokens - num_used_tokens)


class Quotas:
    """The quotas of all tenants that called."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tenants: dict[str, TenantQuota] = {}
        self._lock = threading.Lock()

    def of(self, tenant: str, limits: Limits) -> TenantQuota:
        """The tenant's quota, under the limits that hold now."""
        with self._lock:
            quota = self._tenants.get(tenant)
            if quota is None:
                quota = self._tenants[tenant] = TenantQuota(limits, self._clock)
        quota.set_limits(limits)
        return quota
