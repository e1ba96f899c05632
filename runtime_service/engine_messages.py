"""What the front process and the engine process say to each other: one message a step each way.

Encoded with msgspec's MessagePack; the only place that knows both sides' vocabulary.
"""

import msgspec

from runtime_service.limits import RuntimeLimits
from runtime_service.scheduling.output import TokenLogprobs
from runtime_service.scheduling.request import Request


class AddRequest(msgspec.Struct, tag=True, frozen=True):
    """Start a generation."""

    request: Request


class AbortSamples(msgspec.Struct, tag=True, frozen=True):
    """End samples without further output: cancelled, timed out, or stopped by a string.

    `sample_indices` empty means all of the request's.
    """

    request_id: int
    sample_indices: tuple[int, ...] = ()


class UpdateRequest(msgspec.Struct, tag=True, frozen=True):
    """Change a running generation; None leaves a field as it is."""

    request_id: int
    priority: int | None = None
    max_new_tokens: int | None = None


class AddCredit(msgspec.Struct, tag=True, frozen=True):
    """Let a generation draw this many further tokens."""

    request_id: int
    tokens: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """End the loop and the process, whatever runs."""


Command = AddRequest | AbortSamples | UpdateRequest | AddCredit | Shutdown


class SampleOutput(msgspec.Struct, frozen=True, gc=False):
    """What one sample gained in a step.

    Args:
        finish: "" while it goes on; "stop_token" or "length".
        num_cached_tokens: of the prompt, found in the KV cache; set in a sample's first output.
        queued_s: seconds from AddRequest to its first step; set likewise.
        prompt_logprobs: in the first output, where asked for.
    """

    request_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    finish: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int | None = None
    queued_s: float | None = None


class EngineStats(msgspec.Struct, frozen=True):
    """The loop's state after a step; counters count from the start.

    Args:
        num_running: hold a row and blocks, those without credit too.
        waiting_tokens: of those that wait for a row, to be computed.
        step_tokens: T of the last step; 0 where none was launched.
        is_idle: nothing can run until a command arrives, so no message comes before: a watchdog
            that waits for the next message may sleep.
    """

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    waiting_tokens: int
    steps: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    step_tokens: int
    is_idle: bool = False


class Loading(msgspec.Struct, tag=True, frozen=True):
    """What the process does from now on, before it is ready: `phase` is a name of `Ready.phases`."""

    phase: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine is loaded and the loop runs. `phases`: (name, seconds), in order."""

    limits: RuntimeLimits
    phases: tuple[tuple[str, float], ...]


class StepOutputs(msgspec.Struct, tag=True, frozen=True):
    """What all sequences gained since the last message, and the loop's state.

    Args:
        num_commands: obeyed since the start. Every command is answered by a message, so that a
            watchdog knows when one is due: while the loop is not idle, or has not obeyed all.
    """

    outputs: tuple[SampleOutput, ...]
    stats: EngineStats
    num_commands: int = 0


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot be loaded or the loop has ended; the process exits after this.

    `status`: a serialized google.rpc.Status, as `shared.errors.to_status` gives.
    """

    status: bytes


Reply = Loading | Ready | StepOutputs | Failed
