"""When those that a full queue turns away may come back.

They are treated as a line outside the door: each is told when its turn would come, at the rate at
which the queue was last seen to drain. So they are asked back spread out, as fast as there is room for
them, and the later the more there are. The turns of those that do not come are not given to others.
Source: the virtual scheduling of ITU-T I.371, whose theoretical arrival time is the last turn here.
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


class LineOutside:
    """The line before one queue, in tokens of prompts."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_turn_s = -math.inf
        self._tokens_per_s = 0.0
        # What has left the queue since somebody was turned away who began a look at it.
        self._num_left, self._look_began_s = 0, -math.inf

    def left_queue(self, num_tokens: int) -> None:
        """So many tokens wait inside no more."""
        self._num_left += num_tokens

    @property
    def wait_s(self) -> float:
        """Seconds until the last that stands in it now may come back."""
        return max(self._last_turn_s - self._clock(), 0.0)

    def join(self, num_tokens: int, queue_tokens: int) -> float:
        """Seconds until whoever is turned away with `num_tokens` may come back.

        Args:
            queue_tokens: that wait inside; who has more counts as so many, lest one sends all others away.
        """
        now_s = self._clock()
        self._look(now_s)
        queue_tokens = max(queue_tokens, 1)
        num_tokens = min(num_tokens, queue_tokens)
        tokens_per_s = self._tokens_per_s or queue_tokens / _GUESSED_S
        delay_s = max(self._last_turn_s - now_s, 0.0) + num_tokens / tokens_per_s
        if delay_s > MOST_S:
            # Nobody is told to stay away for longer, nor are all these to come back at one moment.
            delay_s = MOST_S / 2
        # What others were told stays, whatever is found out about the rate.
        self._last_turn_s = now_s + delay_s
        return max(round(math.ceil(delay_s / _STEP_S) * _STEP_S, 1), LEAST_S)

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
