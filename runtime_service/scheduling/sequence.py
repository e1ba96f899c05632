"""One request's samples and how far each has come, in integers.

Host counts run ahead of the device's results: what a launched step will draw is counted as drawn.
"""

from enum import Enum

from runtime_service.engine_messages import SampleOutput
from runtime_service.scheduling.output import TokenLogprobs
from runtime_service.scheduling.request import Request

NEVER = 1 << 62
# Priority, negated; its tenant's turn; arrival; sample.
Order = tuple[int, int, int, int]


class State(Enum):
    """Where a sequence stands.

    QUEUED: in the waiting queue.
    PARKED: neither row nor queue: waits for its first sample's prompt, for credit, or for a step
        that was launched before it was preempted.
    RUNNING: holds a row and blocks.
    STALLED: likewise, but is not scheduled until there is credit.
    FINISHED: ended; holds row and blocks until the last step that it is in was read.
    """

    QUEUED = 1
    PARKED = 2
    RUNNING = 3
    STALLED = 4
    FINISHED = 5


class Group:
    """The samples of one request and what they share.

    Args:
        arrival: counts requests; earlier ones go first.
        max_sequence_tokens: the engine's limit.
        root_name: begins the names of its blocks.
    """

    __slots__ = (
        "arrival", "arrival_s", "credit", "end_token_ids", "has_turn", "is_metered", "leader",
        "max_sequence_tokens", "max_tokens", "num_cached_tokens", "num_prompt_tokens",
        "num_unfinished", "priority", "prompt_logprobs", "request", "request_id", "samples",
        "shared_from", "uses_prefix_cache",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        arrival: int,
        arrival_s: float,
        max_sequence_tokens: int,
        root_name: bytes,
    ) -> None:
        known = request.prompt_token_ids + request.resumed_token_ids
        self.request = request
        self.request_id = request.request_id
        self.priority = request.priority
        # Its samples have their places in the order.
        self.has_turn = False
        # How many steps its tenant had shared when it began, or took another priority.
        self.shared_from = 0
        self.arrival = arrival
        self.arrival_s = arrival_s
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_sequence_tokens = max_sequence_tokens
        self.max_tokens = min(
            self.num_prompt_tokens + request.stop.max_new_tokens, max_sequence_tokens
        )
        self.end_token_ids = frozenset(request.stop.end_token_ids)
        self.is_metered = request.credit_tokens is not None
        # Tokens that may be drawn beside those of launched steps; stays 1 where not metered.
        self.credit = 1 if request.credit_tokens is None else request.credit_tokens
        # Prompt logprobs need every position computed. They go out with the first output.
        self.uses_prefix_cache = not request.sampling.prompt_logprobs
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            [] if request.sampling.prompt_logprobs else None
        )
        self.num_cached_tokens: int | None = None
        self.samples = [
            Sequence(self, index, list(known), [root_name]) for index in range(request.num_samples)
        ]
        self.num_unfinished = len(self.samples)
        # The sample that computes the prompt; the others wait until it has. None: it has.
        self.leader: Sequence | None = self.samples[0] if len(self.samples) > 1 else None

    @property
    def num_known_tokens(self) -> int:
        """Tokens of its prompt, and those that it came with."""
        return self.num_prompt_tokens + len(self.request.resumed_token_ids)

    @property
    def num_drawn_tokens(self) -> int:
        """Tokens that were drawn here, over all samples."""
        known = self.num_known_tokens
        return sum(len(sample.token_ids) - known for sample in self.samples)

    def limit_new_tokens(self, max_new_tokens: int) -> None:
        """Ends its samples at this many generated tokens, resumed ones included."""
        self.max_tokens = min(self.num_prompt_tokens + max_new_tokens, self.max_sequence_tokens)
        for sample in self.samples:
            sample.plan_event()


class Sequence:
    """One sample: its tokens, its row and its blocks.

    `num_tokens` counts known tokens and those that launched steps will draw. `num_scheduled` counts
    those whose keys and values launched steps have computed, until it `is_decoding`: then all but
    the last.
    """

    __slots__ = (
        "block_ids", "capacity", "group", "has_output", "is_decoding", "last_step", "names",
        "next_event", "next_remembered", "num_scheduled", "num_tokens", "order", "prompt_step",
        "queued_s", "row", "sample_index", "state", "token_ids", "waiting_tokens",
    )  # fmt: skip

    def __init__(
        self, group: Group, sample_index: int, token_ids: list[int], names: list[bytes]
    ) -> None:
        self.group = group
        self.sample_index = sample_index
        self.token_ids = token_ids
        self.names = names
        self.state = State.PARKED
        # Given with the group's turn.
        self.order: Order = (0, 0, 0, 0)
        self.num_tokens = len(token_ids)
        # The last step that it is in; what that step drew is known when it was read.
        self.last_step = -1
        self.waiting_tokens = 0
        self.queued_s: float | None = None
        self.has_output = False
        self.leave()

    def leave(self) -> None:
        """Forgets the row and all that was computed there."""
        self.row = -1
        self.block_ids: list[int] = []
        self.capacity = 0
        self.num_scheduled = 0
        self.is_decoding = False
        # When the last token of the prompt is computed: from the step after, samples can fork.
        self.prompt_step = NEVER
        # Tokens that must be read back before the next block can be remembered.
        self.next_remembered = NEVER
        self.plan_event()

    def plan_event(self) -> None:
        """Notes from how many tokens on decoding takes more than a place in the step."""
        group = self.group
        self.next_event = 0 if group.is_metered else min(self.capacity + 1, group.max_tokens)

    def output(self, token_ids: tuple[int, ...], finish: str) -> SampleOutput:
        """What it gained, where no logprobs come with it."""
        if not self.has_output:
            return self.first_output(token_ids, finish)
        return SampleOutput(self.group.request_id, self.sample_index, token_ids, finish)

    def first_output(
        self, token_ids: tuple[int, ...], finish: str, logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> SampleOutput:
        """Likewise, for the first time: says how it began too."""
        self.has_output = True
        group = self.group
        # Of all samples, the first to be heard brings them.
        prompt_logprobs = tuple(group.prompt_logprobs or ())
        group.prompt_logprobs = None
        return SampleOutput(
            group.request_id,
            self.sample_index,
            token_ids,
            finish,
            logprobs,
            prompt_logprobs,
            num_cached_tokens=group.num_cached_tokens or 0,
            queued_s=self.queued_s or 0.0,
        )
