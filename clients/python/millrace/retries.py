"""Whether and when a failed call is tried again; pure.

Only calls that are safe to send twice come here: reads, BuildEngine (named by what it makes), and
those of a generation (see `millrace.attempts`).
"""

from dataclasses import dataclass
from random import uniform

from millrace.errors import MillraceError, is_lost_call

# What a daemon says of a build that it has no record of.
_FORGOTTEN = "BUILD_NOT_FOUND"
# A watch that ends after so long is none that fails at once.
LASTING_WATCH_S = 5.0


@dataclass(frozen=True, slots=True)
class Retries:
    """How patient a client is.

    Args:
        max_attempts: calls in all; 1 never tries again.
        first_delay_s: doubles with each attempt, where the daemon does not name a delay.
        max_delay_s: a daemon that asks for a longer wait is not waited for.
    """

    max_attempts: int = 4
    first_delay_s: float = 0.1
    max_delay_s: float = 30.0

    def delay_s(self, error: MillraceError, attempt: int) -> float | None:
        """How long to wait before another try, or None where there is to be none.

        Args:
            attempt: calls made so far, at least 1.
        """
        if attempt >= self.max_attempts:
            return None
        if error.retry_after_s is not None:
            delay_s = error.retry_after_s
        elif is_lost_call(error):
            delay_s = self.first_delay_s * 2.0 ** (attempt - 1)
        else:
            return None
        # Spread out, so that refused clients do not come back all at once.
        return None if delay_s > self.max_delay_s else delay_s * uniform(1.0, 1.25)

    def asks_again(self, error: MillraceError, attempt: int) -> bool:
        """Whether a build of which nobody knows any more is asked for once more: asking twice is asking once.

        Args:
            attempt: calls made so far that told nothing, at least 1.
        """
        return error.reason == _FORGOTTEN and attempt < self.max_attempts
