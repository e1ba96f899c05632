"""When those that a full queue turns away may come back.

They are treated as lines outside the door, one for each tenant, that go in by turns: each is told when its
turn would come, at the rate at which the queue was last seen to drain. So they are asked back spread out, as fast
as there is room for them, and the later the more there are; but of each other tenant no more come first than of
one's own. The turns of those that do not come are not given to others.
Source: the virtual scheduling of ITU-T I.371, whose theoretical arrival time is a line's last turn here.
"""

import math
import time
from collections.abc import Callable

LEAST_S, MOST_S = 0.1, 30.0
# Delays are told in such steps: those that come close together are told the same.
_STEP_S = 0.1
# The queue drains in fits: a rate is that of so long at least. A look that took longer than the
# other says too little of now, for the queue may have had room meanwhile.
_LEAST_LOOK_S, _MOST_LOOK_S = 0.5, 10.0
_SMOOTHING = 0.3
# What a whole queue takes, as long as nothing was seen to leave it.
_GUESSED_S = 1.0
# Tenants that come while so many have lines of their own stand in one together: callers may name any number.
_MOST_LINES = 128


class LineOutside:
    """The lines before one queue, in tokens of prompts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By tenant; those of lines that have gone in are dropped when another tenant comes.
        self._last_turns_s: dict[str, float] = {}
        self._tokens_per_s = 0.0
        # What has left the queue since somebody was turned away who began a look at it.
        self._num_left, self._look_began_s = 0, -math.inf

    def left_queue(self, num_tokens: int) -> None:
        """So many tokens wait inside no more."""
        self._num_left += num_tokens

    def delay_s(self, tenant: str, num_tokens: int, queue_tokens: int) -> float:
        """Seconds until whoever would be turned away now might come back; as `join`, which has it stand there."""
        now_s = self._clock()
        queue_tokens = max(queue_tokens, 1)
        own_s = min(num_tokens, queue_tokens) / (self._tokens_per_s or queue_tokens / _GUESSED_S)
        begin_s = max(self._last_turns_s.get(tenant, 0.0), now_s)
        turn_s = begin_s + own_s
        for other_s in self._last_turns_s.values():
            # As much of each other line as is added to this one goes in meanwhile, or what is left of it.
            if other_s > begin_s:
                turn_s += min(other_s - begin_s, own_s)
        delay_s = turn_s - now_s
        # Nobody is told to stay away for longer, nor are all these to come back at one moment.
        return delay_s if delay_s <= MOST_S else MOST_S / 2

    def join(self, tenant: str, num_tokens: int, queue_tokens: int) -> float:
        """Seconds until whoever is turned away with `num_tokens` may come back.

        Args:
            queue_tokens: that wait inside; who has more counts as so many, lest one sends all others away.
        """
        now_s = self._clock()
        self._look(now_s)
        if tenant not in self._last_turns_s:
            tenant = self._new_line(tenant, now_s)
        delay_s = self.delay_s(tenant, num_tokens, queue_tokens)
        # What others were told stays, whatever is found out about the rate.
        self._last_turns_s[tenant] = now_s + delay_s
        return max(round(math.ceil(delay_s / _STEP_S) * _STEP_S, 1), LEAST_S)

    def _new_line(self, tenant: str, now_s: float) -> str:
        """The name of the line in which a tenant stands that has none."""
        self._last_turns_s = {name: s for name, s in self._last_turns_s.items() if s > now_s}
        return tenant if len(self._last_turns_s) < _MOST_LINES else ""

    def _look(self, now_s: float) -> None:
        """Takes note of how fast the queue drains, once it was looked at for long enough."""
        took_s = now_s - self._look_began_s
        if took_s < _LEAST_LOOK_S:
            return
        if took_s <= _MOST_LOOK_S:
            if not self._num_left:
                return
            rate = self._num_left / took_s
            known = self._tokens_per_s or rate
            self._tokens_per_s = known + _SMOOTHING * (rate - known)
        self._num_left, self._look_began_s = 0, now_s
