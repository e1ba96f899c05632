"""What a load consists of: when requests are sent and how long they are; pure, and repeatable.

A plan is an iterator of `Planned` requests. Arrivals are moments of an open loop, or None where a
closed loop sends the next request when one has ended.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

# Prompt ids are drawn from these: every model knows the low ones, and no prompt repeats another, so
# that nothing is found in a prefix cache.
TOKEN_RANGE = (10, 250)


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to be sent.

    Args:
        at_s: when, in seconds from the load's begin; None: when the loop has room.
    """

    number: int
    at_s: float | None
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens from `low` to `high`, both included."""

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> "Lengths":
        """`64`, or `32-128`: uniform between them.

        Raises:
            ValueError: it is neither; the message says so.
        """
        first, dash, last = text.partition("-")
        try:
            low = int(first)
            lengths = Lengths(low, int(last) if dash else low)
        except ValueError:
            lengths = Lengths(0, 0)
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} is no number of tokens: 64, or a range such as 32-128")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return rng.randint(self.low, self.high)

    def clip(self, length: int) -> int:
        """The nearest of them."""
        return min(max(length, self.low), self.high)


def open_loop(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Moments of arrival, in seconds, without end; the gaps are gamma-distributed.

    Args:
        rate: requests a second, on average.
        burstiness: the gamma distribution's shape: 1 is Poisson, less comes in bursts, more is
            more regular.
    """
    rng = random.Random(f"arrivals/{seed}")
    at_s = 0.0
    while True:
        yield at_s
        at_s += rng.gammavariate(burstiness, 1 / (rate * burstiness))


def drawn_lengths(inputs: Lengths, outputs: Lengths, seed: int) -> Iterator[tuple[int, int]]:
    """Prompt and answer lengths, without end."""
    rng = random.Random(f"lengths/{seed}")
    while True:
        yield inputs.draw(rng), outputs.draw(rng)


def plan(
    arrivals: Iterator[float] | None, lengths: Iterator[tuple[int, int]], limit: int | None
) -> Iterator[Planned]:
    """The requests of a load, in order; ends with the first that ends of its sources.

    Args:
        arrivals: None: a closed loop.
        limit: requests at most.
    """
    numbers = count() if limit is None else iter(range(limit))
    for number in numbers:
        at_s = None if arrivals is None else next(arrivals, -1.0)
        pair = next(lengths, None)
        if pair is None or at_s == -1.0:
            return
        yield Planned(number, at_s, *pair)


def prompt_of(planned: Planned, seed: int) -> list[int]:
    """Its prompt, in token ids: the same for the same seed, and no other's."""
    draw = random.Random(f"{seed}/{planned.number}")
    return draw.choices(range(*TOKEN_RANGE), k=planned.input_tokens)
